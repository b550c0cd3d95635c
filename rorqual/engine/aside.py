"""Work on the side: what somebody wants of the model that is no request, done by the engine's thread in pieces.

A piece runs whenever no request does, and otherwise for a small share of the time, so that requests hardly notice.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

from rorqual.engine.failures import closed
from rorqual.errors import RequestError

SHARE = 0.15
"""Of the time that requests take, what side work may have besides."""
MOST_WAITING = 8
"""Pieces of side work that may be under way or wait."""

Work = Generator[None, None, Any]  # Any: whatever it returns


class Asides:
    """Generators that wait for their turn; one runs at a time, up to its next `yield`. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Work, Future[Any]]] = deque()
        self._now: tuple[Work, Future[Any]] | None = None
        self._credit_s = self._piece_s = 0.0

    @property
    def is_idle(self) -> bool:
        return self._now is None and not self._waiting

    def add(self, work: Work) -> Future[Any]:
        """Queue work. Raises: RequestError (429) when too much waits."""
        future: Future[Any] = Future()
        with self._lock:
            if len(self._waiting) >= MOST_WAITING:
                raise RequestError(
                    f"{MOST_WAITING} others wait for the engine's spare time already. Ask again in a few seconds.",
                    status=429,
                    type="rate_limit_error",
                    retry_after_s=2.0,
                )
            self._waiting.append((work, future))
        return future

    def after_round(self, seconds: float) -> None:
        """A round of requests took so long: do a piece if that has earned the time of the last one."""
        self._credit_s = min(self._credit_s + SHARE * seconds, 1.0)
        if not self.is_idle and self._credit_s >= min(self._piece_s, 1.0):
            self.run_piece()
            self._credit_s -= self._piece_s

    def run_piece(self) -> None:
        """Do the next piece."""
        if self._now is None:
            with self._lock:
                self._now = self._waiting.popleft()
            if not self._now[1].set_running_or_notify_cancel():  # nobody waits for it any more
                self._now = None
                return
        began = time.perf_counter()
        work, future = self._now
        try:
            next(work)
        except StopIteration as end:
            self._now = None
            future.set_result(end.value)
        except Exception as error:
            self._now = None
            future.set_exception(error)
        self._piece_s = time.perf_counter() - began

    def close(self) -> None:
        """End what is left with 503."""
        with self._lock:
            left, self._now = [*([self._now] if self._now else []), *self._waiting], None
            self._waiting.clear()
        for work, future in left:
            work.close()
            if not future.done() and not future.cancelled():
                future.set_exception(closed())
