"""Content blocks of an answer, and the events that tell of them as they grow.

Blocks come in order and one at a time: in thinking mode a thinking block first, even an empty one, then text and calls.
A thinking block is closed by its signature. Whole answers are made by the same code, without looking at the events.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from rorqual import chat

Event = dict[str, Any]

_DELTAS = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text"),
           "tool_use": ("input_json_delta", "partial_json")}  # fmt: skip

_THINKING: Event = {"type": "thinking", "thinking": "", "signature": ""}


class Writer:
    """Feed it the events of a reply; it gives those of the stream, and keeps `content`.

    signature: of thinking blocks. thinking: whether the reply begins with one. shows_thinking: False leaves it empty.
    """

    def __init__(self, signature: str, *, thinking: bool, shows_thinking: bool = True) -> None:
        self.content: list[dict[str, Any]] = []
        self._signature = signature
        self._thinking, self._shows_thinking = thinking, shows_thinking
        self._block: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._index = 0

    def begin(self) -> Iterator[Event]:
        """The opening of the reply's first block where it is known what that is; call it before `read`."""
        if self._thinking:
            yield from self._begin(dict(_THINKING))

    def read(self, event: chat.Event) -> Iterator[Event]:
        if isinstance(event, chat.ReasoningDelta):
            if self._block is None or self._block["type"] != "thinking":
                yield from self._begin(dict(_THINKING))
            if self._shows_thinking:
                yield from self._more("thinking", event.text)
        elif isinstance(event, chat.ContentDelta):
            if self._block is None or self._block["type"] != "text":
                yield from self._begin({"type": "text", "text": ""})
            yield from self._more("text", event.text)
        elif isinstance(event, chat.ToolCallStart):
            yield from self._begin({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        elif isinstance(event, chat.ToolCallArguments):
            yield from self._more("tool_use", event.piece)
        elif isinstance(event, chat.ToolCallEnd):
            yield from self._end(is_complete=event.complete)
        else:
            yield from self._end()

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._end()
        self._block, self._pieces = block, []
        yield {"type": "content_block_start", "index": self._index, "content_block": dict(block)}

    def _more(self, kind: str, text: str) -> Iterator[Event]:
        assert self._block is not None and self._block["type"] == kind
        if text:
            self._pieces.append(text)
            name, field = _DELTAS[kind]
            yield {"type": "content_block_delta", "index": self._index, "delta": {"type": name, field: text}}

    def _end(self, *, is_complete: bool = True) -> Iterator[Event]:
        block, text = self._block, "".join(self._pieces)
        if block is None:
            return
        if block["type"] == "thinking":
            block |= {"thinking": text, "signature": self._signature}
            delta = {"type": "signature_delta", "signature": self._signature}
            yield {"type": "content_block_delta", "index": self._index, "delta": delta}
        elif block["type"] == "text":
            block["text"] = text
        elif is_complete:
            block["input"] = parse_arguments(text)
        yield {"type": "content_block_stop", "index": self._index}
        if is_complete:
            self.content.append(block)  # a call that was cut off or broken is none
        self._block, self._index = None, self._index + 1


def parse_arguments(text: str) -> Any:
    """A call's arguments as JSON values; a number that JSON writers cannot spell becomes its text."""
    return json.loads(text, parse_float=_finite, parse_constant=str, parse_int=_integer)


def _finite(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _integer(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:  # Python's bound on the digits of an integer
        return text
