"""POST /anthropic/v1/messages, streamed and whole, and counting a request's tokens.

A stream begins with `message_start` once it is known what the cache did for the prompt, because clients read the
figures there; until then it is kept alive by comment lines, later by `ping` events.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rorqual import chat
from rorqual.errors import RequestError
from rorqual.server import turn as turns
from rorqual.server.accounts import owner_of
from rorqual.server.anthropic.convert import SENT_AS, to_chat
from rorqual.server.anthropic.schema import MessagesRequest
from rorqual.server.anthropic.writer import Event, Writer
from rorqual.server.errors import error_body, for_anthropic, named_as_sent
from rorqual.server.messages import build_prompt
from rorqual.server.replies import Piece
from rorqual.server.service import Service
from rorqual.server.streams import KEEP_ALIVE, EventStream, whole_answer
from rorqual.server.turn import Turn

_REASONING = "content[].thinking"
_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "insufficient_system_resource": "max_tokens",  # cut short; no reason of Anthropic's says by whom
}


async def answer(body: MessagesRequest, http: HttpRequest, service: Service) -> Response:
    """Raises: RequestError for anything that cannot be served, before a byte is sent."""
    served = service.find(body.model, claude=True)
    # The hosted API takes `any` while it thinks, but no tool by name.
    forces_thinking = True if body.tool_choice is not None and body.tool_choice.type == "any" else None
    with _long_prompts_named():
        turn = await turns.start(
            to_chat(body, service),
            service,
            http,
            served,
            reasoning_name=_REASONING,
            forces_thinking=forces_thinking,
            sent_as=SENT_AS,
            lower_max_tokens=True,
        )
    message = _Message(body, turn)
    if body.stream:
        return EventStream(message.lines(service.keep_alive_s), turn.stream.request)
    return await whole_answer(message.whole(http), service.keep_alive_s)


async def count_tokens(body: MessagesRequest, http: HttpRequest, service: Service) -> Response:
    """How long the prompt of this request is, with the reasoning that would be put back. Raises: RequestError."""
    served, asked = service.find(body.model, claude=True), to_chat(body, service)
    with named_as_sent(**SENT_AS):
        owner = owner_of(http, asked.owner)
        prompt = await run_in_threadpool(build_prompt, asked, served, service, owner, _REASONING)
    return JSONResponse({"input_tokens": len(prompt.tokens)})


class _Message:
    """One answer: the message that the events and the body show."""

    def __init__(self, body: MessagesRequest, turn: Turn) -> None:
        self._body, self._turn = body, turn
        self._id = str(uuid.uuid4())
        shown = body.thinking is None or body.thinking.display != "omitted"
        self._writer = Writer(self._id, thinking=turn.reader.thinking, shows_thinking=shown)

    async def whole(self, http: HttpRequest) -> dict[str, Any]:
        def write(piece: Piece) -> None:
            for _ in self._writer.read(piece.event):
                pass

        for _ in self._writer.begin():
            pass
        finished = await self._turn.whole(http, write)
        return {**self._envelope(), "content": self._writer.content, **self._end(finished), **self._beside()}

    async def lines(self, keep_alive_s: float) -> AsyncIterator[str]:
        """The whole stream."""
        is_begun = False
        try:
            async for pieces in self._turn.pieces(keep_alive_s):
                if pieces and not is_begun:
                    is_begun = True
                    for event in self._begin():
                        yield _line(event)
                if not pieces:
                    yield _line({"type": "ping"}) if is_begun else KEEP_ALIVE
                for piece in pieces:
                    for event in self._writer.read(piece.event):
                        yield _line(event)
                    if isinstance(piece.event, chat.Finished):
                        end = self._end(piece.event)
                        usage = end.pop("usage")
                        yield _line({"type": "message_delta", "delta": end, "usage": usage, **self._beside()})
                        yield _line({"type": "message_stop"})
        except RequestError as error:
            yield _line(for_anthropic(error_body(error)))

    def _begin(self) -> Iterator[Event]:
        usage = {**_usage(self._turn.usage()), "output_tokens": 0}
        usage.pop("output_tokens_details", None)
        end: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield {"type": "message_start", "message": {**self._envelope(), **end}}
        yield from self._writer.begin()

    def _envelope(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._turn.asked}

    def _end(self, finished: chat.Finished) -> dict[str, Any]:
        reason, stop = _STOP_REASONS[finished.finish_reason], None
        if reason == "end_turn" and (stop := self._turn.stream.request.stop_string) is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stop, "usage": _usage(self._turn.usage())}

    def _beside(self) -> dict[str, Any]:
        beside = self._turn.beside()
        if self._body.context_management is not None:
            beside["context_management"] = {"applied_edits": []}
        return beside


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Input without what the cache brought, as Anthropic counts it."""
    body: dict[str, Any] = {
        "input_tokens": usage["prompt_cache_miss_tokens"],
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage["prompt_cache_hit_tokens"],
        "output_tokens": usage["completion_tokens"],
        "service_tier": "standard",
    }
    thinking = usage.get("completion_tokens_details", {}).get("reasoning_tokens")
    return body if thinking is None else {**body, "output_tokens_details": {"thinking_tokens": thinking}}


def _line(event: Event) -> str:
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n"


@contextmanager
def _long_prompts_named() -> Iterator[None]:
    """Say first that the prompt is too long: agents look for these words and then shorten their history."""
    try:
        yield
    except RequestError as error:
        if error.code != "context_length_exceeded" or error.param != "messages":
            raise
        message = f"prompt is too long: {error.message}"
        raise RequestError(message, status=error.status, param=error.param, code=error.code) from None
