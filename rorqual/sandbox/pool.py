"""A pool of sandboxes on one machine: warm ones ready to hand out, a bound on how many run, and who goes first.

At most `capacity` leased sandboxes are awake at once; further requests wait (see `places.py`), and beyond `max_waiting`
they are refused with the time after which to try again. A request of higher priority takes the place of an idle lease
of lower priority: its state is put aside (memory where the driver can, else files), and its next use waits for a place
and wakes it. Warm sandboxes come on top of `capacity`.

Source: V4 report, section 5.2.5 (preemption, density); docs/sandbox.md says where this differs from DSec.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rorqual import log
from rorqual.errors import SandboxError
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.errors import Gone, Unsupported
from rorqual.sandbox.lease import Lease
from rorqual.sandbox.places import Places
from rorqual.sandbox.spec import Snapshot

_logger = log.get(__name__)

Maker = Callable[..., Awaitable[AsyncSandbox]]
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 30.0
"""Between tries to make a warm sandbox where it fails."""


@dataclass(frozen=True)
class Template:
    """What a pool makes sandboxes of: a kind and further arguments of `Sandbox.create`, as sorted pairs."""

    kind: str = "container"
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, kind: str = "container", **arguments: Any) -> Template:
        """The template for these arguments of `Sandbox.create`; equal arguments give equal templates."""
        return cls(kind, tuple(sorted((name, _frozen(value)) for name, value in arguments.items())))

    def keywords(self) -> dict[str, Any]:
        """The arguments for `Sandbox.create`."""
        return {"kind": self.kind} | {name: _thawed(value) for name, value in self.arguments}


@dataclass(frozen=True)
class PoolStats:
    """A look at a pool: leases awake and put aside, requests waiting, warm sandboxes; and counts since its start."""

    awake: int
    put_aside: int
    waiting: int
    warm: int
    made: int
    handed_out_warm: int
    replaced: int
    preempted: int
    refused: int


class Pool:
    """Sandboxes for many tasks on this machine; see the module's text for the order in which they get them.

    capacity: leased sandboxes awake at once. warm: how many of each template to keep ready besides.
    max_waiting: requests that may wait. maker: makes a sandbox from keywords (`AsyncSandbox.create`).
    on_change: awaited whenever a lease got a sandbox, lost it, or was put aside, before anyone can use what is new.
    """

    def __init__(
        self,
        *,
        capacity: int = 8,
        warm: Mapping[Template, int] | None = None,
        max_waiting: int = 256,
        maker: Maker = AsyncSandbox.create,
        on_change: Callable[[Lease], Awaitable[None]] | None = None,
    ) -> None:
        self._places = Places(capacity, max_waiting, self.make_room)
        self._maker, self._on_change = maker, on_change
        self._wanted = dict(warm or {})
        self._ready: dict[Template, list[AsyncSandbox]] = {template: [] for template in self._wanted}
        self._leases: set[Lease] = set()
        self._filling: set[Template] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()
        self._open = True

    async def start(self) -> Pool:
        """Fill the warm places; returns once they are full. Raises: SandboxError for a template that cannot be made."""
        try:
            for template, count in self._wanted.items():
                while len(self._ready[template]) < count:
                    self._ready[template].append(await self._make(template))
        except BaseException:
            await self.close()
            raise
        return self

    async def lease(
        self,
        template: Template | str = "container",
        *,
        priority: int = 0,
        owner: str = "",
        timeout: float | None = None,
        name: str = "",
    ) -> Lease:
        """A sandbox of `template`: a warm one where there is one, else a new one.

        priority: higher goes first and may put idle leases of lower priority aside. owner: whose turn it counts as.
        timeout: seconds to wait for a place. Raises: CapacityRejected when too many wait or the time is over; Gone.
        """
        template = template if isinstance(template, Template) else Template.of(template)
        await self._places.take(priority, owner, timeout)
        try:
            lease = Lease(self, template, priority, owner, await self._hand_out(template), name=name)
        except BaseException:
            self._places.give_back(owner)
            raise
        self._leases.add(lease)
        await self._changed(lease)
        return lease

    def adopt(
        self,
        template: Template,
        sandbox: AsyncSandbox | None,
        *,
        priority: int = 0,
        owner: str = "",
        aside: Snapshot | None = None,
        name: str = "",
    ) -> Lease:
        """A lease on a sandbox that another process made, or on the snapshot that is left of it; nobody waits for it.

        It takes a place even when all are taken: the pool is then over its capacity until leases end.
        """
        lease = Lease(self, template, priority, owner, sandbox, aside, name)
        if lease.is_awake:
            self._places.add(owner)
        self._leases.add(lease)
        return lease

    def stats(self) -> PoolStats:
        """How full the pool is, and what it did so far."""
        awake = sum(lease.is_awake for lease in self._leases)
        return PoolStats(
            awake=awake,
            put_aside=len(self._leases) - awake,
            waiting=len(self._places.waiting),
            warm=sum(map(len, self._ready.values())),
            made=self._counts["made"],
            handed_out_warm=self._counts["warm"],
            replaced=self._counts["replaced"],
            preempted=self._counts["preempted"],
            refused=self._places.refused,
        )

    async def close(self) -> None:
        """End every sandbox of the pool; whoever waits gets Gone. May be called again."""
        self._open = False
        self._places.close()
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        spare = [sandbox for ready in self._ready.values() for sandbox in ready]
        self._ready = {template: [] for template in self._wanted}
        ends = [lease.close() for lease in list(self._leases)] + [sandbox.close() for sandbox in spare]
        failed = [end for end in await asyncio.gather(*ends, return_exceptions=True) if isinstance(end, BaseException)]
        if failed:
            raise failed[0]

    async def __aenter__(self) -> Pool:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- for leases ---------------------------------------------------------------------------------------------------

    def make_room(self) -> None:
        """Put idle leases aside for those of higher priority who wait, one for each."""
        leaving = sum(lease._leaving for lease in self._leases)
        for ticket in self._places.waiting[leaving:]:
            victim = self._victim(ticket.priority)
            if victim is None:
                return
            victim._leaving = True
            self._in_background(self._put_aside(victim))

    async def wake(self, lease: Lease) -> AsyncSandbox:
        """The sandbox of `lease`; one that was put aside waits for a place first. Raises: Gone, CapacityRejected."""
        lease._check_open()
        if not lease.is_awake:
            await self._places.take(lease.priority, lease.owner)
            try:
                await self._bring_back(lease)
            except BaseException:
                self._places.give_back(lease.owner)
                raise
        if lease._sandbox is None:
            raise Gone("the sandbox of this lease is gone; `await lease.replace()` makes another.", "crashed")
        return lease._sandbox

    async def replace(self, lease: Lease, snapshot: str | None) -> None:
        """Another sandbox for `lease`, from `snapshot` or as new."""
        lease._check_open()
        if not lease.is_awake:
            await self._places.take(lease.priority, lease.owner)
            lease._aside, lease._in_memory = None, False
        old, lease._sandbox = lease._sandbox, None
        if old is not None:
            await old.close()
        made = self._hand_out(lease.template) if snapshot is None else self._make(lease.template, snapshot=snapshot)
        lease._sandbox = await made
        self._counts["replaced"] += 1
        await self._changed(lease)

    async def end(self, lease: Lease) -> None:
        """Destroy the sandbox of a closed lease and give its place back."""
        self._leases.discard(lease)
        held_place, sandbox = lease.is_awake, lease._sandbox
        lease._sandbox = None
        try:
            if sandbox is not None:
                await sandbox.close()
        finally:
            if held_place:
                self._places.give_back(lease.owner, time.monotonic() - lease._since)

    # -- putting aside and waking -------------------------------------------------------------------------------------

    def _victim(self, priority: int) -> Lease | None:
        """The idle lease of lowest priority below `priority`; the one longest unused among equals."""
        idle = [
            lease
            for lease in self._leases
            if lease.priority < priority
            and lease.is_awake
            and not (lease._busy or lease._leaving or lease._stays or lease._closed)
        ]
        return min(idle, key=lambda lease: (lease.priority, lease._last_use), default=None)

    async def _put_aside(self, lease: Lease) -> None:
        """Free the place of an idle lease and keep its state."""
        try:
            async with lease._turn:
                if lease._busy or lease._closed or lease._sandbox is None:
                    return
                try:
                    await self._keep_state(lease, lease._sandbox)
                except Unsupported as error:
                    lease._stays = True
                    _logger.info("a lease keeps its place although others of higher priority wait: %s", error)
                    return
                self._counts["preempted"] += 1
                self._places.give_back(lease.owner)
        finally:
            lease._leaving = False
            self.make_room()

    async def _keep_state(self, lease: Lease, sandbox: AsyncSandbox) -> None:
        if (await sandbox.info()).capabilities.snapshot_memory:
            await sandbox.pause(keep_memory=False)
            lease._in_memory = True
            return
        lease._aside = await sandbox.snapshot("disk")
        lease._sandbox = None
        await self._changed(lease)  # before the sandbox goes, so that the one on record or its snapshot is there
        await sandbox.close()

    async def _bring_back(self, lease: Lease) -> None:
        if lease._aside is not None:
            lease._sandbox = await self._make(lease.template, snapshot=lease._aside.id)
            lease._aside = None
            lease.restored += 1
            await self._changed(lease)
        elif lease._sandbox is not None:
            await lease._sandbox.resume()
        lease._in_memory = False

    async def _changed(self, lease: Lease) -> None:
        if self._on_change is not None:
            await self._on_change(lease)

    # -- warm sandboxes -----------------------------------------------------------------------------------------------

    async def _hand_out(self, template: Template) -> AsyncSandbox:
        """A warm sandbox that answers, else a new one; dead ones are cleared away and replaced."""
        ready = self._ready.get(template, [])
        while ready:
            sandbox = ready.pop(0)
            self._refill(template)
            if await self._answers(sandbox):
                self._counts["warm"] += 1
                return sandbox
            self._counts["replaced"] += 1
        return await self._make(template)

    async def _answers(self, sandbox: AsyncSandbox) -> bool:
        """Whether it still runs; one that does not is cleared away."""
        try:
            await asyncio.wait_for(sandbox.ping(), 5)
            return True
        except (SandboxError, TimeoutError) as error:
            _logger.warning("a warm sandbox no longer answers and is replaced: %s", error)
            with contextlib.suppress(SandboxError):
                await sandbox.close()
            return False

    async def _make(self, template: Template, **more: Any) -> AsyncSandbox:
        sandbox = await self._maker(**(template.keywords() | more))
        self._counts["made"] += 1
        return sandbox

    def _refill(self, template: Template) -> None:
        if self._open and template not in self._filling:
            self._filling.add(template)
            self._in_background(self._fill(template))

    async def _fill(self, template: Template) -> None:
        """Make warm sandboxes until there are as many as wanted, one after the other."""
        wait_s = FIRST_WAIT_S
        try:
            while self._open and len(self._ready[template]) < self._wanted[template]:
                try:
                    self._ready[template].append(await self._make(template))
                    wait_s = FIRST_WAIT_S
                except SandboxError as error:
                    _logger.warning(
                        "no warm %s sandbox could be made, again in %.1f s: %s", template.kind, wait_s, error
                    )
                    await asyncio.sleep(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        finally:
            self._filling.discard(template)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.warning("the pool could not do its housekeeping: %s", error)


def _frozen(value: Any) -> Any:
    """A hashable form of an argument: mappings as pairs behind a mark, sequences as tuples."""
    if isinstance(value, Mapping):
        return ("mapping", tuple(sorted((key, _frozen(item)) for key, item in value.items())))
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "mapping":
        return {key: _thawed(item) for key, item in value[1]}
    return value
