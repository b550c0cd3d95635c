"""Virtual machines by QEMU: small ones (`microvm` or `pc` board) and full ones (`q35`), with KVM or emulated.

Isolates: the sandbox has a kernel of its own; what it could attack is QEMU, which runs in its own namespaces, without
capabilities, under a uid of its own when root starts it, with a system call filter. With KVM this is "vm-hw", emulated
(TCG) "vm-emulated": slower by about ten, and a larger program to trust, but it needs nothing of the machine.
Does not isolate: processor side channels between machines on one core. No network, no host folder, no memory that
two machines could write to: pages of their template are shared, and copied where one writes.

The first machine of a shape (kernel, layers, memory, processors, disk) boots and is saved as a template; all later ones
start from it.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from rorqual.errors import SandboxError
from rorqual.folders import cache_folder
from rorqual.sandbox.channel import Channel
from rorqual.sandbox.drivers.base import Running
from rorqual.sandbox.drivers.bwrap import pss, tree_of
from rorqual.sandbox.drivers.qemu_still import LOAD_S, StandsStill, layers_of
from rorqual.sandbox.drivers.streams import connect_unix
from rorqual.sandbox.errors import Unsupported
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.link import provision_fields
from rorqual.sandbox.spec import Capabilities, Isolation, Kind, SandboxSpec
from rorqual.sandbox.vm import boot, guest_root, kernel, pvm, qcow2, saved, share, snapshot, template
from rorqual.sandbox.vm.initramfs import PCI_MODULES, build_initramfs
from rorqual.sandbox.vm.machine import (
    BINARY,
    MAX_LAYERS,
    Accelerator,
    Board,
    Disk,
    Machine,
    fingerprint,
    qemu_version,
)
from rorqual.sandbox.wire import Tag, Type, Value

BOOT_S = {"kvm": 8.0, "tcg": 120.0}
"""With KVM a boot takes a second where it works, and never ends where /dev/kvm is not what it seems."""
TEMPLATE_TRIES = 3
CLOCK_S = 0.5
"""For how long the clock of a new template's first machine is watched."""


