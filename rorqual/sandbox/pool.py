"""A pool of sandboxes on one machine: warm ones ready to hand out, a bound on how many run, and who goes first.

At most `capacity` leased sandboxes are awake at once; further requests wait (see `places.py`), and beyond `max_waiting`
they are refused with the time after which to try again. A request of higher priority takes the place of an idle lease
of lower priority: its state is put aside (memory where the driver can, else files), and its next use waits for a place
and wakes it. Warm sandboxes (`warm.py`) come on top of `capacity`.

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
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.lease import Lease
from rorqual.sandbox.places import Places
from rorqual.sandbox.spec import Snapshot
from rorqual.sandbox.warm import LOOK_S, Template, Warm

__all__ = ["Pool", "PoolStats", "Template"]

_logger = log.get(__name__)

Maker = Callable[..., Awaitable[AsyncSandbox]]


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
        self._warm = Warm(warm or {}, self._make)
        self._leases: set[Lease] = set()
        self._work: set[asyncio.Future[Any]] = set()  # finished, not broken off, when the pool closes
        self._watch: asyncio.Task[None] | None = None
        self._counts: Counter[str] = Counter()
        self._open = True

    async def start(self) -> Pool:
        """Fill the warm places; returns once they are full. Raises: SandboxError for a template that cannot be made."""
        try:
            await self._warm.start()
        except BaseException:
            await self.close()
            raise
        self._watch = asyncio.get_running_loop().create_task(self._look_after())
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
        lease = Lease(self, template, priority, owner, name)
        lease.has_place = True
        self._leases.add(lease)
        try:
            lease.sandbox = await self._hand_out(template)
            lease.check_open()  # the pool may have been closed meanwhile
            await self._changed(lease)
        except BaseException:
            await lease.close()
            raise
        return lease

    async def adopt(
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
        lease = Lease(self, template, priority, owner, name)
        lease.sandbox, lease.aside = sandbox, aside
        lease.has_place = sandbox is not None and (await sandbox.info()).state != "paused"
        if lease.has_place:
            self._places.add(owner)
        self._leases.add(lease)
        return lease

    def stats(self) -> PoolStats:
        """How full the pool is, and what it did so far."""
        awake = sum(lease.has_place for lease in self._leases)
        return PoolStats(
            awake=awake,
            put_aside=len(self._leases) - awake,
            waiting=len(self._places.waiting),
            warm=len(self._warm),
            made=self._counts["made"],
            handed_out_warm=self._warm.counts["handed out"],
            replaced=self._warm.counts["replaced"] + self._counts["replaced"],
            preempted=self._counts["preempted"],
            refused=self._places.refused,
        )

    async def close(self) -> None:
        """End every sandbox of the pool; whoever waits, or is being served, gets Gone. May be called again."""
        self._open = False
        self._places.close()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        ends = list(await asyncio.gather(self._warm.close(), return_exceptions=True))
        while self._work:
            await asyncio.gather(*self._work, return_exceptions=True)
        ends += await asyncio.gather(*(lease.close() for lease in list(self._leases)), return_exceptions=True)
        failed = [end for end in ends if isinstance(end, BaseException)]
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
        if not self._open:
            return
        leaving = sum(lease.is_leaving for lease in self._leases)
        for ticket in self._places.waiting[leaving:]:
            victim = self._victim(ticket.priority)
            if victim is None:
                return
            victim.is_leaving = True
            self._in_background(self._put_aside(victim))

    async def wake(self, lease: Lease) -> AsyncSandbox:
        """The sandbox of `lease`; one that was put aside waits for a place first. Raises: Gone, CapacityRejected."""
        lease.check_open()
        if not lease.has_place:
            await self._places.take(lease.priority, lease.owner)
            lease.has_place = True
            try:
                lease.check_open()
                await self._bring_back(lease)
            except BaseException:
                self._free(lease)
                raise
        elif lease.sandbox is None and lease.aside is not None:  # leaving failed half-way
            await self._bring_back(lease)
        if lease.sandbox is None:
            raise Gone("the sandbox of this lease is gone; `await lease.replace()` makes another.", "crashed")
        return lease.sandbox

    async def replace(self, lease: Lease, snapshot: str | None) -> None:
        """Another sandbox for `lease`, from `snapshot` or as new."""
        lease.check_open()
        if not lease.has_place:
            await self._places.take(lease.priority, lease.owner)
            lease.has_place = True
            lease.check_open()
        old, lease.sandbox = lease.sandbox, None
        if old is not None:
            await self.end_sandbox(old)
        made = self._hand_out(lease.template) if snapshot is None else self._make(lease.template, snapshot=snapshot)
        lease.sandbox, lease.aside = await made, None
        self._counts["replaced"] += 1
        await self._changed(lease)

    async def end(self, lease: Lease) -> None:
        """Destroy the sandbox of a closed lease, drop what was put aside of it, and give its place back."""
        try:
            if lease.sandbox is not None:
                await self.end_sandbox(lease.sandbox)
                lease.sandbox = None
            if lease.kept is not None:
                await asyncio.to_thread(_forget, lease.kept)
                lease.aside = lease.kept = None
        finally:
            self._leases.discard(lease)
            self._free(lease, time.monotonic() - lease.since)

    async def end_sandbox(self, sandbox: AsyncSandbox) -> None:
        """Close a sandbox to the end, also when the caller is cancelled meanwhile."""
        await asyncio.shield(self._tracked(asyncio.ensure_future(sandbox.close())))

    # -- putting aside and waking -------------------------------------------------------------------------------------

    def _victim(self, priority: int) -> Lease | None:
        """The idle lease of lowest priority below `priority`; the one longest unused among equals."""
        idle = [lease for lease in self._leases if lease.priority < priority and lease.may_leave]
        return min(idle, key=lambda lease: (lease.priority, lease.last_use), default=None)

    async def _put_aside(self, lease: Lease) -> None:
        """Free the place of an idle lease and keep its state; one that cannot be kept stays, a dead one is dropped."""
        try:
            async with lease.turn:
                if lease.busy or lease.is_closed or not lease.has_place:
                    return
                try:
                    if lease.sandbox is not None:
                        await self._keep_state(lease, lease.sandbox)
                    self._counts["preempted"] += 1
                    self._free(lease)
                except Gone as error:
                    await self._lose(lease, error)
                except SandboxError as error:
                    lease.stays = True
                    _logger.warning("a lease keeps its place although others of higher priority wait: %s", error)
        finally:
            lease.is_leaving = False
            self.make_room()

    async def _keep_state(self, lease: Lease, sandbox: AsyncSandbox) -> None:
        await sandbox.ping()
        if (await sandbox.info()).capabilities.snapshot_memory:
            with contextlib.suppress(Unsupported):
                await sandbox.pause(keep_memory=False)
                return
        lease.aside = await sandbox.snapshot("disk", name=f"aside-{sandbox.id}")
        before, lease.kept, lease.sandbox = lease.kept, lease.aside.id, None
        try:
            await self._changed(lease)  # before the sandbox goes, so that the one on record or its snapshot is there
        except BaseException:
            lease.aside, lease.kept, lease.sandbox = None, before, sandbox
            raise
        await self.end_sandbox(sandbox)
        if before not in (None, lease.kept):
            await asyncio.to_thread(_forget, before)

    async def _bring_back(self, lease: Lease) -> None:
        if lease.aside is not None:
            lease.sandbox = await self._make(lease.template, snapshot=lease.aside.id)
            lease.aside = None
            lease.restored += 1
            await self._changed(lease)
        elif lease.sandbox is not None:
            await lease.sandbox.resume()

    def _free(self, lease: Lease, held_s: float | None = None) -> None:
        if lease.has_place:
            lease.has_place = False
            self._places.give_back(lease.owner, held_s)

    async def _lose(self, lease: Lease, error: Gone) -> None:
        """Its sandbox died: the place is free, and the next use says so."""
        _logger.warning("a lease lost its sandbox: %s", error)
        sandbox, lease.sandbox = lease.sandbox, None
        self._free(lease)
        if sandbox is not None:
            with contextlib.suppress(SandboxError):
                await self.end_sandbox(sandbox)
        await self._changed(lease)

    async def _changed(self, lease: Lease) -> None:
        if self._on_change is not None:
            await self._on_change(lease)

    async def look(self) -> None:
        """Free the places of idle leases whose sandbox died, or outlived its times."""
        for lease in list(self._leases):
            sandbox = lease.sandbox
            if sandbox is None or not lease.may_leave:
                continue
            try:
                await sandbox.ping()
            except Gone as error:
                async with lease.turn:
                    if lease.sandbox is sandbox and not lease.busy:
                        await self._lose(lease, error)
            except SandboxError:
                continue  # paused by its user, or it does not answer now

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    # -- making -------------------------------------------------------------------------------------------------------

    async def _hand_out(self, template: Template) -> AsyncSandbox:
        """A warm sandbox that answers, else a new one."""
        return await self._warm.take(template) or await self._make(template)

    async def _make(self, template: Template, **more: Any) -> AsyncSandbox:
        making = self._tracked(asyncio.get_running_loop().create_future())
        try:
            below = () if more.get("snapshot") is None else ("image", "layers")  # a snapshot has them in it
            keywords = {name: value for name, value in template.keywords().items() if name not in below}
            sandbox = await self._maker(**(keywords | more))
        finally:
            making.cancel()
        self._counts["made"] += 1
        if not self._open:
            await self.end_sandbox(sandbox)
            raise Gone("this pool was closed while a sandbox was made for it.", "closed")
        return sandbox

    def _tracked(self, work: asyncio.Future[Any]) -> asyncio.Future[Any]:
        self._work.add(work)
        work.add_done_callback(self._work.discard)
        return work

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        self._tracked(asyncio.get_running_loop().create_task(work)).add_done_callback(_say_failure)


def _say_failure(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _logger.warning("the pool could not do its housekeeping: %s", error)


def _forget(name: str) -> None:
    """Drop the name of a snapshot; its layers are collected later."""
    with contextlib.suppress(SandboxError):
        Store().forget(name)
