"""POST /responses, streamed and whole: events in the order DeepSeek's API sends them, numbered from 0, no `[DONE]`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rorqual import chat
from rorqual.errors import RequestError
from rorqual.server import turn as turns
from rorqual.server.responses.convert import Converted, to_chat
from rorqual.server.responses.items import CUT, Writer
from rorqual.server.responses.schema import ResponsesRequest
from rorqual.server.service import Service
from rorqual.server.streams import KEEP_ALIVE, EventStream, whole_answer
from rorqual.server.turn import Turn

_SENT_AS = {
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "messages": "input",
}


async def answer(body: ResponsesRequest, http: HttpRequest, service: Service) -> Response:
    """Raises: RequestError for anything that cannot be served, before a byte is sent."""
    converted = to_chat(body)
    turn = await turns.start(converted.body, service, http, reasoning_name="reasoning_text", sent_as=_SENT_AS)
    response = _Response(body, converted, turn)
    if body.stream:
        return EventStream(response.lines(service.keep_alive_s), turn.stream.request)
    return await whole_answer(response.whole(http), service.keep_alive_s)


class _Response:
    """One answer: the object that the events and the body show."""

    def __init__(self, body: ResponsesRequest, converted: Converted, turn: Turn) -> None:
        self._turn = turn
        self._ignored = converted.ignored
        self._writer = Writer(converted.custom)
        self._object = _echo(body, turn.asked)

    async def whole(self, http: HttpRequest) -> dict[str, Any]:
        finished = await self._turn.whole(http, self._write)
        return self._done(finished)

    def _write(self, piece: Any) -> None:
        for _ in self._writer.read(piece):
            pass

    async def lines(self, keep_alive_s: float) -> AsyncIterator[str]:
        """The whole stream."""
        number = count()

        def line(event: dict[str, Any]) -> str:
            kind = event.pop("type")
            data = {"type": kind, "sequence_number": next(number), **event}
            return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

        yield line({"type": "response.created", "response": self._object})
        yield line({"type": "response.in_progress", "response": self._object})
        try:
            async for pieces in self._turn.pieces(keep_alive_s):
                if not pieces:
                    yield KEEP_ALIVE
                for piece in pieces:
                    for event in self._writer.read(piece):
                        yield line(event)
                    if isinstance(piece.event, chat.Finished):
                        done = self._done(piece.event)
                        yield line({"type": f"response.{done['status']}", "response": done})
        except RequestError as error:
            failure = {"code": "server_error", "message": error.message}
            failed = {**self._object, "status": "failed", "error": failure, "output": self._writer.output}
            yield line({"type": "response.failed", "response": failed})

    def _done(self, finished: chat.Finished) -> dict[str, Any]:
        is_cut = finished.finish_reason in CUT
        beside = self._turn.beside()
        if self._ignored:
            beside["rorqual"]["ignored"] = self._ignored
        return {
            **self._object,
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._writer.output,
            "usage": _usage(self._turn.usage()),
            **beside,
        }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    details = usage.get("completion_tokens_details", {})
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": usage["prompt_cache_hit_tokens"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)},
        "total_tokens": usage["total_tokens"],
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
