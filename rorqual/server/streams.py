"""Between the engine's thread and the event loop: token events as an async stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rorqual.engine import Engine, Request, SamplingParams, TokenEvent
from rorqual.server.errors import ClientGone, named_as_sent
from rorqual.server.schema import Extension
from rorqual.server.sse import gone
from rorqual.server.upstream import RemoteEngine, RemoteRequest


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
        with named_as_sent(timeout_s="rorqual.timeout_s", guard="rorqual.guard", pin="rorqual.pin"):
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
