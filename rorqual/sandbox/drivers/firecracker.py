"""Small machines by Firecracker, with KVM.

Isolates: as the KVM drivers of QEMU do, with a monitor that is far smaller; it runs in the same walls (vm/walls.py)
beside its own system call filter. Guest and host speak over vsock: port 1024 is the agent's, 1025 the driver's.
Does not isolate: processor side channels. No network. Machines boot each time; full snapshots are QEMU's here.

No machine that this was written on could run Firecracker: the requests are held against its published API in the tests,
the boot itself was not tried. The probe boots one, so it is not chosen where it fails.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar, Literal

from rorqual.errors import SandboxError
from rorqual.sandbox import cgroups
from rorqual.sandbox.agent.build import agent_binary
from rorqual.sandbox.drivers.base import Running
from rorqual.sandbox.drivers.bwrap import launch
from rorqual.sandbox.drivers.qemu import Qemu
from rorqual.sandbox.drivers.qemu_still import layers_of
from rorqual.sandbox.errors import TransportError, Unsupported
from rorqual.sandbox.home import Home
from rorqual.sandbox.spec import Capabilities, Kind, Limits, SandboxSpec
from rorqual.sandbox.vm import boot, template
from rorqual.sandbox.vm.control import Control
from rorqual.sandbox.vm.firecracker_api import Api, connect_vsock
from rorqual.sandbox.vm.initramfs import MMIO_MODULES
from rorqual.sandbox.vm.walls import can_wall, refuse_root, walled

AGENT_PORT, CONTROL_PORT = 1024, 1025
BOOT_S = 8.0
MONITOR_MB = 64
_LINE = "console=ttyS0 quiet reboot=k panic=-1 pci=off 8250.nr_uarts=0 i8042.noaux cryptomgr.notests"


class Firecracker(Qemu):
    """microvm sandboxes through Firecracker; images, kernel, limits inside and disk snapshots are those of Qemu."""

    kind: ClassVar[Kind] = "microvm"
    name = "firecracker"
    board = "microvm"
    accelerator = "kvm"
    modules = MMIO_MODULES
    probe_timeout_s = 20.0

    def missing(self) -> str | None:
        """What plainly lacks here."""
        if shutil.which("firecracker") is None:
            return (
                "firecracker is not installed: no distribution has it; put a release's binary on PATH as `firecracker`"
            )
        return self._missing_for_machines()

    def capabilities(self) -> Capabilities:
        """What it can do on this machine."""
        return Capabilities("vm-hw", pause_memory=True, snapshot_disk=True, pty=True, disk_quota=True)

    async def start(self, spec: SandboxSpec, home: Path) -> Running:
        """Boot a machine; returns when its agent answers."""
        if spec.network != "none":
            raise Unsupported(
                f"network={spec.network!r}: this driver gives a machine no network. Use network='none'.",
                "network_allowlist",
            )
        machine, _ = await asyncio.to_thread(self._machine, spec, home, await asyncio.to_thread(layers_of, spec))
        uid = boot.new_uid()
        folder = await asyncio.to_thread(boot.own_folder, home, uid)
        disk = folder / "disk"
        await asyncio.to_thread(template.make_disk, disk, spec.limits)
        boot.hand_over(disk, uid)
        files = [machine.kernel, machine.initramfs, *machine.layers]
        inside = {path: f"/files/{number}" if can_wall() else str(path) for number, path in enumerate(files)}
        running = await asyncio.to_thread(self._launch_monitor, spec, home, inside, uid)
        here = Path("/vm") if can_wall() else folder
        layers = [(f"layer{number}", inside[path], True) for number, path in enumerate(machine.layers)]
        try:
            api = Api(folder)
            await api.wait(boot.MONITOR_WAIT_S)
            await api.boot(
                cpus=machine.cpus,
                memory_mb=machine.memory_mb,
                kernel=inside[machine.kernel],
                initramfs=inside[machine.initramfs],
                boot_args=f"{_LINE} rorqual.channel=vsock rorqual.layers={len(layers)}",
                disks=[*layers, ("upper", str(here / "disk"), False)],
                vsock=str(here / "vsock"),
            )
            await self._wait_for_guest(home)
            await self._personalise(running, spec, home, "")
        except BaseException:
            await asyncio.shield(asyncio.to_thread(boot.end, running.processes, running.cgroups))
            raise
        return running

    def _launch_monitor(self, spec: SandboxSpec, home: Path, inside: dict[Path, str], uid: int | None) -> Running:
        folder = home / "vm"
        binary = shutil.which("firecracker") or "firecracker"
        if can_wall():
            binds = ["--perms", "0755", "--dir", "/files"]
            binds += [word for path, name in inside.items() for word in ("--ro-bind", str(path), name)]
            binds += ["--ro-bind", os.path.realpath(binary), "/firecracker", "--bind", str(folder), "/vm"]
            words, walls = walled(["/firecracker", "--api-sock", "/vm/api"], binds, home, uid, "Firecracker")
        else:
            refuse_root()
            words, walls = (
                [binary, "--api-sock", str(folder / "api")],
                "Firecracker's system call filter (no bubblewrap)",
            )
        host = Limits(cpu=spec.limits.cpu, memory_mb=max(spec.limits.memory_mb, 128) + MONITOR_MB, pids=64)
        group = cgroups.create(home.name, host)
        try:
            command = [str(agent_binary()), "keep", "--home", str(home), "--plain", "yes", "--", *words]
            running = list(launch(command, home, group))
        except BaseException:
            if group is not None:
                group.kill()
                group.remove()
            raise
        return Running(
            running,
            {"vsock": "vm/vsock"},
            secrets.token_hex(32),
            cgroups=group.paths if group is not None else [],
            enforced={**self._enforced(), "vmm": walls, "cpu": group.describe().get("cpu", "") if group else "vcpus"},
            extra={"uid": uid, "nproc": spec.limits.pids},
        )

    async def _wait_for_guest(self, home: Path) -> None:
        end = time.monotonic() + BOOT_S
        while True:
            try:
                async with await self._control(home) as control:
                    await control.wait_ready(BOOT_S)
                return
            except TransportError as error:
                if time.monotonic() > end:
                    said = boot.last_words(home)
                    raise SandboxError(f"the guest did not boot within {BOOT_S:g} s: {said or error}") from error
                await asyncio.sleep(0.01)

    async def _control(self, home: Path) -> Control:
        return Control(*await connect_vsock(home, "vm/vsock", CONTROL_PORT))

    async def connect(self, running: Running, home: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to the agent, which listens on a vsock port."""
        return await connect_vsock(home, running.channel["vsock"], AGENT_PORT)

    async def pause(self, running: Running, home: Path, keep_memory: bool) -> None:
        """Stop the machine; its memory stays, for there are no full snapshots by this driver."""
        await Api(home / "vm").set_state(paused=True)

    async def resume(self, running: Running, home: Path) -> Running:
        """Let it run on and set its clock."""
        await Api(home / "vm").set_state(paused=False)
        async with await self._control(home) as control:
            await control.ask(f"clock {time.time_ns() // 1000}")
        return running

    async def settle(self, running: Running, home: Path) -> Literal["ready", "paused"]:
        """Nothing: its monitor tells no state."""
        return "ready"

    @asynccontextmanager
    async def _awake(self, home: Path) -> AsyncIterator[None]:
        is_paused = Home(home).read().state == "paused"
        if is_paused:
            await Api(home / "vm").set_state(paused=False)
        try:
            yield
        finally:
            if is_paused:
                await Api(home / "vm").set_state(paused=True)

    async def snapshot_full(self, running: Running, home: Path, name: Callable[[str], Awaitable[None]]) -> None:
        """Not by this driver. Raises: Unsupported."""
        raise self._cannot("snapshot_memory", "take a full snapshot")
