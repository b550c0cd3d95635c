"""Bytes passed on as they come: mode observe, and what is not judged. A tap reads an answer beside its way.

The tap reads after the last byte was handed over, so that judging costs the client no time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, unquote

from starlette.background import BackgroundTask
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from rorqual import log
from rorqual.errors import RequestError
from rorqual.referee import Answer, Asked, Options, read_answer
from rorqual.server.accounts import Ticket, account_of
from rorqual.server.gateway_usage import BYTES_A_TOKEN, Spent, estimate
from rorqual.server.gateway_wire import Assembler, SseReader, encode, headers_back
from rorqual.server.sse import unless_gone

if TYPE_CHECKING:
    from rorqual.server.gateway import Gateway

logger = log.get(__name__)

DEFAULT_MAX_TOKENS = 8192
"""Reserved for requests that name no bound."""


class Meter:
    """What a ticket follows: the usage of a request's upstream calls so far, and a way to end it."""

    def __init__(self) -> None:
        self.usage: dict[str, Any] = {}
        self.error: Exception | None = None
        self.timing = SimpleNamespace(queue_s=0.0, first_token_s=0.0)
        self.task: asyncio.Task[Any] | None = None
        self._began = time.monotonic()

    def first_token(self) -> None:
        if not self.timing.first_token_s:
            self.timing.first_token_s = time.monotonic() - self._began

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


