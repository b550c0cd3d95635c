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
    files alone, so that what ran in the background was gone. Everything else belongs to the pool.
    """

    def __init__(
        self,
        pool: Pool,
        template: Template,
        priority: int,
        owner: str,
        sandbox: AsyncSandbox | None,
        aside: Snapshot | None = None,
        name: str = "",
    ) -> None:
        self.template, self.priority, self.owner, self.name = template, priority, owner, name
        self.restored = 0
        self._pool = pool
        self._sandbox: AsyncSandbox | None = sandbox
        self._aside = aside
        self._in_memory = False
        self._busy = 0
        self._leaving = False
        self._stays = False  # its driver can keep neither memory nor files
        self._closed = False
        self._since = self._last_use = time.monotonic()
        self._turn = asyncio.Lock()

    @property
    def is_awake(self) -> bool:
        """Whether it holds a place."""
        return self._aside is None and not self._in_memory

    @property
    def sandbox_id(self) -> str | None:
        """The sandbox's id, or None while only a snapshot of it is kept."""
        return None if self._sandbox is None else self._sandbox.id

    @property
    def snapshot(self) -> Snapshot | None:
        """What it will be woken from, while its files are put aside."""
        return self._aside

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[AsyncSandbox]:
        """The sandbox, awake until the block ends. Raises: Gone after `close` or when it died; CapacityRejected."""
        self._busy += 1  # from now on it may not be put aside
        try:
            async with self._turn:
                sandbox = await self._pool.wake(self)
            yield sandbox
        finally:
            self._busy -= 1
            self._last_use = time.monotonic()
            self._pool.make_room()

    async def run(self, command: str | list[str], **keywords: Any) -> CommandResult:
        """`commands.run` in the sandbox, woken if need be."""
        async with self.working() as sandbox:
            return await sandbox.commands.run(command, **keywords)

    async def replace(self, snapshot: str | None = None) -> None:
        """A new sandbox in the place of a dead one: from `snapshot`, or as the template has it. Raises: Gone."""
        async with self._turn:
            await self._pool.replace(self, snapshot)

    async def close(self) -> None:
        """Give the place back; the sandbox is destroyed, never handed to another task. May be called again."""
        if self._closed:
            return
        self._closed = True
        async with self._turn:
            await self._pool.end(self)

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Gone("this lease was closed; ask the pool for another.", "closed")
