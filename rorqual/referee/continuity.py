"""What an answer was, for clients that send it back changed: its reasoning, and the text of its calls.

A V4 model that has called a tool expects to see its own reasoning again when the result comes, and the hosted API
refuses a tool turn without it. Many clients return an assistant message without `reasoning_content`, because the
standard shape has no such field. So the server remembers the reasoning of every answer it gave and puts it back.

A call was sampled as markup and is sent as JSON. A client that reads and writes that JSON again may order its keys and
spell its numbers otherwise, and the prompt would no longer hold what the model wrote. So the parameters are remembered
as sampled, and an answer known again is rendered with them; where the model is elsewhere, with the arguments' text as
it came (`spelling`).

An answer is known again by its call ids, which are random, or, where a client made up its own, by its text, its calls
and by what it answered. Whitespace around a text and the spelling of arguments (spaces, order of keys, `2.0` for
`2`) may have changed; a changed text, name or argument is another answer. What was remembered for one owner is never
given to another.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rorqual.chat.events import Parameters

Message = Mapping[str, Any]
"""A message in the shape of chat completions: role, content (text), tool_calls, reasoning_content."""


@dataclass(frozen=True)
class Restored:
    """A conversation with what its answers were put back.

    restored: which messages got their reasoning back. missing: assistant messages that have none and of which none is
    known. as_sampled: messages whose calls are rendered as they were sampled.
    """

    messages: list[Message]
    restored: tuple[int, ...]
    missing: tuple[int, ...]
    as_sampled: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, list[int]]:
        """For the response's metadata."""
        return {name: list(getattr(self, name)) for name in ("restored", "missing", "as_sampled")}


@dataclass(frozen=True)
class Kept:
    """What is kept of an answer. used: when it was last asked for. arguments: of its calls, as they were spelled."""

    used: float
    reasoning: str | None
    calls: tuple[Parameters, ...]
    arguments: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        texts = [
            self.reasoning or "",
            *self.arguments,
            *(text for call in self.calls for key, value, _ in call for text in (key, value)),
        ]
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


class Continuity:
    """Remembers reasoning and calls per assistant message, in memory; `continuity_disk.py` does on disk.

    max_bytes: most text kept; the least recently used goes first. expires_s: unused for so long, it is forgotten.
    Thread-safe.
    """

    def __init__(
        self, max_bytes: int = 64 << 20, expires_s: float = 24 * 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes, self._expires_s, self._clock = max_bytes, expires_s, clock
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()  # least recently used first
        self._nbytes = 0
        self._lock = threading.Lock()

    is_on_disk = False
    """Whether its calls read and write a file, and so have to stay off an event loop."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, keys included."""
        return self._nbytes

    def remember(
        self,
        owner: str,
        before: Sequence[Message],
        answer: Message,
        sampled: Sequence[Parameters] = (),
        *,
        spelling: bool = False,
    ) -> None:
        """Keep the reasoning of `answer`, which was given to the conversation `before`, and its calls as `sampled`.

        spelling: keep the text of its calls' arguments, too.
        """
        reasoning = answer.get("reasoning_content") or None
        calls = answer.get("tool_calls") or []
        arguments = tuple(call["function"]["arguments"] for call in calls) if spelling else ()
        if reasoning is None and not sampled and not arguments or not (calls or _text(answer).strip()):
            return
        with self._lock:
            self._keep(_keys(owner, before, answer), Kept(self._clock(), reasoning, tuple(sampled), arguments))
            self._forget_old()

    def restore(self, owner: str, messages: Sequence[Message], thinking: bool = True) -> Restored:
        """The conversation with its calls as sampled and, if `thinking`, with `reasoning_content` where a client left
        it out (absent or None; "" was chosen)."""
        out: list[Message] = list(messages)
        restored: list[int] = []
        missing: list[int] = []
        as_sampled: list[int] = []
        with self._lock:
            self._forget_old()
            for i, message in enumerate(messages):
                wants_reasoning = thinking and message.get("reasoning_content") is None
                if message.get("role") != "assistant" or not (wants_reasoning or message.get("tool_calls")):
                    continue
                kept = self._find(_keys(owner, messages[:i], message))
                if kept is not None and kept.calls:
                    pairs = zip(message["tool_calls"], kept.calls, strict=True)
                    out[i] = {**message, "tool_calls": [{**call, "sampled_parameters": was} for call, was in pairs]}
                    as_sampled.append(i)
                elif kept is not None and kept.arguments:
                    given = zip(message["tool_calls"], kept.arguments, strict=True)
                    spelled = [{**call, "function": {**call["function"], "arguments": was}} for call, was in given]
                    if spelled != list(message["tool_calls"]):
                        out[i] = {**message, "tool_calls": spelled}
                        as_sampled.append(i)
                if wants_reasoning:
                    reasoning = kept and kept.reasoning
                    out[i] = {**out[i], "reasoning_content": reasoning}
                    (missing if reasoning is None else restored).append(i)
        return Restored(out, tuple(restored), tuple(missing), tuple(as_sampled))

    def close(self) -> None:
        """Give back what it holds open."""

    def _keep(self, keys: Sequence[bytes], kept: Kept) -> None:
        """Under each of the keys, in the place of what was there."""
        for key in keys:
            self._drop(key)
            self._kept[key] = kept
            self._nbytes += len(key) + kept.nbytes

    def _find(self, keys: Sequence[bytes]) -> Kept | None:
        """What is kept under the surest of the keys; all of them are used now."""
        known = [key for key in keys if key in self._kept]
        for key in reversed(known):
            self._kept[key] = replace(self._kept[key], used=self._clock())
            self._kept.move_to_end(key)
        return self._kept[known[0]] if known else None

    def _forget_old(self) -> None:
        oldest = self._clock() - self._expires_s
        while self._kept:
            key, kept = next(iter(self._kept.items()))
            if kept.used >= oldest and self._nbytes <= self._max_bytes:
                return
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        if (old := self._kept.pop(key, None)) is not None:
            self._nbytes -= len(key) + old.nbytes


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
        return json.dumps(json.loads(text, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> float | int:
    """A whole number is one, however it is written: JavaScript writes 2.0 as 2."""
    value = float(text)
    return int(value) if value.is_integer() else value
