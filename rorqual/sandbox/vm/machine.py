"""One virtual machine as QEMU's command line, and the walls around QEMU itself.

QEMU gets no default devices, no configuration files, no network, no host folder, no display; two virtio ports and its
control socket are unix sockets in a folder that only its owner can enter, and none of them is a device of the guest but
the two ports. Its own system call filter is on. Around it stands bubblewrap: a file system of /usr, the files it boots
from and its own folder, an empty network, its own processes; started by root it also gets a host uid that no other
machine has, and no capability. Where bubblewrap is missing only the filter holds, and `walls` says so.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from rorqual.errors import SandboxError
from rorqual.sandbox.vm.share import NAME, Sharing
from rorqual.sandbox.vm.walls import can_wall, refuse_root, walled

Board = Literal["microvm", "pc", "q35"]
Accelerator = Literal["kvm", "tcg"]
BINARY = "qemu-system-x86_64"
MAX_LAYERS = 24
EXIT_PORT = 0x501
QBOOT = "/usr/share/qemu/qboot.rom"
_BOARDS: dict[Board, str] = {
    "microvm": "microvm,pcie=on,rtc=on,isa-serial=on",
    "pc": "pc,vmport=off,usb=off",
    "q35": "q35,smm=off,vmport=off,usb=off",
}
"""microvm has no timer that an emulated guest could measure its processor's clock against: every second boot of a
distribution's kernel hung there. With KVM the hypervisor tells the clock's rate; emulated small machines are `pc`."""
_FILTER = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# 8250.nr_uarts, i8042, cryptomgr: work at boot that a machine without such devices can spare itself
_KERNEL_LINE = "console=ttyS0 quiet panic=-1 reboot=t 8250.nr_uarts=1 i8042.noaux i8042.nokbd cryptomgr.notests"
_EMULATED_LINE = "mitigations=off tsc=reliable no_timer_check"
"""Only under emulation, which neither speculates nor has a clock of its own; with KVM the kernel keeps its defences."""


@dataclass(frozen=True)
class Disk:
    """A writable disk: `parents` from the lowest up (a raw image, then qcow2 overlays), and the overlay written to.

    top: None writes to the raw image itself, which only the making of a template does.
    """

    parents: tuple[Path, ...]
    top: Path | None


@dataclass(frozen=True)
class Machine:
    """What QEMU is asked for. folder: the machine's own (sockets, overlay); incoming: it waits for a saved state.

    memory: a file that has its memory: written to by a machine that boots, read and mapped privately, as `sharing` has
    it, by one that loads a state saved without memory. None: memory of its own.
    """

    board: Board
    accelerator: Accelerator
    cpus: int
    memory_mb: int
    kernel: Path
    initramfs: Path
    layers: tuple[Path, ...]
    disk: Disk
    folder: Path
    incoming: bool = False
    console: bool = False
    memory: Path | None = None
    sharing: Sharing | None = None

    def cpu_model(self) -> str:
        """What the guest sees: the host's processor with KVM, everything that can be emulated otherwise."""
        return "host,migratable=on" if self.accelerator == "kvm" else "max"

    def arguments(self, place: _Places) -> list[str]:
        """QEMU's arguments; `place` says under which path each file is found inside the walls."""
        board = _BOARDS[self.board]
        line = f"{_KERNEL_LINE} {_EMULATED_LINE}" if self.accelerator == "tcg" else _KERNEL_LINE
        arguments = [
            *("-name", "rorqual", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-sandbox", _FILTER, "-machine", f"{board},accel={self.accelerator},memory-backend=ram"),
            *("-object", self._backend(place), "-m", str(self.memory_mb)),
            *("-cpu", self.cpu_model(), "-smp", str(self.cpus)),
            *("-kernel", place(self.kernel), "-initrd", place(self.initramfs)),
            *("-append", f"{line} rorqual.layers={len(self.layers)}"),
            *("-qmp", f"unix:{place(self.folder / 'qmp')},server=on,wait=off"),
            *("-serial", f"file:{place(self.folder / 'console')}" if self.console else "null"),
            *("-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"),
            *("-object", "rng-builtin,id=random", "-device", "virtio-rng-pci,rng=random"),
            *("-device", "virtio-serial-pci,id=ports,max_ports=4"),
        ]
        if self.board == "pc" and Path(QBOOT).exists():
            arguments += ["-bios", "qboot.rom"]  # the usual firmware takes a second longer
        for number, name in enumerate(("agent", "control"), 1):
            socket = place(self.folder / name)
            arguments += ["-chardev", f"socket,id={name},path={socket},server=on,wait=off"]
            arguments += ["-device", f"virtserialport,nr={number},chardev={name},name=rorqual.{name}"]
        for number, layer in enumerate(self.layers):
            name = f"layer{number}"
            arguments += ["-blockdev", _file(f"{name}f", place(layer), True)]
            arguments += ["-blockdev", f"driver=raw,node-name={name},file={name}f,read-only=on"]
            arguments += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
        arguments += self._disk(place)
        if self.incoming:
            arguments += ["-incoming", "defer"]
        return arguments

    def _backend(self, place: _Places) -> str:
        size = f"id=ram,size={self.memory_mb}M"
        if self.memory is None:
            return f"memory-backend-ram,{size}"
        file = _without_comma(place(self.memory))
        if not self.incoming:
            return f"memory-backend-file,{size},mem-path={file},share=on"
        return f"memory-backend-file,{size},mem-path={file},share=off{self.sharing.options if self.sharing else ''}"

    @property
    def preload(self) -> Path | None:
        """A library to be preloaded into QEMU."""
        return self.sharing.preload if self.incoming and self.memory is not None and self.sharing is not None else None

    def _disk(self, place: _Places) -> list[str]:
        arguments: list[str] = []
        chain = [*self.disk.parents, *([self.disk.top] if self.disk.top is not None else [])]
        for number, path in enumerate(chain):
            last = number == len(chain) - 1
            name = "upper" if last else f"below{number}"
            only = "off" if last else "on"
            arguments += ["-blockdev", _file(f"{name}f", place(path), not last)]
            below = f",backing=below{number - 1}" if number else ""
            kind = "qcow2" if number else "raw"
            arguments += ["-blockdev", f"driver={kind},node-name={name},file={name}f,read-only={only}{below}"]
        return [*arguments, "-device", "virtio-blk-pci,drive=upper,serial=upper"]

    def files(self) -> list[Path]:
        """Everything that QEMU only reads."""
        memory = [self.memory] if self.memory is not None and self.incoming else []
        preload = [self.preload] if self.preload is not None else []
        disks = self.disk.parents[: None if self.disk.top else -1]
        return [self.kernel, self.initramfs, *self.layers, *disks, *memory, *preload]


def _file(node: str, path: str, read_only: bool) -> str:
    only = "on" if read_only else "off"
    return f"driver=file,node-name={node},filename={_without_comma(path)},read-only={only}"


def _without_comma(path: str) -> str:
    if "," in path:
        raise SandboxError(f"the path {path!r} has a comma in it, which QEMU's options cannot hold. Move the folder.")
    return path


class _Places:
    """Where a file of the host is seen by QEMU: at its own path, or under a short name inside the walls."""

    def __init__(self, machine: Machine, walled: bool) -> None:
        self._walled = walled
        self._names = {path: f"/files/{number}" for number, path in enumerate(dict.fromkeys(machine.files()))}
        if machine.memory in self._names:
            self._names[machine.memory] = f"/files/{NAME}"
        self._preload = machine.preload
        self._folder = machine.folder

    def __call__(self, path: Path) -> str:
        if not self._walled:
            return str(path)
        if path in self._names:
            return self._names[path]
        return str(Path("/vm", path.relative_to(self._folder)))

    def binds(self) -> list[str]:
        """bwrap's options that show these files and the machine's folder, and nothing else of the host."""
        options = [word for path, name in self._names.items() for word in ("--ro-bind", str(path), name)]
        if self._preload is not None:
            options += ["--setenv", "LD_PRELOAD", self._names[self._preload]]
        return ["--perms", "0755", "--dir", "/files", *options, "--bind", str(self._folder), "/vm"]


def command(machine: Machine, uid: int | None) -> tuple[list[str], str]:
    """The whole command, and what stands around QEMU in words. uid: the machine's own host user, when root starts it.

    Raises: SandboxError when QEMU is missing, or root would have to run it without walls.
    """
    binary = shutil.which(BINARY)
    if binary is None:
        raise SandboxError(f"{BINARY} is not installed; `apt install qemu-system-x86` brings it.")
    if not can_wall():
        refuse_root()
        alone = ["/usr/bin/env", f"LD_PRELOAD={machine.preload}"] if machine.preload is not None else []
        words = [*alone, binary, *machine.arguments(_Places(machine, False))]
        return words, "QEMU's system call filter (no bubblewrap here)"
    place = _Places(machine, True)
    kvm = machine.folder.parent if machine.accelerator == "kvm" else None
    return walled([binary, *machine.arguments(place)], place.binds(), kvm, uid, "QEMU")


@lru_cache
def qemu_version() -> str:
    """`QEMU emulator version …`, the first line of what it says of itself; empty when there is none."""
    binary = shutil.which(BINARY)
    if binary is None:
        return ""
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else ""


def fingerprint(machine: Machine, kernel_digest: str, initramfs_digest: str) -> dict[str, str]:
    """What must be the same for a saved state to be restored; another value of any of these is refused."""
    processor = "emulated"
    if machine.accelerator == "kvm":
        text = Path("/proc/cpuinfo").read_text()
        flags = re.findall(r"^(?:flags|Features|model name|microcode)\s*: (.*)$", text, re.MULTILINE)
        processor = hashlib.sha256(repr(sorted(set(flags))).encode()).hexdigest()[:16]
    return {
        "qemu": qemu_version(),
        "board": machine.board,
        "accelerator": machine.accelerator,
        "cpu": machine.cpu_model(),
        "processor": processor,
        "cpus": str(machine.cpus),
        "memory_mb": str(machine.memory_mb),
        "kernel": kernel_digest,
        "initramfs": initramfs_digest,
        "layers": ",".join(path.name for path in machine.layers),
    }
