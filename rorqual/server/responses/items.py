"""Output items of a Responses answer, and the events that tell of them as they grow.

A reply's events come in order; each belongs to one item (reasoning, message or call), and an item is over when the next
one begins. Whole answers are made by the same code, without looking at the events.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator
from typing import Any

from rorqual import chat
from rorqual.server.pieces import Piece
from rorqual.server.responses.convert import INPUT

Event = dict[str, Any]

# The finish reasons of a reply that is not all there.
CUT = ("length", "insufficient_system_resource")


class Writer:
    """Feed it the pieces of a reply; it gives events without their sequence numbers, and keeps `output`.

    custom: names of tools that take free text.
    """

    def __init__(self, custom: Collection[str] = ()) -> None:
        self.output: list[dict[str, Any]] = []
        self._custom = custom
        self._item: dict[str, Any] | None = None
        self._text: _FreeText | None = None
        self._num_items = 0

    def read(self, piece: Piece) -> Iterator[Event]:
        event = piece.event
        if isinstance(event, chat.ReasoningDelta):
            yield from self._more("reasoning", event.text)
        elif isinstance(event, chat.ContentDelta):
            yield from self._more("message", event.text, _entries(piece))
        elif isinstance(event, chat.ToolCallStart):
            yield from self._begin_call(event)
        elif isinstance(event, chat.ToolCallArguments):
            yield from self._more_call(event.piece)
        elif isinstance(event, chat.ToolCallEnd):
            yield from self._end("completed" if event.complete else "incomplete")
        else:
            yield from self._finish(event, _entries(piece))

    def _finish(self, finished: chat.Finished, logprobs: list[Any]) -> Iterator[Event]:
        if logprobs and self._item is not None and self._item["type"] == "message":
            self._item["content"][0]["logprobs"] += logprobs
        yield from self._end("incomplete" if finished.finish_reason in CUT else "completed")
        if not any(item["type"] != "reasoning" for item in self.output):  # SDKs look for a message
            yield from self._begin("message")
            yield from self._end("incomplete" if finished.finish_reason in CUT else "completed")

    def _more(self, kind: str, text: str, logprobs: list[Any] | None = None) -> Iterator[Event]:
        if self._item is None or self._item["type"] != kind:
            yield from self._begin(kind)
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        delta: Event = {"type": f"response.{part['type']}.delta", **self._where(), "content_index": 0, "delta": text}
        if kind == "message":
            part["logprobs"] += logprobs or []
            delta["logprobs"] = logprobs or []
        yield delta

    def _begin(self, kind: str) -> Iterator[Event]:
        yield from self._end("completed")
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item = {"type": "reasoning", "id": _id("rs"), "summary": [], "content": [part], "status": "in_progress"}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {
                "type": "message", "id": _id("msg"), "role": "assistant", "content": [part], "status": "in_progress"
            }  # fmt: skip
        yield from self._add(item, {**item, "content": []})
        yield {"type": "response.content_part.added", **self._where(), "content_index": 0, "part": dict(part)}

    def _begin_call(self, start: chat.ToolCallStart) -> Iterator[Event]:
        yield from self._end("completed")
        call = {"call_id": start.id, "name": start.name, "status": "in_progress"}
        if start.name in self._custom:
            self._text = _FreeText()
            item = {"type": "custom_tool_call", "id": _id("ctc"), **call, "input": ""}
        else:
            item = {"type": "function_call", "id": _id("fc"), **call, "arguments": ""}
        yield from self._add(item, dict(item))

    def _more_call(self, piece: str) -> Iterator[Event]:
        assert self._item is not None
        if self._item["type"] == "function_call":
            self._item["arguments"] += piece
            yield {"type": "response.function_call_arguments.delta", **self._where(), "delta": piece}
            return
        assert self._text is not None
        text = self._text.push(piece)
        if text:
            self._item["input"] += text
            yield {"type": "response.custom_tool_call_input.delta", **self._where(), "delta": text}

    def _add(self, item: dict[str, Any], shown: dict[str, Any]) -> Iterator[Event]:
        self._item = item
        yield {"type": "response.output_item.added", "output_index": self._num_items, "item": shown}

    def _end(self, status: str) -> Iterator[Event]:
        item = self._item
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            yield {
                "type": "response.function_call_arguments.done", **self._where(), "name": item["name"],
                "arguments": item["arguments"],
            }  # fmt: skip
        elif item["type"] == "custom_tool_call":
            yield {"type": "response.custom_tool_call_input.done", **self._where(), "input": item["input"]}
        else:
            part = item["content"][0]
            done: Event = {"type": f"response.{part['type']}.done", **self._where(), "content_index": 0}
            yield {**done, "text": part["text"], **({"logprobs": part["logprobs"]} if "logprobs" in part else {})}
            yield {"type": "response.content_part.done", **self._where(), "content_index": 0, "part": dict(part)}
        yield {"type": "response.output_item.done", "output_index": self._num_items, "item": dict(item)}
        if status == "completed" or item["type"] in ("message", "reasoning"):
            self.output.append(item)  # a call that was cut off is none
        self._item, self._num_items = None, self._num_items + 1

    def _where(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": self._num_items}


class _FreeText:
    """The one text among a custom tool's arguments, decoded as it comes: `{"input": "..."}`."""

    def __init__(self) -> None:
        self._buffer = ""
        self._state = "before"

    def push(self, piece: str) -> str:
        """What `piece` adds to the text. The model may have written other arguments; those are left out."""
        self._buffer += piece
        if self._state == "before":
            lead = f'{{"{INPUT}": "'
            if not self._buffer.startswith(lead):
                return ""
            self._buffer, self._state = self._buffer.removeprefix(lead), "inside"
        if self._state == "after":
            return ""
        end, is_over = _end_of_string(self._buffer)
        text: str = json.loads(f'"{self._buffer[:end]}"')
        self._buffer = self._buffer[end:]
        if is_over:
            self._state = "after"
        return text


def _end_of_string(text: str) -> tuple[int, bool]:
    """How much of `text` can be decoded, and whether the string's closing quote follows."""
    i = 0
    while i < len(text):
        if text[i] == '"':
            return i, True
        step = 1 if text[i] != "\\" else 6 if text[i + 1 : i + 2] == "u" else 2
        if i + step > len(text):
            break
        i += step
    return i, False


def _entries(piece: Piece) -> list[Any]:
    return [] if piece.logprobs is None else list(piece.logprobs.get("content", []))


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
