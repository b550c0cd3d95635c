"""Virtual machines by QEMU: small ones (`microvm` or `pc` board) and full ones (`q35`), with KVM or emulated.

Isolates: the sandbox has a kernel of its own; what it could attack is QEMU, which runs in its own namespaces, without
capabilities, under a uid of its own when root starts it, with a system call filter. With KVM this is "vm-hw", emulated
(TCG) "vm-emulated": slower by about ten, and a larger program to trust, but it needs nothing of the machine.
Does not isolate: processor side channels between machines on one core. No network, no host folder, no shared memory.

The first machine of a shape (kernel, layers, memory, processors, disk) boots and is saved as a template; all later ones
start from it.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rorqual.errors import SandboxError
from rorqual.folders import cache_folder
from rorqual.sandbox import processes
from rorqual.sandbox.channel import Channel
from rorqual.sandbox.drivers.base import Driver, Running
from rorqual.sandbox.drivers.bwrap import pss, tree_of
from rorqual.sandbox.drivers.streams import connect_unix
from rorqual.sandbox.errors import TransportError, Unsupported
from rorqual.sandbox.home import Home
from rorqual.sandbox.images.intake import add_tar
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.link import provision_fields
from rorqual.sandbox.snapshots import names_of, on_host_root
from rorqual.sandbox.spec import Capabilities, Isolation, Kind, SandboxSpec
from rorqual.sandbox.vm import boot, guest_root, kernel, qcow2, saved, share, snapshot, template
from rorqual.sandbox.vm.control import Control
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
from rorqual.sandbox.vm.qmp import QMP
from rorqual.sandbox.wire import Tag, Type, Value

BOOT_S = {"kvm": 8.0, "tcg": 120.0}
"""With KVM a boot takes a second where it works, and never ends where /dev/kvm is not what it seems."""
LOAD_S = 30.0
SETTLE_S = 5.0
"""How long a monitor may take to answer a client that has just come."""


class Qemu(Driver):
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
                return f"with KVM no guest booted ({_hung().read_text()}); remove {_hung()} to try again"
        return kernel.missing() or template.missing() or guest_root.missing()

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
        layers = await asyncio.to_thread(layers_of, spec)
        machine, digests = await asyncio.to_thread(self._machine, spec, home, layers)
        with snapshot.reading(full) if full is not None else nullcontext():
            if full is not None:
                await asyncio.to_thread(snapshot.check, full, fingerprint(machine, *digests))
                await asyncio.to_thread(snapshot.verify, full)
                state, parents = full.folder / "state", [full.folder / name for name in full.disks]
                disk_mb, secret = full.disk_mb, full.secret
            else:
                made = await self._template(machine, digests, spec)
                machine = replace(machine, memory=made.memory)
                state, parents, disk_mb, secret = made.state, [made.disk], spec.limits.disk_mb, ""
            running = await self._launch(machine, spec, home, state, parents, disk_mb)
        running.extra |= {"fingerprint": fingerprint(machine, *digests), "layers": layers}
        try:
            await self._personalise(running, spec, home, secret)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(boot.end, running.processes, running.cgroups))
            raise
        return running

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

    async def _personalise(self, running: Running, spec: SandboxSpec, home: Path, secret: str) -> None:
        """Give a machine that was loaded what no other copy has, before any command runs in it.

        secret: the key of a restored sandbox's agent; empty for a template's, which belongs to nobody yet.
        """
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

    async def oom_kills(self, running: Running, home: Path) -> int:
        """How many processes the guest's kernel ended for memory."""
        async with await self._control(home) as control:
            return await control.number("oom")

    async def memory_bytes(self, running: Running) -> int:
        """The proportional share of QEMU and its keeper."""
        return await asyncio.to_thread(lambda: sum(pss(process.pid) for process in tree_of(running)))

    async def _control(self, home: Path) -> Control:
        return await Control.open(home / "vm")

    async def _monitor(self, home: Path) -> QMP:
        return await boot.monitor(home / "vm", home, boot.MONITOR_WAIT_S)


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


def fresh_identity(name: str) -> list[tuple[Tag, Value]]:
    """What two copies of one memory must not share: random numbers, names, the time."""
    return [
        (Tag.ENTROPY, secrets.token_bytes(256)),
        (Tag.TIME_US, time.time_ns() // 1000),
        (Tag.HOSTNAME, name[:63]),
        (Tag.TEXT, secrets.token_hex(16)),
    ]


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


def _full_snapshot(spec: SandboxSpec) -> snapshot.Manifest | None:
    """The full snapshot that `spec.snapshot` names, itself or through a name in the store."""
    if spec.snapshot is None:
        return None
    found = Store().reference(spec.snapshot)
    identity = found.note.get("full", "") if found is not None else spec.snapshot
    return snapshot.read(identity) if identity.startswith("full-") else None


def _virtual_size(path: Path) -> int:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(32)[24:32], "big")
