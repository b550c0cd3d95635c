"""Server-Sent Events, and answers that are waited for: what every route writes, whoever made the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from rorqual.errors import RequestError
from rorqual.server.errors import ClientGone, error_body

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"

Result = TypeVar("Result")


async def gone(http: HttpRequest) -> None:
    """Return when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is ended where it stands when the client goes away first.

    Raises: ClientGone then; RequestError 503 where the work was ended by the server; what `work` raises.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone(http))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        if task.cancelled():
            raise RequestError("The gateway is going away. Send it again.", status=503, type="server_error")
        return task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)  # nothing of it runs on behind the answer


def sse(data: Mapping[str, Any]) -> str:
    """One event, compact JSON."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def sse_error(error: RequestError) -> str:
    """A failure inside a running stream; SDKs raise it. No `[DONE]` follows."""
    return sse(error_body(error))


async def whole_answer(making: Coroutine[Any, Any, Mapping[str, Any]], keep_alive_s: float) -> Response:
    """The answer as JSON once it is made; a client that waits longer gets an empty line every `keep_alive_s` before it.

    Those lines need a status, so a failure after the first of them is an error body under status 200, as on the hosted
    API. Raises: what `making` does until then.
    """
    task = asyncio.ensure_future(making)
    try:
        await asyncio.wait({task}, timeout=keep_alive_s)
    except asyncio.CancelledError:
        task.cancel()
        raise
    return JSONResponse(task.result()) if task.done() else _Waiting(task, keep_alive_s)


class _Waiting(StreamingResponse):
    """Empty lines, then the JSON body."""

    def __init__(self, task: asyncio.Future[Mapping[str, Any]], keep_alive_s: float) -> None:
        super().__init__(self._lines(task, keep_alive_s), media_type="application/json")
        self._task = task

    async def _lines(self, task: asyncio.Future[Mapping[str, Any]], keep_alive_s: float) -> AsyncIterator[bytes]:
        while not task.done():
            yield b"\n"
            await asyncio.wait({task}, timeout=keep_alive_s)
        try:
            body = task.result()
        except RequestError as error:
            body = error_body(error)
        except ClientGone:
            return
        yield bytes(JSONResponse(body).body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._task.cancel()
