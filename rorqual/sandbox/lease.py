"""The right to one sandbox of a pool, which may be put aside while nobody uses it and is woken by the next use."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rorqual.sandbox.errors import Gone
from rorqual.sandbox.spec import CommandResult, Snapshot

if TYPE_CHECKING:
    from rorqual.sandbox.async_sandbox import AsyncSandbox
    from rorqual.sandbox.pool import Pool, Template


class Lease:
    """One sandbox for one task; `async with lease.working() as sandbox` wakes it and keeps it awake meanwhile.

    priority, owner: its place in the order. name: what the caller calls it. restored: how often it was woken from its
    files alone, so that what ran in the background was gone. has_place: whether it counts as awake. aside: what it
    will be woken from. kept: name of the last snapshot the pool made of it. The rest is between it and the pool.
    """

    def __init__(self, pool: Pool, template: Template, priority: int, owner: str, name: str = "") -> None:
        self.template, self.priority, self.owner, self.name = template, priority, owner, name
        self.restored = 0
        self.has_place = False
        self.sandbox: AsyncSandbox | None = None
        self.aside: Snapshot | None = None
        self.kept: str | None = None
        self.busy = 0
        self.is_leaving = False
        self.stays = False  # its state cannot be kept, so it is not asked to leave again
        self.is_closed = False
        self.since = self.last_use = time.monotonic()
        self.turn = asyncio.Lock()
        self._pool = pool

    @property
    def sandbox_id(self) -> str | None:
        """The sandbox's id, or None while only a snapshot of it is kept."""
        return None if self.sandbox is None else self.sandbox.id

    @property
    def may_leave(self) -> bool:
        """Whether its place could go to another: nobody uses it now."""
        return self.has_place and not (self.busy or self.is_leaving or self.stays or self.is_closed)

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[AsyncSandbox]:
        """The sandbox, awake until the block ends. Raises: Gone after `close` or when it died; CapacityRejected."""
        self.busy += 1  # from now on it may not be put aside
        try:
            async with self.turn:
                sandbox = await self._pool.wake(self)
            yield sandbox
        finally:
            self.busy -= 1
            self.stays = False
            self.last_use = time.monotonic()
            self._pool.make_room()

    async def run(self, command: str | list[str], **keywords: Any) -> CommandResult:
        """`commands.run` in the sandbox, woken if need be."""
        async with self.working() as sandbox:
            return await sandbox.commands.run(command, **keywords)

    async def replace(self, snapshot: str | None = None) -> None:
        """A new sandbox in the place of a dead one: from `snapshot`, or as the template has it. Raises: Gone."""
        async with self.turn:
            await self._pool.replace(self, snapshot)

    async def close(self) -> None:
        """Give the place back; the sandbox is destroyed, never handed to another task. May be called again.

        Raises: SandboxError listing what could not be removed.
        """
        self.is_closed = True
        async with self.turn:
            await self._pool.end(self)

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def check_open(self) -> None:
        """Raises: Gone after `close`."""
        if self.is_closed:
            raise Gone("this lease was closed; ask the pool for another.", "closed")
