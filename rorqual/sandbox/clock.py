"""Time as it passes for what runs in a sandbox: it stands still while that does, so no timeout counts a pause."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from time import monotonic
from typing import Any

_SOON_S = 0.05


class RunningClock:
    """Seconds, from an arbitrary beginning, that do not pass between `stop` and `go_on`."""

    def __init__(self) -> None:
        self._stopped_s = 0.0
        self._since: float | None = None
        self.going = asyncio.Event()
        self.going.set()

    def now(self) -> float:
        """The time on it."""
        return monotonic() - self.stopped_s

    @property
    def stopped_s(self) -> float:
        """How long it stood still so far, in seconds of the world outside."""
        return self._stopped_s + (0.0 if self._since is None else monotonic() - self._since)

    def stop(self) -> None:
        """The sandbox stands still from now on; fine if it does already."""
        if self._since is None:
            self._since = monotonic()
            self.going.clear()

    def go_on(self) -> None:
        """The sandbox runs; fine if it did."""
        if self._since is not None:
            self._stopped_s += monotonic() - self._since
            self._since = None
            self.going.set()

    async def wait(self, waited: Collection[asyncio.Future[Any]], end: float | None) -> bool:
        """Wait until one of `waited` is done (True), or until this clock shows `end` (False; None: no such time)."""
        while True:
            left = None if end is None else end - self.now()
            if left is not None and left <= 0:
                return any(one.done() for one in waited)
            timeout = None if left is None else max(left, _SOON_S)  # while it stands still, looked at again
            done, _ = await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return True
