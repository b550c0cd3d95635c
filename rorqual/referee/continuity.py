"""Reasoning kept for clients that drop it.

A V4 model that has called a tool expects to see its own reasoning again when the result comes, and the hosted API
refuses a tool turn without it. Many clients return an assistant message without `reasoning_content`, because the
standard shape has no such field. So the server remembers the reasoning of every answer it gave and puts it back.

An answer is known again by its call ids, which are random, or, where a client made up its own, by its text, its calls
and by what it answered. Whitespace around a text and the spelling of arguments (spaces, order of keys) may have
changed; a changed text, name or argument is another answer. What was remembered for one owner is never given to
another.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""A message in the shape of chat completions: role, content (text), tool_calls, reasoning_content."""


@dataclass(frozen=True)
class Restored:
    """A conversation with reasoning put back.

    restored: which messages got theirs back. missing: assistant messages that have none and of which none is known.
    """

    messages: list[Message]
    restored: tuple[int, ...]
    missing: tuple[int, ...]

    def to_dict(self) -> dict[str, list[int]]:
        """For the response's metadata."""
        return {"restored": list(self.restored), "missing": list(self.missing)}


class Continuity:
    """Remembers reasoning per assistant message, in memory only.

    max_bytes: most text kept; the least recently used goes first. expires_s: unused for so long, it is forgotten.
    Thread-safe.
    """

    def __init__(
        self, max_bytes: int = 64 << 20, expires_s: float = 24 * 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes, self._expires_s, self._clock = max_bytes, expires_s, clock
        self._kept: OrderedDict[bytes, tuple[float, str]] = OrderedDict()  # key -> last use, reasoning
        self._nbytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, keys included."""
        return self._nbytes

    def remember(self, owner: str, before: Sequence[Message], answer: Message) -> None:
        """Keep the reasoning of `answer`, which was given to the conversation `before`."""
        reasoning = answer.get("reasoning_content")
        if not reasoning or not (answer.get("tool_calls") or _text(answer).strip()):
            return
        with self._lock:
            for key in _keys(owner, before, answer):
                self._drop(key)
                self._kept[key] = (self._clock(), reasoning)
                self._nbytes += _size(key, reasoning)
            self._forget_old()

    def restore(self, owner: str, messages: Sequence[Message]) -> Restored:
        """The conversation with `reasoning_content` where a client left it out (absent or None; "" was chosen)."""
        out: list[Message] = list(messages)
        restored: list[int] = []
        missing: list[int] = []
        with self._lock:
            self._forget_old()
            for i, message in enumerate(messages):
                if message.get("role") != "assistant" or message.get("reasoning_content") is not None:
                    continue
                known = [key for key in _keys(owner, messages[:i], message) if key in self._kept]
                for key in reversed(known):
                    self._kept[key] = (self._clock(), self._kept[key][1])
                    self._kept.move_to_end(key)
                if known:
                    out[i] = {**message, "reasoning_content": self._kept[known[0]][1]}
                (restored if known else missing).append(i)
        return Restored(out, tuple(restored), tuple(missing))

    def _forget_old(self) -> None:
        oldest = self._clock() - self._expires_s
        while self._kept:
            key, (used, _) = next(iter(self._kept.items()))
            if used >= oldest and self._nbytes <= self._max_bytes:
                return
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        if (old := self._kept.pop(key, None)) is not None:
            self._nbytes -= _size(key, old[1])


def _size(key: bytes, reasoning: str) -> int:
    return len(key) + len(reasoning.encode("utf-8", "surrogatepass"))


def _keys(owner: str, before: Sequence[Message], answer: Message) -> list[bytes]:
    """What an answer is known by, surest first."""
    calls = answer.get("tool_calls") or []
    functions = [[call["function"]["name"], _arguments(call["function"]["arguments"])] for call in calls]
    asked = next((m for m in reversed(before) if m.get("role") != "assistant"), {})
    names: list[Any] = [[owner, [call["id"] for call in calls], functions]] if calls else []
    names.append([owner, asked.get("role"), _text(asked).strip(), _text(answer).strip(), functions])
    return [hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest() for name in names]


def _text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _arguments(text: str) -> str:
    """The arguments in one spelling; text that is no JSON stays as it is."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text
