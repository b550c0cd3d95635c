"""One message in Anthropic's words: the events of its stream and its body, whoever made the answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from rorqual import chat
from rorqual.planner.prices import Tokens
from rorqual.server.anthropic.schema import MessagesRequest
from rorqual.server.anthropic.writer import Event, Writer

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
    "insufficient_system_resource": "max_tokens",  # cut short; no reason of Anthropic's says by whom
}


class MessageBody:
    """The message that the events and the body show.

    model: its name in the answer. thinking: whether it is known to begin with a thinking block.
    """

    def __init__(self, body: MessagesRequest, model: str, *, thinking: bool = False) -> None:
        self._edits_history = body.context_management is not None
        self._id, self._model = str(uuid.uuid4()), model
        shown = body.thinking is None or body.thinking.display != "omitted"
        self._writer = Writer(self._id, thinking=thinking, shows_thinking=shown)

    def begin(self, usage: Mapping[str, Any]) -> Iterator[Event]:
        """`message_start`, and the first block where it is known. usage: of chat completions, as far as it is known."""
        counts = {**usage_body(usage), "output_tokens": 0}
        counts.pop("output_tokens_details", None)
        end: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": counts}
        yield {"type": "message_start", "message": {**self._envelope(), **end}}
        yield from self._writer.begin()

    def read(self, event: chat.Event) -> Iterator[Event]:
        """The events that one of the reply's makes."""
        return self._writer.read(event)

    def end(
        self, finish: str, stop: str | None, usage: Mapping[str, Any], beside: Mapping[str, Any]
    ) -> Iterator[Event]:
        """The last two events. stop: the stop string that ended it. beside: what is said beyond the API."""
        end = self._end(finish, stop, usage)
        counts = end.pop("usage")
        yield {"type": "message_delta", "delta": end, "usage": counts, **self._beside(beside)}
        yield {"type": "message_stop"}

    def whole(
        self, finish: str, stop: str | None, usage: Mapping[str, Any], beside: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The body, once all was read."""
        end = self._end(finish, stop, usage)
        return {**self._envelope(), "content": self._writer.content, **end, **self._beside(beside)}

    def _envelope(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model}

    def _end(self, finish: str, stop: str | None, usage: Mapping[str, Any]) -> dict[str, Any]:
        reason = _STOP_REASONS.get(finish, "end_turn")
        if reason == "end_turn" and stop is not None:
            reason = "stop_sequence"
        return {
            "stop_reason": reason,
            "stop_sequence": stop if reason == "stop_sequence" else None,
            "usage": usage_body(usage),
        }

    def _beside(self, beside: Mapping[str, Any]) -> dict[str, Any]:
        edits: dict[str, Any] = {"context_management": {"applied_edits": []}} if self._edits_history else {}
        return {**beside, **edits}


def usage_body(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Chat completions' usage as Anthropic counts it: input without what the cache brought."""
    tokens = Tokens.from_usage(usage)
    body: dict[str, Any] = {
        "input_tokens": tokens.miss,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": tokens.hit,
        "output_tokens": tokens.output,
        "service_tier": "standard",
    }
    thinking = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    return body if thinking is None else {**body, "output_tokens_details": {"thinking_tokens": thinking}}


def line(event: Event) -> str:
    """An event of the stream."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n"