class Qemu(StandsStill):
    """What the four drivers share; they differ in board and accelerator."""

    board: ClassVar[Board]
    accelerator: ClassVar[Accelerator]
    modules: ClassVar[tuple[str, ...]] = PCI_MODULES

    def missing(self) -> str | None:
        """What plainly lacks here."""
        if shutil.which(BINARY) is None:
            return f"{BINARY} is not installed; `apt install qemu-system-x86` brings it"
        return self._missing_for_machines()

    def _missing_for_machines(self) -> str | None:
        if os.uname().machine != "x86_64":
            return f"this driver starts x86-64 machines only, and this is {os.uname().machine}"
        if os.geteuid() == 0 and not (shutil.which("bwrap") and shutil.which("setpriv")):
            return (
                "started by root, a monitor needs bubblewrap and setpriv around it: `apt install bubblewrap util-linux`"
            )
        if self.accelerator == "kvm":
            if not Path("/dev/kvm").exists():
                return "there is no /dev/kvm: this machine (or the machine it runs in) offers no virtualization"
            if not os.access("/dev/kvm", os.R_OK | os.W_OK):
                return "/dev/kvm may not be opened by this user; an administrator can add it to the group kvm"
            if _hung().exists():
                return f"with KVM no guest booted ({self.explain(_hung().read_text())}); remove {_hung()} to try again"
        return kernel.missing() or template.missing() or guest_root.missing()

    def explain(self, why: str) -> str:
        """Once a guest did not boot: whether this machine's KVM is of a kind that no stock kernel boots on."""
        return pvm.REASON if self.accelerator == "kvm" and pvm.is_pvm() else why

    def capabilities(self) -> Capabilities:
        """What it can do on this machine."""
        isolation: Isolation = "vm-hw" if self.accelerator == "kvm" else "vm-emulated"
        return Capabilities(
            isolation,
            pause_memory=True,
            snapshot_disk=True,
            snapshot_memory=True,
            fork_live=True,
            pty=True,
            disk_quota=True,
        )

    async def start(self, spec: SandboxSpec, home: Path) -> Running:
        """Start from the template of this shape (made now if need be), or from a full snapshot."""
        if spec.network != "none":
            raise Unsupported(
                f"network={spec.network!r}: the {self.name} driver gives a machine no network. Use network='none'.",
                "network_allowlist",
            )
        full = await asyncio.to_thread(_full_snapshot, spec)
        with snapshot.reading(full) if full is not None else nullcontext():
            machine, digests, layers = await asyncio.to_thread(self._checked, spec, home, full)
            extra = {"fingerprint": fingerprint(machine, *digests), "layers": layers}
            if full is not None:
                parents = [full.folder / name for name in full.disks]
                running = await self._launch(machine, spec, home, full.folder / "state", parents, full.disk_mb)
                running.extra |= extra
                await self._personalise(running, spec, home, full.secret)
                return running
        for _ in range(TEMPLATE_TRIES):
            made = await self._template(machine, digests, spec)
            mapped = replace(machine, memory=made.memory)
            running = await self._launch(mapped, spec, home, made.state, [made.disk], spec.limits.disk_mb)
            running.extra |= extra
            if await self._personalise(running, spec, home, "", check_clock=not made.is_tried):
                await asyncio.to_thread(made.mark_tried)
                return running
            await asyncio.to_thread(boot.end, running.processes, running.cgroups)
            await asyncio.to_thread(made.discard)
        raise SandboxError(
            f"{TEMPLATE_TRIES} machines that were booted as templates had clocks of a wrong rate: this host was too "
            "busy for them to measure it. Try again when it is less so."
        )

    async def check(self, spec: SandboxSpec, home: Path) -> None:
        """Every layer, or the full snapshot with what it was taken under, is as it was, and there are not too many."""
        full = await asyncio.to_thread(_full_snapshot, spec)
        with snapshot.reading(full) if full is not None else nullcontext():
            await asyncio.to_thread(self._checked, spec, home, full)

    def _checked(
        self, spec: SandboxSpec, home: Path, full: snapshot.Manifest | None
    ) -> tuple[Machine, tuple[str, str], list[str]]:
        """The machine asked for, digests of kernel and initramfs, and its layers."""
        layers = layers_of(spec)
        machine, digests = self._machine(spec, home, layers)
        if full is not None:
            snapshot.check(full, fingerprint(machine, *digests))
            snapshot.verify(full)
        return machine, digests, layers

    async def _template(self, machine: Machine, digests: tuple[str, str], spec: SandboxSpec) -> template.Template:
        try:
            return await template.obtain(machine, digests, spec.limits, BOOT_S[self.accelerator])
        except SandboxError as error:
            if self.accelerator == "kvm":  # remembered until the next boot: finding out again costs seconds each time
                _hung().parent.mkdir(parents=True, exist_ok=True)
                _hung().write_text(str(error).splitlines()[0][:300])
            raise

    async def _launch(
        self, machine: Machine, spec: SandboxSpec, home: Path, state: Path, parents: Sequence[Path], disk_mb: int
    ) -> Running:
        """A machine of its own overlay on `parents`, loaded from `state` and running."""
        uid = boot.new_uid()
        folder = await asyncio.to_thread(boot.own_folder, home, uid)
        chain = []
        for number, parent in enumerate(parents):  # under names of our own: the originals may be removed meanwhile
            linked = home / f"disk{number}"
            linked.unlink(missing_ok=True)
            await asyncio.to_thread(snapshot.link_or_copy, parent, linked)
            chain.append(linked)
        top = folder / "disk"
        top.unlink(missing_ok=True)
        qcow2.write_empty(top, disk_mb << 20)
        boot.hand_over(top, uid)
        machine = replace(machine, folder=folder, disk=Disk(tuple(chain), top), incoming=True)
        return await self._run(machine, spec, home, state, uid)

    async def _run(
        self,
        machine: Machine,
        spec: SandboxSpec,
        home: Path,
        state: Path,
        uid: int | None,
        loaded: Callable[[Running], None] = lambda running: None,
    ) -> Running:
        """Load a machine from `state` and let it run; `loaded` is called in between."""
        started = await asyncio.to_thread(boot.start, machine, home, uid, home.name, spec.limits.cpu)
        try:
            async with await boot.monitor(machine.folder, home, boot.MONITOR_WAIT_S) as qmp:
                await saved.load(qmp, state, LOAD_S, memory_apart=machine.memory is not None)
                running = self._running(started, spec, uid)
                await asyncio.to_thread(loaded, running)
                await qmp.execute("cont")
        except BaseException:
            await asyncio.shield(boot.end_later(started))
            raise
        return running

    def _running(self, started: boot.Started, spec: SandboxSpec, uid: int | None) -> Running:
        return Running(
            started.processes,
            {"unix": "vm/agent"},
            secrets.token_hex(32),
            cgroups=started.cgroups,
            enforced={**self._enforced(), **started.enforced},
            extra={"uid": uid, "nproc": spec.limits.pids},
        )

    @staticmethod
    def _enforced() -> dict[str, str]:
        return {
            "memory": "the machine's memory size",
            "disk": "size of the virtual disk",
            "inodes": "inodes of the virtual disk",
            "pids": "rlimit, and threads-max of its kernel",
            "open_files": "rlimit",
            "file_mb": "rlimit",
        }

    def _machine(self, spec: SandboxSpec, home: Path, layers: Sequence[str]) -> tuple[Machine, tuple[str, str]]:
        """The machine asked for on these layers, without its disk; digests of kernel and initramfs."""
        store = Store()
        if len(layers) > MAX_LAYERS:
            raise Unsupported(
                f"{len(layers)} layers are more than a machine has places for disks ({MAX_LAYERS}). Make the "
                "image of fewer layers: export it and import it as one.",
                "layers",
            )
        found = kernel.obtain()
        initramfs, initramfs_digest = build_initramfs(found, self.modules)
        machine = Machine(
            board=self.board,
            accelerator=self.accelerator,
            cpus=max(1, math.ceil(spec.limits.cpu)),
            memory_mb=max(spec.limits.memory_mb, 128),
            kernel=found.image,
            initramfs=initramfs,
            layers=tuple(store.object_path(digest) for digest in layers),
            disk=Disk((), None),
            folder=home / "vm",
            sharing=None if share.is_in_memory(template.folder()) else share.sharing(BINARY, qemu_version()),
        )
        return machine, (found.digest, initramfs_digest)

    async def _personalise(
        self, running: Running, spec: SandboxSpec, home: Path, secret: str, check_clock: bool = False
    ) -> bool:
        """Give a machine that was loaded what no other copy has, before any command runs in it.

        secret: the key of a restored sandbox's agent; empty for a template's, which belongs to nobody yet.
        Returns False when its clock was to be checked and is wrong. After an error the machine is ended.
        """
        try:
            return await self._make_own(running, spec, home, secret, check_clock)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(boot.end, running.processes, running.cgroups))
            raise

    async def _make_own(self, running: Running, spec: SandboxSpec, home: Path, secret: str, check_clock: bool) -> bool:
        async with await self._control(home) as control:
            await control.ask(f"threads {spec.limits.pids}")
        fields = None if secret else provision_fields(spec, running, time.time())
        key = bytes.fromhex(secret or running.secret)
        rekey = [*fresh_identity(home.name), *self._rekey(running, spec)]
        reader, writer = await self.connect(running, home)
        channel = await asyncio.wait_for(
            Channel.open(reader, writer, key, 0 if fields else 1 << 62, lambda kind, found: None, fields), LOAD_S
        )
        try:
            await channel.request(Type.REKEY, rekey)
            if secret and (await channel.request(Type.PING)).text(Tag.STATE) == "paused":
                await channel.request(Type.RESUME)  # its original was paused when the snapshot was taken

            async def idle_ms() -> int:
                return (await channel.request(Type.PING)).number(Tag.IDLE_FOR_MS)

            return not check_clock or await keeps_time(idle_ms)
        finally:
            await channel.close()

    def _rekey(self, running: Running, spec: SandboxSpec) -> list[tuple[Tag, Value]]:
        idle, life = spec.lifetimes.idle_ttl, spec.lifetimes.max_lifetime
        return [
            (Tag.SECRET, bytes.fromhex(running.secret)),
            (Tag.EPOCH, 0),
            (Tag.IDLE_MS, 0 if idle == float("inf") else max(1, int(idle * 1000))),
            (Tag.LIFE_MS, 0 if life == float("inf") else max(1, int(life * 1000))),
        ]

    async def connect(self, running: Running, home: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to the agent's port; QEMU takes a next client once the one before it is gone."""
        return await connect_unix(home, running.channel["unix"])

    async def stop(self, running: Running, home: Path) -> list[str]:
        """End QEMU and its keeper; the machine's disk goes with the sandbox's folder."""
        return await asyncio.to_thread(boot.end, running.processes, running.cgroups)

    async def oom_kills(self, running: Running, home: Path) -> int:
        """How many processes the guest's kernel ended for memory."""
        async with await self._control(home) as control:
            return await control.number("oom")

    async def memory_bytes(self, running: Running) -> int:
        """The proportional share of QEMU and its keeper."""
        return await asyncio.to_thread(lambda: sum(pss(process.pid) for process in tree_of(running)))


class QemuMicrovmKvm(Qemu):
    """Small machines with hardware virtualization."""

    kind: ClassVar[Kind] = "microvm"
    name = "qemu-microvm-kvm"
    board = "microvm"
    accelerator = "kvm"
    probe_timeout_s = 45.0


class QemuMicrovmTcg(Qemu):
    """Small machines, emulated: the `pc` board, see vm/machine.py for why not `microvm`."""

    kind: ClassVar[Kind] = "microvm"
    name = "qemu-tcg"
    board = "pc"
    accelerator = "tcg"
    probe_timeout_s = 120.0


class QemuKvm(Qemu):
    """Full machines with hardware virtualization."""

    kind: ClassVar[Kind] = "vm"
    name = "qemu-kvm"
    board = "q35"
    accelerator = "kvm"
    probe_timeout_s = 45.0


class QemuTcg(Qemu):
    """Full machines, emulated."""

    kind: ClassVar[Kind] = "vm"
    name = "qemu-tcg"
    board = "q35"
    accelerator = "tcg"
    probe_timeout_s = 120.0


def _hung() -> Path:
    """Where it is noted that KVM let no guest boot, for this boot of the host."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return cache_folder() / "probes" / f"kvm-{boot_id}"


async def keeps_time(clock_ms: Callable[[], Awaitable[int]]) -> bool:
    """Whether a machine's clock, asked for twice, is within a quarter of ours; delays of its answers are allowed for.

    A guest measures its processor's clock against its timers while it boots. On an emulated processor that gets no time
    the result may be wrong many times over, and every machine from that template would have it.
    """
    asked = time.monotonic()
    first = await clock_ms()
    answered = time.monotonic()
    await asyncio.sleep(CLOCK_S)
    asked_again = time.monotonic()
    passed = (await clock_ms() - first) / 1000
    return 0.75 * (asked_again - answered) <= passed + 0.002 and passed - 0.002 <= 1.25 * (time.monotonic() - asked)


def fresh_identity(name: str) -> list[tuple[Tag, Value]]:
    """What two copies of one memory must not share: random numbers, names, the time."""
    return [
        (Tag.ENTROPY, secrets.token_bytes(256)),
        (Tag.TIME_US, time.time_ns() // 1000),
        (Tag.HOSTNAME, name[:63]),
        (Tag.TEXT, secrets.token_hex(16)),
    ]


def _full_snapshot(spec: SandboxSpec) -> snapshot.Manifest | None:
    """The full snapshot that `spec.snapshot` names, itself or through a name in the store."""
    if spec.snapshot is None:
        return None
    found = Store().reference(spec.snapshot)
    identity = found.note.get("full", "") if found is not None else spec.snapshot
    return snapshot.read(identity) if identity.startswith("full-") else None
