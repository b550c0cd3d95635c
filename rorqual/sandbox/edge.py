"""One machine's share of a cluster: a pool whose leases are on disk, so that another process can take them over.

The process that runs an edge may be killed at any moment. Its sandboxes live on under their keepers, each lease is a
file in the edge's folder, and a command is known by its key; a new edge on the same folder adopts all of them, joins
the commands that still run and answers from the record those that ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rorqual import log
from rorqual.errors import SandboxError
from rorqual.sandbox import bases
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.errors import Gone, Unsupported
from rorqual.sandbox.home import all_homes
from rorqual.sandbox.lease import Lease
from rorqual.sandbox.pool import Pool, PoolStats, Template
from rorqual.sandbox.spec import Snapshot
from rorqual.sandbox.sweep import sweep
from rorqual.sandbox.threads import in_thread

_logger = log.get(__name__)

LOCK, LEASES = "edge.lock", "leases"
"""What an edge puts into its folder, beside its sandboxes."""
REACHABLE = {
    "commands": {"run"},
    "files": {"read", "write", "list", "stat", "exists", "mkdir", "move", "remove"},
}
"""What may be called from afar: plain values in, plain values out."""
PREDECESSOR_S = 30.0
"""How long a new edge waits for the old one, which may still be dying, to let go of the folder."""


@dataclass(frozen=True)
class LeaseRecord:
    """A lease as it lies on disk: with a live sandbox, or with the snapshot that is left of it.

    kept: name of the snapshot to drop when the lease ends.
    """

    name: str
    sandbox_id: str | None
    snapshot: Mapping[str, Any] | None
    kind: str
    arguments: Mapping[str, Any]
    priority: int
    owner: str
    kept: str | None


@dataclass
class _Making:
    """A lease on its way, and how many wait for it."""

    task: asyncio.Task[None]
    askers: int = 0

    def stop(self) -> None:
        """Make it no further; asked once, since a second request would break off the clearing up."""
        if not self.task.cancelling():
            self.task.cancel()


class Edge:
    """A pool with durable leases in `folder`. One process at a time per folder.

    The first call of any method takes over what an earlier edge left there and fills the warm places.
    capacity, warm, max_waiting: as in `Pool`.
    """

    def __init__(
        self, folder: Path, *, capacity: int = 8, warm: Mapping[Template, int] | None = None, max_waiting: int = 256
    ) -> None:
        self._folder = Path(folder)
        self._records = self._folder / LEASES
        self._records.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._pool = Pool(
            capacity=capacity, warm=warm, max_waiting=max_waiting, maker=self._make, on_change=self._record
        )
        self._leases: dict[str, Lease] = {}
        self._making: dict[str, _Making] = {}
        self._adopting = asyncio.Lock()
        self._is_ready = False
        self._lock: int | None = None

    async def start(self) -> int:
        """Adopt and fill, once; returns how many leases there are."""
        async with self._adopting:
            if not self._is_ready:
                await self._take_over()
                await self._pool.start()
                self._is_ready = True
        return len(self._leases)

    def process(self) -> int:
        """Number of the process that runs it."""
        return os.getpid()

    async def lease(
        self, name: str, template: Template, *, priority: int = 0, owner: str = "", timeout: float | None = None
    ) -> None:
        """A lease called `name`; asking again for one that is there, or is being made, makes no other.

        When all who ask for it are cancelled, or `end` is called meanwhile, it is not made.
        Raises: CapacityRejected; Gone when it was ended meanwhile; SandboxError.
        """
        await self.start()
        if name in self._leases:
            return
        making = self._making.get(name)
        if making is None:
            keywords = {"priority": priority, "owner": owner, "timeout": timeout, "name": name}
            making = self._making[name] = _Making(asyncio.ensure_future(self._lend(name, template, keywords)))
            making.task.add_done_callback(lambda _: self._making.pop(name, None))
        making.askers += 1
        try:
            await asyncio.wait({making.task})
        finally:
            making.askers -= 1
            if not making.askers:
                making.stop()
        if making.task.cancelled():
            raise Gone(f"lease {name} was ended while it was made.", "closed")
        making.task.result()

    async def do(self, name: str, room: str, method: str, *args: Any, **keywords: Any) -> Any:
        """Call `sandbox.<room>.<method>` of a lease. Raises: Gone for an unknown one, Unsupported for other methods."""
        if method not in REACHABLE.get(room, ()):
            raise Unsupported(f"{room}.{method} cannot be called from another machine.", "remote")
        async with (await self._lease(name)).working() as sandbox:
            return await getattr(getattr(sandbox, room), method)(*args, **keywords)

    async def snapshot(self, name: str) -> str:
        """A disk snapshot of a lease in the layer store; its id."""
        async with (await self._lease(name)).working() as sandbox:
            return (await sandbox.snapshot("disk")).id

    async def end(self, name: str) -> None:
        """Destroy a lease; one that is gone already is no error."""
        await self.start()
        making = self._making.get(name)
        if making is not None:
            making.stop()
            await asyncio.wait({making.task})
        lease = self._leases.get(name)
        if lease is not None:
            await lease.close()
            self._leases.pop(name, None)
        self._path(name).unlink(missing_ok=True)

    async def stats(self) -> PoolStats:
        """As `Pool.stats`."""
        await self.start()
        return self._pool.stats()

    async def close(self) -> None:
        """End every lease and every warm sandbox, also an earlier edge's, and remove the folder."""
        async with self._adopting:
            if not self._is_ready:
                await self._take_over()
                self._is_ready = True
        for name in [*self._making, *self._leases]:
            await self.end(name)
        await self._pool.close()
        if self._lock is not None:
            await asyncio.to_thread(_remove, self._folder)
            os.close(self._lock)
            self._lock = None

    async def _lend(self, name: str, template: Template, keywords: Mapping[str, Any]) -> None:
        """Make the lease that `lease` asked for."""
        try:
            self._leases[name] = await self._pool.lease(template, **keywords)
        except BaseException:
            self._path(name).unlink(missing_ok=True)  # it may have been written down already
            raise

    async def _lease(self, name: str) -> Lease:
        await self.start()
        lease = self._leases.get(name)
        if lease is None:
            raise Gone(f"there is no lease {name} here: it was closed.", "closed")
        return lease

    async def _make(self, **keywords: Any) -> AsyncSandbox:
        return await AsyncSandbox.create(home=self._folder, **keywords)

    async def _take_over(self) -> None:
        """Become the folder's one edge and adopt what is in it; after a failure the next call can try again."""
        if self._lock is None:
            await self._take_folder()
        await self._adopt()

    async def _take_folder(self) -> None:
        """Become the folder's one edge, and clear up after edges of clusters that are no more."""
        end = time.monotonic() + PREDECESSOR_S
        while (lock := _lock(self._folder)) is None:
            if time.monotonic() > end:
                raise SandboxError(
                    f"another process is the edge of {self._folder}. Give each edge a folder of its own."
                )
            await asyncio.sleep(0.05)
        self._lock = lock
        bases.register(self._folder)
        await asyncio.to_thread(_clear_up, self._folder)

    async def _adopt(self) -> None:
        """Take over the leases on disk; what nobody holds (warm sandboxes, half-made ones) is ended."""
        kept: set[str] = set()
        for path in sorted(self._records.glob("*.json")):
            record = LeaseRecord(**json.loads(path.read_text()))
            if record.name in self._leases:  # adopted by a try that failed later
                kept.update(filter(None, [self._leases[record.name].sandbox_id]))
                continue
            sandbox = None
            try:
                if record.sandbox_id is not None:
                    sandbox = await AsyncSandbox.connect(record.sandbox_id, takeover=True, home=self._folder)
                    kept.add(record.sandbox_id)
            except Gone as error:
                _logger.warning("lease %s lost its sandbox while nobody looked: %s", record.name, error)
            lease = await self._pool.adopt(
                Template.of(record.kind, **record.arguments),
                sandbox,
                priority=record.priority,
                owner=record.owner,
                aside=None if record.snapshot is None else Snapshot(**record.snapshot),
                name=record.name,
            )
            lease.kept = record.kept
            self._leases[record.name] = lease
        for home in all_homes(self._folder):
            if home.id not in kept:
                await AsyncSandbox.end(home.id, home=self._folder)
        await asyncio.to_thread(sweep, self._folder)

    async def _record(self, lease: Lease) -> None:
        template = lease.template.keywords()
        record = LeaseRecord(
            name=lease.name,
            sandbox_id=lease.sandbox_id,
            snapshot=None if lease.aside is None else asdict(lease.aside),
            kind=template.pop("kind"),
            arguments=template,
            priority=lease.priority,
            owner=lease.owner,
            kept=lease.kept,
        )
        text = json.dumps(asdict(record))
        await in_thread(_write_durably, self._path(lease.name), text, undo=lambda _: None)  # whoever is next sees it

    def _path(self, name: str) -> Path:
        return self._records / f"{name}.json"


def _write_durably(path: Path, text: str) -> None:
    """Whole or not at all, also after a power cut. Raises: SandboxError when the disk refuses."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SandboxError(
            f"the lease could not be written to {path}: {error}. Free some space and try again."
        ) from error


def _lock(folder: Path) -> int | None:
    """The lock of an edge's folder, which the kernel frees when the edge dies; None while another one has it."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except OSError:
        os.close(lock)
        return None


def _clear_up(folder: Path) -> None:
    """Remove folders beside this one whose edge and sandboxes are dead: node names differ from cluster to cluster."""
    for other in folder.parent.iterdir():
        if other == folder or not (other / LOCK).is_file():
            continue
        with contextlib.suppress(OSError):
            lock = _lock(other)
            if lock is None:
                continue
            try:
                sweep(other)
                if not all_homes(other) and not any((other / LEASES).glob("*.json")):
                    _remove(other)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    """Remove what an edge made in its folder, and the folder when nothing else is in it."""
    for name in (LEASES, "sandboxes"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
    bases.forget(folder)
