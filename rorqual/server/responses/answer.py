"""POST /responses, streamed and whole: events in the order DeepSeek's API sends them, numbered from 0, no `[DONE]`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rorqual import chat
from rorqual.errors import RequestError
from rorqual.server import turn as turns
from rorqual.server.pieces import Piece
from rorqual.server.responses.body import ResponseBody
from rorqual.server.responses.convert import SENT_AS, to_chat
from rorqual.server.responses.schema import ResponsesRequest
from rorqual.server.service import Service
from rorqual.server.sse import KEEP_ALIVE, whole_answer
from rorqual.server.streams import EventStream
from rorqual.server.turn import Turn


async def answer(body: ResponsesRequest, http: HttpRequest, service: Service) -> Response:
    """Raises: RequestError for anything that cannot be served, before a byte is sent."""
    converted = to_chat(body)
    turn = await turns.start(converted.body, service, http, reasoning_name="reasoning_text", sent_as=SENT_AS)
    response = _Response(ResponseBody(body, converted, turn.asked), turn)
    if body.stream:
        return EventStream(response.lines(service.keep_alive_s), turn.stream.request)
    return await whole_answer(response.whole(http), service.keep_alive_s)


class _Response:
    """A turn's answer."""

    def __init__(self, body: ResponseBody, turn: Turn) -> None:
        self._body, self._turn = body, turn

    async def whole(self, http: HttpRequest) -> dict[str, Any]:
        finished = await self._turn.whole(http, self._write)
        return self._body.whole(finished.finish_reason, self._turn.usage(), self._turn.beside())

    def _write(self, piece: Piece) -> None:
        for _ in self._body.read(piece):
            pass

    async def lines(self, keep_alive_s: float) -> AsyncIterator[str]:
        """The whole stream."""
        body = self._body
        for event in body.begin():
            yield body.line(event)
        try:
            async for pieces in self._turn.pieces(keep_alive_s):
                if not pieces:
                    yield KEEP_ALIVE
                for piece in pieces:
                    for event in body.read(piece):
                        yield body.line(event)
                    if isinstance(piece.event, chat.Finished):
                        usage, beside = self._turn.usage(), self._turn.beside()
                        for event in body.end(piece.event.finish_reason, usage, beside):
                            yield body.line(event)
        except RequestError as error:
            yield body.line(body.failed(error.message))
