"""The progress line while a long prompt is read: how far, how fast, how long still."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

Item = TypeVar("Item")

WIDTH = 24
"""Characters of the bar."""

RECENT = 8
"""Calls that the present cost of a token is taken over."""


class ReadingBar:
    """Called with the tokens read so far and all of them (`on_progress` of `Engine.submit`).

    Rate and time count from the first call on: what came before it may have been in a cache. A token costs more the
    more tokens precede it (the index scan reads them all), so the time left follows from two costs, the mean one so far
    and the present one, along a straight line.
    """

    def __init__(self, out: TextIO, *, is_shown: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._out, self._is_shown, self._clock = out, is_shown, clock
        self._begin: tuple[int, float] | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._length = 0

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._begin is None or done < self._recent[-1][0]:  # or all over again
            self._begin = (done, now)
            self._recent.clear()
        line = self._line(done, total, now)
        self._recent.append((done, now))
        if self._is_shown:
            self._out.write("\r" + line.ljust(self._length))
            self._out.flush()
            self._length = len(line)

    def _line(self, done: int, total: int, now: float) -> str:
        filled = WIDTH * done // max(1, total)
        line = f"reading [{'#' * filled}{'.' * (WIDTH - filled)}] {done:,}/{total:,} tokens"
        assert self._begin is not None
        tokens, seconds = done - self._begin[0], now - self._begin[1]
        if tokens <= 0 or seconds <= 0:
            return line
        return f"{line}, {tokens / seconds:,.0f} tokens/s, {_clock(self._left(done, total, now))} left"

    def _left(self, done: int, total: int, now: float) -> float:
        """Seconds that the rest will take."""
        assert self._begin is not None
        tokens, rest = done - self._begin[0], total - done
        mean = (now - self._begin[1]) / tokens
        earlier, then = self._recent[0]
        present = (now - then) / max(1, done - earlier)
        apart = (earlier - self._begin[0]) / 2  # the middle of what each of the two is the mean of
        growth = max(0.0, (present - mean) / apart) if apart > 0 else 0.0
        at_end = max(present, mean) + growth * (done - earlier) / 2
        return rest * (at_end + growth * rest / 2)

    def close(self) -> None:
        """Take the line away."""
        if self._is_shown and self._length:
            self._out.write("\r" + " " * self._length + "\r")
            self._out.flush()
            self._length = 0

    def ended_by(self, events: Iterable[Item]) -> Iterator[Item]:
        """Pass events on, and make room for them when the first one comes, or an error."""
        try:
            for event in events:
                self.close()
                yield event
        finally:
            self.close()


def _clock(seconds: float) -> str:
    """`75` -> `1:15`."""
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )
