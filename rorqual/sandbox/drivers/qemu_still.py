"""Virtual machines that stand still: paused in memory or to the disk, run on, and copied while they do.

The file `suspended` in a sandbox's folder is a machine's memory. While it is there, the disk is as it was when it was
written, and whatever process of the machine still lives stands still; so a client that is killed at any step leaves a
machine that the next one can resume.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import SandboxError
from rorqual.sandbox import processes
from rorqual.sandbox.drivers.base import Driver, Running
from rorqual.sandbox.errors import TransportError
from rorqual.sandbox.home import Home
from rorqual.sandbox.images.intake import add_tar
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.snapshots import names_of, on_host_root
from rorqual.sandbox.spec import SandboxSpec
from rorqual.sandbox.vm import boot, guest_root, qcow2, saved, snapshot
from rorqual.sandbox.vm.control import Control
from rorqual.sandbox.vm.machine import Disk, Machine, fingerprint
from rorqual.sandbox.vm.qmp import QMP

LOAD_S = 30.0
"""How long saving or loading a machine may take."""
SETTLE_S = 5.0
"""How long a monitor may take to answer a client that has just come."""


class StandsStill(Driver):
    """Pausing, resuming and copying of QEMU's machines; how one is put together and started is the driver's."""

    @abstractmethod
    def _machine(self, spec: SandboxSpec, home: Path, layers: Sequence[str]) -> tuple[Machine, tuple[str, str]]:
        """The machine asked for on these layers, without its disk; digests of kernel and initramfs."""

    @abstractmethod
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

    async def pause(self, running: Running, home: Path, keep_memory: bool) -> None:
        """Stop the machine; without `keep_memory` it is saved to the disk and QEMU ends."""
        async with await self._monitor(home) as qmp:
            if keep_memory:
                await qmp.execute("stop")
                return
            try:
                await saved.save(qmp, home / "suspended", LOAD_S)
            except BaseException:
                await asyncio.shield(saved.go_on(qmp))
                raise
        left = await self.stop(running, home)
        if left:
            raise SandboxError(f"the machine was saved, but its processes could not be ended: {', '.join(left)}.")
        _forget_end(home)

    async def resume(self, running: Running, home: Path) -> Running:
        """Let it run on and set its clock; one that was saved gets a new QEMU."""
        if Home(home).is_suspended:
            running = await self._load_suspended(running, home)
        else:
            running = Home(home).read().running or running  # a resume before this one may have failed half-way
            async with await self._monitor(home) as qmp:
                await qmp.execute("cont")
        async with await self._control(home) as control:
            await control.ask(f"clock {time.time_ns() // 1000}")
        return running

    async def _load_suspended(self, running: Running, home: Path) -> Running:
        """A new QEMU for a saved machine. Killed at any moment, it can be done again or goes on from the record.

        While the saved memory is there, the disk is as it was and whatever runs stands still; it is given up only once
        the new processes are on record, and only then does the machine run and write.
        """
        strays = [one for found in Home(home).keeper() for one in (found, *processes.below(found.pid))]
        left = await self.stop(running, home)
        left += [f"process {one.pid}" for one in await asyncio.to_thread(processes.end_all, strays)]
        if left:
            raise SandboxError(f"what an interrupted resume started could not be ended: {', '.join(left)}. Try again.")
        _forget_end(home)
        machine, spec = await self._saved_machine(running, home)
        chain = sorted(home.glob("disk*"), key=lambda path: int(path.name[4:]))
        machine = replace(machine, disk=Disk(tuple(chain), home / "vm" / "disk"), incoming=True)

        def same(fresh: Running) -> Running:
            return replace(running, processes=fresh.processes, cgroups=fresh.cgroups, enforced=fresh.enforced)

        def loaded(fresh: Running) -> None:
            with Home(home).editing() as record:
                record.running = same(fresh)
            (home / "suspended").unlink()

        uid = running.extra["uid"]
        return same(await self._run(machine, spec, home, home / "suspended", uid, loaded))

    async def _saved_machine(self, running: Running, home: Path) -> tuple[Machine, SandboxSpec]:
        """The machine as it was when it was saved, without its disk. Raises: SandboxError when it cannot be here."""
        spec = Home(home).read().spec
        stands_on = running.extra.get("layers")  # names may have got other layers, or be gone
        layers = list(stands_on) if stands_on is not None else await asyncio.to_thread(layers_of, spec)
        machine, digests = await asyncio.to_thread(self._machine, spec, home, layers)
        here = fingerprint(machine, *digests)
        snapshot.check(snapshot.Manifest("of this paused sandbox", running.extra["fingerprint"], 0, {}, (), ""), here)
        return machine, spec

    async def settle(self, running: Running, home: Path) -> Literal["ready", "paused"]:
        """A machine whose client died while it stood still for a moment runs on, unless its memory is on the disk."""
        if Home(home).is_suspended:
            return "paused"
        if any(processes.alive(process) for process in running.processes):
            with suppress(TransportError):
                async with await boot.monitor(home / "vm", home, SETTLE_S) as qmp:
                    if not (await qmp.execute("query-status"))["running"]:
                        await saved.go_on(qmp)
        return "ready"

    async def snapshot_disk(self, running: Running, home: Path) -> str:
        """The writable layer, sent by the machine itself as a tar: the host never mounts a disk a guest wrote.

        A machine that stands still is woken for it, while what its agent stopped stays stopped; of one whose memory is
        on the disk a copy is.
        """
        most = (Home(home).read().spec.limits.disk_mb + 64) << 21
        with tempfile.NamedTemporaryFile(dir=home, prefix="tar-") as file:
            if Home(home).is_suspended:
                async with self._copy_of_suspended(running, home) as copy, await self._control(copy) as control:
                    await control.receive_tar(Path(file.name), most)
            else:
                async with self._awake(home), await self._control(home) as control:
                    await control.receive_tar(Path(file.name), most)

            def build(writer: Any) -> None:
                with open(file.name, "rb") as archive:
                    add_tar(writer, archive)
                writer.finish()

            return await asyncio.to_thread(lambda: Store().add(build))

    @asynccontextmanager
    async def _awake(self, home: Path) -> AsyncIterator[None]:
        """The machine runs meanwhile."""
        async with await self._monitor(home) as qmp:
            stands = not (await qmp.execute("query-status"))["running"]
            if stands:
                await qmp.execute("cont")
            try:
                yield
            finally:
                if stands:
                    await asyncio.shield(qmp.execute("stop"))

    @asynccontextmanager
    async def _copy_of_suspended(self, running: Running, home: Path) -> AsyncIterator[Path]:
        """Another machine with the saved one's memory, on a disk over its disk; gone afterwards. Yields its folder."""
        machine, spec = await self._saved_machine(running, home)
        uid = running.extra["uid"]
        chain = [*sorted(home.glob("disk*"), key=lambda path: int(path.name[4:])), home / "vm" / "disk"]
        with tempfile.TemporaryDirectory(dir=home, prefix="copy-") as scratch:
            copy = Path(scratch)
            inside = boot.own_folder(copy, uid)
            qcow2.write_empty(inside / "disk", _virtual_size(chain[-1]))
            boot.hand_over(inside / "disk", uid)
            end_ms = int((time.clock_gettime(time.CLOCK_BOOTTIME) + 4 * LOAD_S) * 1000)
            (copy / "lifetime").write_text(f"{end_ms} lifetime\n")
            machine = replace(machine, folder=inside, disk=Disk(tuple(chain), inside / "disk"), incoming=True)
            started = await asyncio.to_thread(boot.start, machine, copy, uid, f"{home.name}-copy", spec.limits.cpu)
            try:
                async with await boot.monitor(inside, copy, boot.MONITOR_WAIT_S) as qmp:
                    await saved.load(qmp, home / "suspended", LOAD_S)
                    await qmp.execute("cont")
                yield copy
            finally:
                await asyncio.shield(boot.end_later(started))

    async def snapshot_full(self, running: Running, home: Path, name: Callable[[str], Awaitable[None]]) -> None:
        """Memory and disk as they are at one moment; the machine stands still while they are written."""
        with snapshot.Draft() as draft:
            if Home(home).is_suspended:
                await asyncio.to_thread(snapshot.link_or_copy, home / "suspended", draft.folder / "state")
                await self._store(running, home, draft)
            else:
                async with await self._monitor(home) as qmp:
                    was_running = (await qmp.execute("query-status"))["running"]
                    try:
                        await saved.save(qmp, draft.folder / "state", LOAD_S)
                        await self._store(running, home, draft)
                    finally:
                        if was_running:
                            await asyncio.shield(saved.go_on(qmp))
            await name(draft.id)

    async def _store(self, running: Running, home: Path, draft: snapshot.Draft) -> None:
        chain = sorted(home.glob("disk*"), key=lambda path: int(path.name[4:]))
        disk_mb = (await asyncio.to_thread(_virtual_size, home / "vm" / "disk")) >> 20
        await asyncio.to_thread(
            snapshot.store,
            draft.folder / "state",
            [*chain, home / "vm" / "disk"],
            running.extra["fingerprint"],
            disk_mb or Home(home).read().spec.limits.disk_mb,
            running.secret,
            draft=draft,
        )

    async def _control(self, home: Path) -> Control:
        return await Control.open(home / "vm")

    async def _monitor(self, home: Path) -> QMP:
        return await boot.monitor(home / "vm", home, boot.MONITOR_WAIT_S)


def layers_of(spec: SandboxSpec) -> list[str]:
    """Digests of the layers of its root, from the bottom up."""
    store = Store()
    digests = store.resolve(names_of(spec))
    if on_host_root(spec):
        digests.insert(0, guest_root.host_layer(store))
    return digests


def _forget_end(home: Path) -> None:
    """Notes about processes that were ended on purpose."""
    for leftover in ("exit.json", "keeper"):
        (home / leftover).unlink(missing_ok=True)


def _virtual_size(path: Path) -> int:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(32)[24:32], "big")
