"""Going away without cutting anybody off: no new requests, time for those that run, then an honest end for the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from rorqual.server.accounts import Ticket

_ENDING_S = 3.0  # for answers to send their last words once they were cut


class Drain:
    """Knows what is being answered, and whether the server is on its way out."""

    def __init__(self) -> None:
        self.is_draining = False
        self._running: list[list[Ticket]] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    def begin(self) -> None:
        """From now on requests are refused (`Gate`) and connections close after their answer."""
        self.is_draining = True

    def enter(self, tickets: list[Ticket]) -> None:
        """A request is being answered; its tickets join the list as they are drawn."""
        self._running.append(tickets)

    def leave(self, tickets: list[Ticket]) -> None:
        """It is answered."""
        self._running = [other for other in self._running if other is not tickets]

    async def finish(self, drain_s: float) -> None:
        """Wait up to that long for running requests, cut those that are left, and wait for their last words."""
        if not await self._until_empty(drain_s):
            for ticket in self._tickets():
                ticket.cut()
            await self._until_empty(_ENDING_S)

    def _tickets(self) -> Iterable[Ticket]:
        return [ticket for tickets in self._running for ticket in tickets]

    async def _until_empty(self, patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._running
