"""One machine's share of a cluster: a pool whose leases are on disk, so that another process can take them over.

The process that runs an edge may be killed at any moment. Its sandboxes live on under their keepers, each lease is a
file in the edge's folder, and a command is known by its key; a new edge on the same folder adopts all of them, joins
the commands that still run and answers from the record those that ended.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rorqual import log
from rorqual.errors import SandboxError
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.errors import Gone, Unsupported
from rorqual.sandbox.lease import Lease
from rorqual.sandbox.pool import Pool, PoolStats, Template
from rorqual.sandbox.spec import Snapshot

_logger = log.get(__name__)

REACHABLE = {
    "commands": {"run"},
    "files": {"read", "write", "list", "stat", "exists", "mkdir", "move", "remove"},
}
"""What may be called from afar: plain values in, plain values out."""


@dataclass(frozen=True)
class LeaseRecord:
    """A lease as it lies on disk: with a live sandbox, or with the snapshot that is left of it."""

    name: str
    sandbox_id: str | None
    snapshot: Mapping[str, Any] | None
    kind: str
    arguments: Mapping[str, Any]
    priority: int
    owner: str


class Edge:
    """A pool with durable leases in `folder`. One process at a time per folder.

    The first call of any method takes over what an earlier edge left there and fills the warm places.
    capacity, warm, max_waiting: as in `Pool`.
    """

    def __init__(
        self, folder: Path, *, capacity: int = 8, warm: Mapping[Template, int] | None = None, max_waiting: int = 256
    ) -> None:
        self._folder = Path(folder)
        self._records = self._folder / "leases"
        self._records.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._pool = Pool(
            capacity=capacity, warm=warm, max_waiting=max_waiting, maker=self._make, on_change=self._record
        )
        self._leases: dict[str, Lease] = {}
        self._adopting = asyncio.Lock()
        self._is_ready = False

    async def start(self) -> int:
        """Adopt and fill, once; returns how many leases there are."""
        async with self._adopting:
            if not self._is_ready:
                await self._adopt()
                await self._pool.start()
                self._is_ready = True
        return len(self._leases)

    async def lease(
        self, name: str, template: Template, *, priority: int = 0, owner: str = "", timeout: float | None = None
    ) -> None:
        """A lease called `name`; asking again for one that is there changes nothing.

        Raises: CapacityRejected; SandboxError.
        """
        await self.start()
        if name not in self._leases:
            self._leases[name] = await self._pool.lease(
                template, priority=priority, owner=owner, timeout=timeout, name=name
            )

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
        lease = self._leases.pop(name, None)
        if lease is not None:
            await lease.close()
        self._path(name).unlink(missing_ok=True)

    async def stats(self) -> PoolStats:
        """As `Pool.stats`."""
        await self.start()
        return self._pool.stats()

    async def close(self) -> None:
        """End every lease and every warm sandbox."""
        for name in list(self._leases):
            await self.end(name)
        await self._pool.close()

    async def _lease(self, name: str) -> Lease:
        await self.start()
        lease = self._leases.get(name)
        if lease is None:
            raise Gone(f"there is no lease {name} here: it was closed, or its sandbox died unobserved.", "unknown")
        return lease

    async def _make(self, **keywords: Any) -> AsyncSandbox:
        return await AsyncSandbox.create(home=self._folder, **keywords)

    async def _adopt(self) -> None:
        """Take over the leases on disk; what nobody holds (warm sandboxes, half-made ones) is ended."""
        kept: set[str] = set()
        for path in sorted(self._records.glob("*.json")):
            record = LeaseRecord(**json.loads(path.read_text()))
            aside = None if record.snapshot is None else Snapshot(**record.snapshot)
            try:
                sandbox = None
                if record.sandbox_id is not None:
                    sandbox = await AsyncSandbox.connect(record.sandbox_id, home=self._folder)
                    kept.add(record.sandbox_id)
            except Gone as error:
                _logger.warning("lease %s lost its sandbox while nobody looked: %s", record.name, error)
                path.unlink()
                continue
            self._leases[record.name] = self._pool.adopt(
                Template.of(record.kind, **record.arguments),
                sandbox,
                priority=record.priority,
                owner=record.owner,
                aside=aside,
                name=record.name,
            )
        for info in await AsyncSandbox.list(home=self._folder):
            if info.id not in kept:
                await (await AsyncSandbox.connect(info.id, home=self._folder)).close()

    async def _record(self, lease: Lease) -> None:
        template = lease.template.keywords()
        record = LeaseRecord(
            name=lease.name,
            sandbox_id=lease.sandbox_id,
            snapshot=None if lease.snapshot is None else asdict(lease.snapshot),
            kind=template.pop("kind"),
            arguments=template,
            priority=lease.priority,
            owner=lease.owner,
        )
        await asyncio.to_thread(_write_durably, self._path(lease.name), json.dumps(asdict(record)))

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