async def admit(gateway: Gateway, http: HttpRequest, asked: Asked, num_bytes: int, rounds: int, meter: Meter) -> Ticket:
    """A ticket for a chat request, with the most its rounds may cost. Raises: RequestError 402, 429.

    The gateway has no tokenizer: a prompt is taken for a token every three bytes, and what was really used is charged.
    """
    body = asked.body
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    most = limit if isinstance(limit, int) and limit > 0 else DEFAULT_MAX_TOKENS
    ticket = await gateway.operations.accounts.admit(
        http,
        str(body.get("model", "")),
        prompt_tokens=(num_bytes // 3 + 1) * rounds,
        max_tokens=most * rounds,
        user_id=str(body.get("user_id") or body.get("user") or ""),
    )
    ticket.follow(meter, lambda: meter.usage)
    return ticket


async def relay(gateway: Gateway, http: HttpRequest, raw: bytes) -> Response:
    """Pass a request on that is not judged, with this body; where it makes a model work, it is counted like any other.

    Raises: RequestError 404 for a path that leads elsewhere upstream, 402 and 429 where the key may not.
    """
    path = _path(http)
    meter = Meter()
    spent = Spent(len(raw), writes="embeddings" not in path)
    if http.method == "POST" and not path.endswith("/count_tokens"):
        ticket = await admit(gateway, http, Asked(_fields(raw)), len(raw), 1, meter)
        ticket.follow(meter, lambda: spent.usage)
    try:
        return await unless_gone(http, _relayed(gateway, http, path, raw, meter, spent))
    except RequestError as error:
        meter.error = error
        raise


async def _relayed(gateway: Gateway, http: HttpRequest, path: str, raw: bytes, meter: Meter, spent: Spent) -> Response:
    stack = AsyncExitStack()
    headers = gateway.upstream.headers(http.headers)
    try:
        response = await stack.enter_async_context(
            gateway.upstream.send(http.method, path, headers, raw, http.url.query)
        )
        back, status = headers_back(response.headers), response.status_code
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            return _Relayed(stack, _pieces(gateway, response, _Counter(meter, spent)), status, back)
        content = await gateway.upstream.read(response)
    except BaseException:
        await stack.aclose()
        raise
    await stack.aclose()
    spent.whole(content)
    if status >= 400:
        meter.error = gateway.upstream.refusal(response, content)
    return Response(content, status, back)


class _Watcher(Protocol):
    """What looks at pieces that are passed on."""

    def piece(self, piece: bytes) -> None: ...
    def ended(self) -> None: ...
    def broken(self, error: RequestError) -> None: ...


class _Counter:
    """Reads what a stream used."""

    def __init__(self, meter: Meter, spent: Spent) -> None:
        self._meter, self._spent, self._reader = meter, spent, SseReader()

    def piece(self, piece: bytes) -> None:
        self._meter.first_token()
        for data in self._reader.feed(piece):
            self._spent.event(data)

    def ended(self) -> None:
        """There is nothing to do then."""

    def broken(self, error: RequestError) -> None:
        self._meter.error = error


def _fields(raw: bytes) -> Mapping[str, Any]:
    """What a ticket is drawn by, of a body that is the upstream's to judge."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _path(http: HttpRequest) -> str:
    """The path as it was sent: `http.url` is put together with the Host header, which a client writes as it likes."""
    raw = http.scope.get("raw_path")
    path = quote(http.scope["path"]) if raw is None else bytes(raw).partition(b"?")[0].decode("latin-1")
    if {".", ".."} & set(unquote(path).split("/")):  # resolved, it would be another endpoint's, with the gateway's key
        raise RequestError(f"{path} has dots for a name. Write the path out.", status=404)
    return path


async def observe(
    gateway: Gateway,
    http: HttpRequest,
    asked: Asked,
    options: Options,
    headers: Mapping[str, str],
    owner: str,
    raw: bytes | None,
) -> Response:
    """Pass a chat request on and its answer back, unchanged; look at it afterwards.

    raw: the body, where it is as it came.

    Only a refusal for reasoning that a client dropped is not passed back: the request is sent once more with none.
    """
    content = encode(asked.body) if raw is None else raw
    meter = Meter()
    ticket = await admit(gateway, http, asked, len(content), 1, meter)
    tap = _Tap(gateway, http, asked, options, owner, meter, ticket, len(content))
    return await unless_gone(http, _observed(gateway, asked, headers, content, tap))


async def _observed(gateway: Gateway, asked: Asked, headers: Mapping[str, str], content: bytes, tap: _Tap) -> Response:
    stack = AsyncExitStack()
    try:
        response = await stack.enter_async_context(
            gateway.upstream.send("POST", "/v1/chat/completions", headers, content)
        )
        if response.status_code == 400:
            refusal = await gateway.upstream.read(response)
            if gateway.threads.wants_reasoning(asked.body, refusal):
                body, found = gateway.threads.without(asked.body)
                if found:
                    await stack.aclose()
                    response = await stack.enter_async_context(
                        gateway.upstream.send("POST", "/v1/chat/completions", headers, encode(body))
                    )
        back = headers_back(response.headers)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            answer = await gateway.upstream.read(response)
            await stack.aclose()
            tap.whole(response.status_code, answer)
            return Response(answer, response.status_code, back, background=BackgroundTask(tap.look))
    except BaseException as error:
        await stack.aclose()
        if isinstance(error, RequestError):
            tap.meter.error = error
            tap.failed(error)
        elif isinstance(error, asyncio.CancelledError):
            tap.close()
        raise
    return _Relayed(stack, _pieces(gateway, response, tap), response.status_code, back, tap)


class _Relayed(StreamingResponse):
    """A body passed on. The upstream's connection ends with it, also when the client goes away."""

    def __init__(
        self,
        stack: AsyncExitStack,
        pieces: AsyncIterator[bytes],
        status: int,
        headers: dict[str, str],
        tap: _Tap | None = None,
    ) -> None:
        super().__init__(pieces, status, headers, background=None if tap is None else BackgroundTask(tap.look))
        self._stack, self._tap = stack, tap

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._tap is not None:
                self._tap.close()
            await self._stack.aclose()


async def _pieces(gateway: Gateway, response: Any, watcher: _Watcher) -> AsyncIterator[bytes]:
    try:
        if response.is_stream_consumed:
            watcher.piece(response.content)
            yield response.content
        else:
            async for piece in response.aiter_bytes():
                watcher.piece(piece)
                yield piece
    except gateway.upstream.errors as error:
        watcher.broken(gateway.upstream.failure(error))
        raise  # the client's connection breaks as the upstream's did
    watcher.ended()


class _Tap:
    """Reads what was passed on."""

    def __init__(
        self,
        gateway: Gateway,
        http: HttpRequest,
        asked: Asked,
        options: Options,
        owner: str,
        meter: Meter,
        ticket: Ticket,
        num_bytes: int,
    ) -> None:
        self._num_bytes = num_bytes
        self._gateway, self._http, self._asked, self._options = gateway, http, asked, options
        self._owner, self.meter, self._ticket = owner, meter, ticket
        self._began = time.monotonic()
        self._parts: list[bytes] = []
        self._answer: Answer | None = None
        self._has_looked = False
        self._status = 200
        self._tickets: list[Ticket] = http.scope["state"]["tickets"] if "state" in http.scope else []
        if not ticket.is_held:  # nothing is reserved: it is settled behind the answer, not before its last byte
            self._tickets.remove(ticket)
        self.failure: RequestError | None = None

    def piece(self, piece: bytes) -> None:
        self.meter.first_token()
        self._parts.append(piece)

    def whole(self, status: int, content: bytes) -> None:
        """A whole body: only its usage is needed before it is sent."""
        self._status, self._parts = status, [content]
        if status == 200:
            self._read(lambda: read_answer(json.loads(content)))

    def broken(self, error: RequestError) -> None:
        """The upstream broke off."""
        self.meter.error = self.failure = error

    def ended(self) -> None:
        """All pieces are there."""
        reader, assembler = SseReader(), Assembler()

        def read() -> Answer:
            for data in reader.feed(b"".join(self._parts)):
                if data != "[DONE]":
                    assembler.feed(json.loads(data))
            return assembler.answer()

        self._read(read)

    def _read(self, read: Any) -> None:
        try:
            self._answer = read()
        except (RequestError, ValueError, TypeError, AttributeError, RecursionError) as error:
            self.failure = RequestError(f"the answer could not be read: {error}", status=502)
            return
        self.meter.usage = dict(self._answer.usage or self._estimate())

    async def look(self) -> None:
        """Judge, remember and record it; whatever goes wrong here is no business of the client's."""
        self._has_looked = True
        self._give_ticket_back()
        try:
            await asyncio.sleep(0)  # the answer's last bytes go first
            await self._look()
        except Exception:
            logger.exception("an answer could not be observed")

    def failed(self, error: RequestError) -> None:
        """There is no answer."""
        self._give_ticket_back()
        self._record_failure(str(error), error.status)

    def close(self) -> None:
        """The exchange is over; one that ended in its middle is recorded as that."""
        self._give_ticket_back()
        if not self._has_looked:
            if self.failure is None and self._parts:  # the client left: what was written for it is charged
                self.meter.usage = self.meter.usage or self._estimate()
            self._record_failure(str(self.failure or "the client went away"), 499 if self.failure is None else 502)

    def _estimate(self) -> dict[str, Any]:
        """Usage that the upstream has not told: a token for every event, or for every four bytes of a whole answer."""
        events = sum(part.count(b"\ndata:") + part.startswith(b"data:") for part in self._parts)
        whole = 0 if events else sum(map(len, self._parts)) // BYTES_A_TOKEN
        return estimate(self._num_bytes // BYTES_A_TOKEN, events or whole)

    def _give_ticket_back(self) -> None:
        """From here on the end of the exchange settles it."""
        if self._ticket not in self._tickets:
            self._tickets.append(self._ticket)

    async def _look(self) -> None:
        answer, gateway = self._answer, self._gateway
        if answer is None or self._status != 200:
            self._record_failure(str(self.failure or "the upstream refused it"), self._status)
            return
        await gateway.threads.remember(self._owner, self._asked.body, answer.message())
        if self._options.mode == "off":
            return
        verdict = await gateway.referee.look(self._asked, answer, self._options)
        gateway.note(verdict.word)
        gateway.audit.verdict(
            self._asked, self._options, verdict, account=account_of(self._http), trace=self._ticket.asked.trace,
            duration_s=time.monotonic() - self._began, answer=answer,
        )  # fmt: skip

    def _record_failure(self, why: str, status: int) -> None:
        self._gateway.audit.failure(
            self._asked, self._options, why, status, account=account_of(self._http), trace=self._ticket.asked.trace,
            duration_s=time.monotonic() - self._began,
        )  # fmt: skip
