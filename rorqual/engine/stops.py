"""Holds back text that might turn into a stop string, so that no part of one ever leaves the engine.

An event waits until all of its text is safe: until no stop string can begin inside it any more. The first
place where a stop string is complete ends the output, whatever tokens it came in; of several complete there
the longest counts. A control token is no text: its name neither matches nor joins what stands around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rorqual.engine.events import TokenEvent


class StopFilter:
    """Feed events with `push`; it returns those that may go out. `matched`: the stop string that ended them."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._events: list[TokenEvent] = []
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was seen."""
        return self.matched is not None

    def push(self, event: TokenEvent, *, is_control: bool = False) -> list[TokenEvent]:
        """Add one event; return the events that are now final, in order."""
        if not self._stop:  # nothing is ever held back
            return [event]
        if is_control:
            return [*self.flush(), event]
        self._events.append(event)
        self._held += event.text
        found = self._find_stop()
        if found is not None:
            start, self.matched = found
            self._held = self._held[:start]
            return self.flush()
        return self._release(len(self._held) - self._tail_that_may_match())

    def flush(self) -> list[TokenEvent]:
        """All events still held, their text cut to what is allowed out."""
        events, self._events = self._events, []
        held, self._held = self._held, ""
        out = []
        for event in events:
            text, held = held[: len(event.text)], held[len(event.text) :]
            out.append(event if text == event.text else replace(event, text=text))
        return out

    def _find_stop(self) -> tuple[int, str] | None:
        """The earliest-ending stop string in the held text: where it begins, and which one it is."""
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _tail_that_may_match(self) -> int:
        """Length of the longest tail of the held text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _release(self, safe: int) -> list[TokenEvent]:
        count = 0
        for event in self._events:
            if len(event.text) > safe:
                break
            safe -= len(event.text)
            self._held = self._held[len(event.text) :]
            count += 1
        out, self._events = self._events[:count], self._events[count:]
        return out
