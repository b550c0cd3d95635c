"""Who may run: a bounded number of places, and the order in which those who wait get them.

Higher priority first, then whoever's owner holds fewest places, then arrival. It knows nothing of sandboxes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from rorqual.sandbox.errors import CapacityRejected, Gone, SandboxError


@dataclass(eq=False)
class Ticket:
    """A request that waits for a place."""

    priority: int
    owner: str
    number: int
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Places:
    """`capacity` places and at most `max_waiting` requests for one.

    on_wait: called when a request has to wait, and whenever a place came free, so that the owner can make room.
    """

    def __init__(self, capacity: int, max_waiting: int, on_wait: Callable[[], None]) -> None:
        if capacity < 1 or max_waiting < 0:
            raise SandboxError(
                f"a pool of capacity {capacity} with {max_waiting} waiting cannot serve anyone. "
                "Give a capacity of at least 1 and max_waiting of at least 0."
            )
        self.capacity, self.max_waiting = capacity, max_waiting
        self._on_wait = on_wait
        self._held: Counter[str] = Counter()
        self._waiting: list[Ticket] = []
        self._numbers = itertools.count()
        self._held_s = 1.0
        self._closed = False
        self.refused = 0

    @property
    def taken(self) -> int:
        """Places in use."""
        return self._held.total()

    @property
    def waiting(self) -> list[Ticket]:
        """Who waits, the next one first."""
        return sorted(self._waiting, key=lambda ticket: (-ticket.priority, self._held[ticket.owner], ticket.number))

    async def take(self, priority: int, owner: str, timeout: float | None = None) -> None:
        """Wait for a place. Raises: CapacityRejected when too many wait or `timeout` seconds are over; Gone: closed."""
        if self._closed:
            raise Gone("this pool is closed; make another one.", "closed")
        if self.taken < self.capacity and not self._waiting:
            self._held[owner] += 1
            return
        if len(self._waiting) >= self.max_waiting:
            raise self._refusal(f"{self.capacity} sandboxes are in use and {len(self._waiting)} requests wait")
        ticket = Ticket(priority, owner, next(self._numbers))
        self._waiting.append(ticket)
        self._on_wait()
        try:
            await asyncio.wait_for(asyncio.shield(ticket.granted), timeout)
        except BaseException as error:
            self._leave(ticket)
            if isinstance(error, TimeoutError):
                raise self._refusal(f"no place among {self.capacity} came free within {timeout} s") from None
            raise

    def add(self, owner: str) -> None:
        """Take a place at once, above the capacity if need be."""
        self._held[owner] += 1

    def give_back(self, owner: str, held_s: float | None = None) -> None:
        """A place of `owner` is free again; `held_s`, how long it was held, teaches what to tell those refused."""
        self._held[owner] -= 1
        if held_s is not None:
            self._held_s += 0.2 * (held_s - self._held_s)
        self._grant()
        if self._waiting:
            self._on_wait()

    def close(self) -> None:
        """Nobody gets a place any more; those who wait get Gone."""
        self._closed = True
        for ticket in self._waiting:
            ticket.granted.set_exception(Gone("the pool was closed while this request waited.", "closed"))
        self._waiting.clear()

    def _grant(self) -> None:
        while self._waiting and self.taken < self.capacity:
            ticket = self.waiting[0]
            self._waiting.remove(ticket)
            self._held[ticket.owner] += 1
            ticket.granted.set_result(None)

    def _leave(self, ticket: Ticket) -> None:
        """It waits no longer; a place it was given in the same moment goes to the next."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            ticket.granted.cancel()
        elif not ticket.granted.cancelled() and ticket.granted.exception() is None:
            self.give_back(ticket.owner)

    def _refusal(self, why: str) -> CapacityRejected:
        self.refused += 1
        after = self._held_s * (len(self._waiting) + 1) / self.capacity
        return CapacityRejected(f"{why}; try again in about {after:.1f} s, or give the pool more capacity.", after)
