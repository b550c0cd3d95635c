"""Between the engine's thread and the event loop: token events as an async stream, and Server-Sent Events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from rorqual.engine import Engine, Request, SamplingParams, TokenEvent
from rorqual.errors import RequestError
from rorqual.server.errors import ClientGone, error_body, named_as_sent
from rorqual.server.schema import Extension
from rorqual.server.upstream import RemoteEngine, RemoteRequest

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"


class TokenStream:
    """One engine request seen from the event loop; make it inside the loop.

    more: what the body's `rorqual` object asks for. cache_scope: as for `Engine.submit`.
    Raises: RequestError as `Engine.submit`.
    """

    def __init__(
        self,
        engine: Engine | RemoteEngine,
        tokens: Sequence[int],
        params: SamplingParams,
        more: Extension | None = None,
        cache_scope: str = "",
    ) -> None:
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenEvent] = asyncio.Queue()

        def listener(event: TokenEvent) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, event)

        more = more or Extension.model_validate({})
        if more.guard is not None:
            params = params.replace(guard=more.guard)
        with named_as_sent(timeout_s="rorqual.timeout_s", guard="rorqual.guard"):
            self.request: Request = engine.submit(
                tokens,
                params,
                priority=more.priority or 0,
                timeout_s=more.timeout_s,
                listener=listener,
                rendered=True,
                cache_scope=cache_scope,
            )

    async def accepted(self, patience_s: float) -> None:
        """Return once a request that runs on another server was taken there; others are taken when they are made.

        After `patience_s` without a word it returns as well, and a refusal comes as the stream's failure.
        Raises: the upstream's RequestError.
        """
        if isinstance(self.request, RemoteRequest):
            waiting = asyncio.shield(asyncio.wrap_future(self.request.taken))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(waiting, patience_s)

    async def batches(self, patience_s: float) -> AsyncIterator[list[TokenEvent]]:
        """Events in order, those that are ready together; an empty list after `patience_s` without any.

        Raises: the request's RequestError when it failed.
        """
        while True:
            try:
                events = [await asyncio.wait_for(self._queue.get(), patience_s)]
            except TimeoutError:
                yield []
                continue
            while not self._queue.empty():
                events.append(self._queue.get_nowait())
            if events[-1].finish_reason == "error":
                if events[:-1]:
                    yield events[:-1]
                assert self.request.error is not None
                raise self.request.error
            yield events
            if events[-1].finish_reason is not None:
                return

    async def collect(self, http: HttpRequest) -> list[TokenEvent]:
        """All events; when the client goes away first, the request is cancelled and ClientGone raised."""
        task = asyncio.ensure_future(self._all())
        watcher = asyncio.ensure_future(gone(http))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            return task.result()
        finally:
            task.cancel()
            watcher.cancel()
            self.request.cancel()

    async def _all(self) -> list[TokenEvent]:
        return [event async for batch in self.batches(3600.0) for event in batch]


async def gone(http: HttpRequest) -> None:
    """Return when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def sse(data: Mapping[str, Any]) -> str:
    """One event, compact JSON."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def sse_error(error: RequestError) -> str:
    """A failure inside a running stream; SDKs raise it. No `[DONE]` follows."""
    return sse(error_body(error))


class EventStream(StreamingResponse):
    """Server-Sent Events of one engine request, which is cancelled when the client goes away."""

    def __init__(self, lines: AsyncIterator[str], request: Request) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._request.cancel()


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
