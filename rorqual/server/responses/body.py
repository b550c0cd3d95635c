"""One answer in the Responses API's words: the events of its stream and its object, whoever made it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from rorqual.planner.prices import Tokens
from rorqual.server.pieces import Piece
from rorqual.server.responses.convert import Converted
from rorqual.server.responses.items import CUT, Event, Writer
from rorqual.server.responses.schema import ResponsesRequest


class ResponseBody:
    """The object that the events and the body show. model: its name in the answer."""

    def __init__(self, body: ResponsesRequest, converted: Converted, model: str) -> None:
        self._ignored = converted.ignored
        self._writer = Writer(converted.custom)
        self._object = _echo(body, model)
        self._numbers = count()

    def begin(self) -> Iterator[Event]:
        """What a stream opens with."""
        yield {"type": "response.created", "response": self._object}
        yield {"type": "response.in_progress", "response": self._object}

    def read(self, piece: Piece) -> Iterator[Event]:
        """The events that a piece of the reply makes."""
        return self._writer.read(piece)

    def end(self, finish: str, usage: Mapping[str, Any], beside: Mapping[str, Any]) -> Iterator[Event]:
        """The last event, with the whole object."""
        done = self.whole(finish, usage, beside)
        yield {"type": f"response.{done['status']}", "response": done}

    def failed(self, message: str, code: str = "server_error", **beside: Any) -> Event:
        """The last event of a stream that came to nothing."""
        failure = {"code": code, "message": message}
        failed = {**self._object, "status": "failed", "error": failure, "output": self._writer.output, **beside}
        return {"type": "response.failed", "response": failed}

    def whole(self, finish: str, usage: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
        """The object, once all was read. usage: of chat completions. beside: what is said beyond the API."""
        why = "content_filter" if finish == "content_filter" else "max_output_tokens" if finish in CUT else None
        if self._ignored:
            beside = {**beside, "rorqual": {**beside.get("rorqual", {}), "ignored": self._ignored}}
        return {
            **self._object,
            "status": "completed" if why is None else "incomplete",
            "completed_at": int(time.time()) if why is None else None,
            "incomplete_details": None if why is None else {"reason": why},
            "output": self._writer.output,
            "usage": usage_body(usage),
            **beside,
        }

    def line(self, event: Event) -> str:
        """An event of the stream, numbered."""
        data = {"type": event["type"], "sequence_number": next(self._numbers), **event}
        return f"event: {event['type']}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage_body(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Chat completions' usage in this API's words."""
    tokens, details = Tokens.from_usage(usage), usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": tokens.hit + tokens.miss,
        "input_tokens_details": {"cached_tokens": tokens.hit, "cache_write_tokens": 0},
        "output_tokens": tokens.output,
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens") or 0},
        "total_tokens": tokens.hit + tokens.miss + tokens.output,
    }


def _with_strict(tool: Any) -> Any:  # Any: tools of no known kind are ignored, whatever they are
    is_function = isinstance(tool, dict) and tool.get("type") == "function"
    return {"strict": None, **tool} if is_function else tool


def _echo(body: ResponsesRequest, model: str) -> dict[str, Any]:
    """The object as it is before any output: what was asked, and fixed values for what is not supported."""
    form = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
    if form is not None and form["type"] != "json_schema":
        form.pop("schema", None)
    return {
        "id": str(uuid.uuid4()),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": form or {"type": "text"}},
        "tool_choice": body.tool_choice or ("auto" if body.tools else "none"),
        "tools": [_with_strict(tool) for tool in body.tools or []],
        "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
        "background": False,
        "store": False,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "truncation": "disabled",
        "service_tier": "default",
        "metadata": {},
        "user": body.user,
    }
