"""One chat request that is judged: asked upstream, checked, perhaps asked again, and answered whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from rorqual import log
from rorqual.errors import RequestError
from rorqual.referee import Answer, Asked, Options, Verdict
from rorqual.referee.answer import call_body, whole_characters
from rorqual.referee.budget import add_usage
from rorqual.referee.holdback import Holdback
from rorqual.referee.reasons import Finding
from rorqual.server.accounts import account_of
from rorqual.server.errors import ClientGone, error_body
from rorqual.server.gateway_relay import Meter, admit
from rorqual.server.gateway_wire import UpstreamRefusal, encode
from rorqual.server.sse import DONE, KEEP_ALIVE, gone, sse, whole_answer

if TYPE_CHECKING:
    from rorqual.server.gateway import Gateway

PATH = "/v1/chat/completions"

logger = log.get(__name__)


class Exchange:
    """A request and its answer. found: what was put back into the request."""

    def __init__(
        self,
        gateway: Gateway,
        http: HttpRequest,
        asked: Asked,
        options: Options,
        headers: Mapping[str, str],
        owner: str,
        found: Sequence[Finding],
    ) -> None:
        self._gateway, self._http, self._asked, self._options = gateway, http, asked, options
        self._headers, self._owner, self._found = headers, owner, list(found)
        self._meter = Meter()
        self._began = time.monotonic()
        self._trace = getattr(http.state, "trace", "")
        self._body = asked.body
        self._live: _Live | None = None
        self._is_streaming = False

    async def respond(self) -> Response:
        """Raises: RequestError before a byte is sent."""
        rounds = 1 + self._options.budget.max_rounds
        await admit(self._gateway, self._http, self._asked, len(encode(self._asked.body)), rounds, self._meter)
        if self._asked.body.get("stream"):
            return await self._stream()
        headers: dict[str, str] = {}
        response = await whole_answer(self._whole(headers), self._gateway.keep_alive_s)
        if not isinstance(response, StreamingResponse):
            response.headers.update(headers)
        return response

    # ---------------------------------------------------------------- judging

    async def _judged(self) -> Verdict:
        """The verdict, recorded and durable. Raises: RequestError when there is none."""
        gateway = self._gateway
        self._meter.task = asyncio.current_task()
        try:
            live = self._live
            sent = (lambda: live.sent) if live is not None else (lambda: "")
            verdict = await gateway.referee.judge(self._asked, self._options, self._ask, sent=sent)
        except RequestError as error:
            self._meter.error = error
            gateway.audit.failure(
                self._asked, self._options, error.message, error.status, account=account_of(self._http),
                trace=self._trace, duration_s=time.monotonic() - self._began,
            )  # fmt: skip
            raise
        verdict = replace(verdict, findings=(*self._found, *verdict.findings), usage=self._meter.usage or None)
        gateway.note(verdict.word)
        if verdict.answer is not None:
            message = verdict.answer.message()
            gateway.threads.remember(self._owner, self._asked.body, message)
        gateway.audit.verdict(
            self._asked, self._options, verdict, account=account_of(self._http), trace=self._trace,
            duration_s=time.monotonic() - self._began,
        )  # fmt: skip
        await gateway.audit.settled()
        return verdict

    async def _ask(self, body: dict[str, Any]) -> Answer:
        """One upstream call; a request is sent once more where reasoning that nobody has any more was asked for."""
        is_first = body.get("messages") is self._body.get("messages")
        live = self._live if is_first else None
        try:
            answer = await self._send(body, live)
        except UpstreamRefusal as refusal:
            threads = self._gateway.threads
            if refusal.status != 400 or not threads.wants_reasoning(body, refusal.body):
                raise
            filled, found = threads.without(body)
            if not found:
                raise
            self._found += found if is_first else ()
            answer = await self._send(dict(filled), live)
        self._meter.usage = add_usage(self._meter.usage, answer.usage) or {}
        return answer

    async def _send(self, body: dict[str, Any], live: _Live | None) -> Answer:
        upstream = self._gateway.upstream
        if not self._asked.body.get("stream"):
            return await upstream.whole(PATH, self._headers, body)
        options = body.get("stream_options")
        body = {**body, "stream_options": {**(options if isinstance(options, dict) else {}), "include_usage": True}}
        if live is None:
            return await upstream.streamed(PATH, self._headers, body, lambda delta: None)
        live.begin()

        def each(delta: Mapping[str, Any]) -> None:
            self._meter.first_token()
            live.take(delta)

        return await upstream.streamed(PATH, self._headers, body, each)

    # ---------------------------------------------------------------- whole

    async def _whole(self, headers: dict[str, str]) -> dict[str, Any]:
        verdict = await self._until_gone(self._judged())
        headers.update(verdict.headers())
        if verdict.answer is None:
            headers.clear()
            raise Rejected(verdict)
        answer = verdict.answer
        choice = {"index": 0, "message": answer.message(), "logprobs": answer.logprobs, "finish_reason": answer.finish}
        body = {**self._envelope(answer, "chat.completion"), "choices": [choice]}
        if verdict.usage is not None:
            body["usage"] = dict(verdict.usage)
        return {**body, "referee": verdict.to_dict()}

    async def _until_gone(self, work: Any) -> Any:
        """The result; the work is ended and ClientGone raised when the client goes away first."""
        task = asyncio.ensure_future(work)
        watcher = asyncio.ensure_future(gone(self._http))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            if task.cancelled():
                raise RequestError("The gateway is going away. Send it again.", status=503, type="server_error")
            return task.result()
        finally:
            task.cancel()
            watcher.cancel()

    def _envelope(self, answer: Answer | None, kind: str) -> dict[str, Any]:
        """The members around the choices, those of the upstream where it sent any."""
        given = dict(answer.envelope) if answer is not None else {}
        given.pop("referee", None)
        own = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._asked.body.get("model"),
        }
        return {**own, **given, "object": kind}

    # ---------------------------------------------------------------- streamed

    async def _stream(self) -> Response:
        """A stream whose status and headers wait for what is known within the first seconds."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._live = _Live(self, queue, self._options)
        headers: dict[str, str] = {"cache-control": "no-store"}
        task = asyncio.ensure_future(self._write(queue, headers))
        first = asyncio.ensure_future(queue.get())
        try:
            await asyncio.wait({first, task}, timeout=self._gateway.keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()  # a refusal before the first byte has a status of its own
        except BaseException:
            task.cancel()
            first.cancel()
            raise
        self._is_streaming = True
        return _Lines(self._lines(queue, first), task, headers)

    async def _lines(self, queue: asyncio.Queue[str | None], pending: asyncio.Future[str | None]) -> AsyncIterator[str]:
        while True:
            await asyncio.wait({pending}, timeout=self._gateway.keep_alive_s)
            if not pending.done():
                yield KEEP_ALIVE
                continue
            line = pending.result()
            if line is None:
                return
            yield line
            pending = asyncio.ensure_future(queue.get())

    async def _write(self, queue: asyncio.Queue[str | None], headers: dict[str, str]) -> None:
        """Everything the client gets, put into the queue. Raises: RequestError while nothing is on its way."""
        assert self._live is not None
        try:
            verdict = await self._judged()
            headers.update(verdict.headers())
            if verdict.answer is None and not self._has_begun:
                raise Rejected(verdict)
            for line in self._ending(verdict, self._live):
                queue.put_nowait(line)
        except RequestError as error:
            if not self._has_begun:
                raise
            queue.put_nowait(sse(error_body(error)))
        except Exception as error:
            if not self._has_begun:
                raise
            logger.exception("a stream failed")
            says = f"The gateway failed: {type(error).__name__}. Its log has the trace."
            queue.put_nowait(sse(error_body(RequestError(says, status=500, type="server_error"))))
        finally:
            if self._has_begun or not queue.empty():
                queue.put_nowait(None)

    @property
    def _has_begun(self) -> bool:
        """Whether the client has a status, or a byte is on its way."""
        return self._is_streaming or (self._live is not None and self._live.has_begun)

    def _ending(self, verdict: Verdict, live: _Live) -> list[str]:
        """What follows the text that was already sent."""
        answer, told = verdict.answer, verdict.to_dict()
        if answer is None:
            return [sse({**error_body(verdict.error()), "referee": told})]
        envelope = live.envelope or self._envelope(answer, "chat.completion.chunk")
        lines: list[str] = []

        def put(delta: dict[str, Any], finish: str | None = None, **more: Any) -> None:
            choice = {"index": 0, "delta": delta, "logprobs": more.pop("logprobs", None), "finish_reason": finish}
            lines.append(sse({**envelope, "choices": [choice], **more}))

        if not live.has_begun:
            put({"role": "assistant", "content": None if answer.reasoning or answer.calls else ""})
            if answer.reasoning:
                put({"reasoning_content": answer.reasoning})
        content = answer.content or ""
        if content.startswith(live.sent):
            rest = content[len(live.sent) :]
            if rest:
                put({"content": rest}, logprobs=answer.logprobs if not live.sent else None)
        else:  # what is out stays said; the correction is told apart from it
            told["correction"] = {"content": content, "sent_characters": len(live.sent)}
        if answer.refusal is not None:  # never sent before the verdict
            put({"refusal": answer.refusal})
        for index, call in enumerate(answer.calls):
            put({"tool_calls": [{"index": index, **call_body(call)}]})
        event = {**envelope, "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}]}
        lines.append("event: referee\n" + sse({**event, "referee": told}))
        put({}, answer.finish)
        options = self._asked.body.get("stream_options")
        if isinstance(options, Mapping) and options.get("include_usage") and verdict.usage is not None:
            lines.append(sse({**envelope, "choices": [], "usage": dict(verdict.usage)}))
        return [*lines, DONE]


class Rejected(UpstreamRefusal):
    """An answer that did not pass, as a refusal with the verdict in its body and headers."""

    def __init__(self, verdict: Verdict) -> None:
        error = verdict.error()
        body = encode({**error_body(error), "referee": verdict.to_dict()})
        RequestError.__init__(self, error.message, status=error.status, type=error.type, code=error.code)
        self.body, self.headers = body, {"content-type": "application/json", **verdict.headers()}


class _Live:
    """What goes out before the verdict, by the way of streaming. sent: content that the client has."""

    def __init__(self, exchange: Exchange, queue: asyncio.Queue[str | None], options: Options) -> None:
        self._exchange, self._queue, self._options = exchange, queue, options
        self._way = options.streaming
        self._holdback = Holdback(exchange._asked, options)
        self._reasoning = ""
        self.sent = ""
        self.has_begun = False
        self.envelope: dict[str, Any] = {}

    def begin(self) -> None:
        """Another attempt at the first answer. Raises: RequestError when part of an earlier one is out already."""
        if self.has_begun:
            raise RequestError(
                "The upstream broke off within an answer of which a part was already sent. Send the request again.",
                status=502,
                type="upstream_error",
            )
        self._holdback, self._reasoning = Holdback(self._exchange._asked, self._options), ""

    def take(self, delta: Mapping[str, Any]) -> None:
        """A delta of the upstream; calls always wait."""
        if self._way == "buffer":
            return
        reasoning = delta.get("reasoning_content")
        reasoning = delta.get("reasoning") if reasoning is None else reasoning
        reasoning = whole_characters(reasoning) if isinstance(reasoning, str) else None
        if reasoning:
            if self._way == "annotate_after":
                self._put({"reasoning_content": reasoning})
            else:
                self._reasoning += reasoning
        content = delta.get("content")
        content = whole_characters(content) if isinstance(content, str) else None
        if content:
            piece = content if self._way == "annotate_after" else self._holdback.feed(content)
            if piece:
                if self._reasoning:  # an answer whose text goes out is not asked for again
                    self._put({"reasoning_content": self._reasoning})
                    self._reasoning = ""
                self.sent += piece
                self._put({"content": piece})

    def _put(self, delta: dict[str, Any]) -> None:
        if not self.has_begun:
            self.has_begun = True
            self.envelope = self._exchange._envelope(None, "chat.completion.chunk")
            self._put({"role": "assistant", "content": None if "reasoning_content" in delta else ""})
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        self._queue.put_nowait(sse({**self.envelope, "choices": [choice]}))


class _Lines(StreamingResponse):
    """Server-Sent Events of a task, which ends with them."""

    def __init__(self, lines: AsyncIterator[str], task: asyncio.Future[None], headers: dict[str, str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._task = task

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._task.cancel()
            with contextlib.suppress(BaseException):
                await asyncio.gather(self._task, return_exceptions=True)
