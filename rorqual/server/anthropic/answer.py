"""POST /anthropic/v1/messages, streamed and whole, and counting a request's tokens.

A stream begins with `message_start` once it is known what the cache did for the prompt, because clients read the
figures there; until then it is kept alive by comment lines, later by `ping` events.
"""

from __future__ import annotations

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
from rorqual.server.anthropic.body import MessageBody, line
from rorqual.server.anthropic.convert import SENT_AS, to_chat
from rorqual.server.anthropic.schema import MessagesRequest
from rorqual.server.errors import error_body, for_anthropic, named_as_sent
from rorqual.server.messages import build_prompt
from rorqual.server.pieces import Piece
from rorqual.server.service import Service
from rorqual.server.sse import KEEP_ALIVE, whole_answer
from rorqual.server.streams import EventStream
from rorqual.server.turn import Turn

_REASONING = "content[].thinking"


async def answer(body: MessagesRequest, http: HttpRequest, service: Service) -> Response:
    """Raises: RequestError for anything that cannot be served, before a byte is sent."""
    served = service.find(body.model, claude=True)
    # The hosted API takes `any` while it thinks, but no tool by name.
    forces_thinking = True if body.tool_choice is not None and body.tool_choice.type == "any" else None
    with _long_prompts_named():
        turn = await turns.start(
            to_chat(body, service.continuity is not None),
            service,
            http,
            served,
            reasoning_name=_REASONING,
            forces_thinking=forces_thinking,
            sent_as=SENT_AS,
            lower_max_tokens=True,
        )
    message = _Message(MessageBody(body, turn.asked, thinking=turn.reader.thinking), turn)
    if body.stream:
        return EventStream(message.lines(service.keep_alive_s), turn.stream.request)
    return await whole_answer(message.whole(http), service.keep_alive_s)


async def count_tokens(body: MessagesRequest, http: HttpRequest, service: Service) -> Response:
    """How long the prompt of this request is, with the reasoning that would be put back. Raises: RequestError."""
    served, asked = service.find(body.model, claude=True), to_chat(body, service.continuity is not None)
    with named_as_sent(**SENT_AS):
        owner = owner_of(http, asked.owner)
        prompt = await run_in_threadpool(build_prompt, asked, served, service, owner, _REASONING)
    return JSONResponse({"input_tokens": len(prompt.tokens)})


class _Message:
    """A turn's answer."""

    def __init__(self, body: MessageBody, turn: Turn) -> None:
        self._body, self._turn = body, turn

    async def whole(self, http: HttpRequest) -> dict[str, Any]:
        def write(piece: Piece) -> None:
            for _ in self._body.read(piece.event):
                pass

        for _ in self._body.begin({}):
            pass
        finished = await self._turn.whole(http, write)
        return self._body.whole(finished.finish_reason, self._stop, self._turn.usage(), self._turn.beside())

    async def lines(self, keep_alive_s: float) -> AsyncIterator[str]:
        """The whole stream."""
        body, is_begun = self._body, False
        try:
            async for pieces in self._turn.pieces(keep_alive_s):
                if pieces and not is_begun:
                    is_begun = True
                    for event in body.begin(self._turn.usage()):
                        yield line(event)
                if not pieces:
                    yield line({"type": "ping"}) if is_begun else KEEP_ALIVE
                for piece in pieces:
                    for event in body.read(piece.event):
                        yield line(event)
                    if isinstance(piece.event, chat.Finished):
                        usage, beside = self._turn.usage(), self._turn.beside()
                        for event in body.end(piece.event.finish_reason, self._stop, usage, beside):
                            yield line(event)
        except RequestError as error:
            yield line(for_anthropic(error_body(error)))

    @property
    def _stop(self) -> str | None:
        return self._turn.stream.request.stop_string


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
