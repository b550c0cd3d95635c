"""One chat request that is judged: asked upstream, checked, perhaps asked again, and answered whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from rorqual import log
from rorqual.errors import RequestError
from rorqual.referee import Answer, Asked, Options, Verdict
from rorqual.referee.answer import whole_characters
from rorqual.referee.budget import add_usage
from rorqual.referee.holdback import Holdback
from rorqual.referee.reasons import Finding
from rorqual.server.accounts import account_of
from rorqual.server.gateway_dialects import deltas_of
from rorqual.server.gateway_relay import Meter, admit
from rorqual.server.gateway_speech import Rejected, Speech
from rorqual.server.gateway_wire import READ_FIELDS, UpstreamRefusal, encode
from rorqual.server.sse import unless_gone, whole_answer

if TYPE_CHECKING:
    from rorqual.server.gateway import Gateway

PATH = "/v1/chat/completions"

logger = log.get(__name__)


class Exchange:
    """A request and its answer. speech: the client's words. found: what was put back into the request."""

    def __init__(
        self,
        gateway: Gateway,
        http: HttpRequest,
        asked: Asked,
        options: Options,
        headers: Mapping[str, str],
        owner: str,
        found: Sequence[Finding],
        speech: Speech,
    ) -> None:
        self._gateway, self._http, self._asked, self._options = gateway, http, asked, options
        self._headers, self._owner, self._found = headers, owner, list(found)
        self._meter = Meter()
        self._began = time.monotonic()
        self._trace = getattr(http.state, "trace", "")
        self._body, self._speech = asked.body, speech
        self._is_judged = options.mode not in ("off", "observe")
        self._live: _Live | None = None
        self._is_streaming = False

    async def respond(self) -> Response:
        """Raises: RequestError before a byte is sent."""
        rounds = 1 + (self._options.budget.max_rounds if self._is_judged else 0)
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
            if self._is_judged:
                verdict = await gateway.referee.judge(self._asked, self._options, self._ask, sent=sent)
            else:
                answer = await self._ask(dict(self._asked.body))
                verdict = await gateway.referee.look(self._asked, answer, self._options)
        except RequestError as error:
            self._meter.error = error
            gateway.audit.failure(
                self._asked, self._options, error.message, error.status, account=account_of(self._http),
                trace=self._trace, duration_s=time.monotonic() - self._began,
            )  # fmt: skip
            raise
        verdict = replace(verdict, findings=(*self._found, *verdict.findings), usage=self._meter.usage or None)
        if verdict.answer is not None:
            message = verdict.answer.message()
            await gateway.threads.remember(self._owner, self._asked.body, message)
        if self._options.mode == "off":
            return verdict
        gateway.note(verdict.word)
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
            return await upstream.streamed(PATH, self._headers, body, lambda choice: None)
        live.begin()

        def each(choice: Mapping[str, Any]) -> None:
            self._meter.first_token()
            live.take(choice)

        return await upstream.streamed(PATH, self._headers, body, each)

    # ---------------------------------------------------------------- whole

    async def _whole(self, headers: dict[str, str]) -> dict[str, Any]:
        verdict = await unless_gone(self._http, self._judged())
        if verdict.answer is None:
            raise Rejected(verdict, self._speech)
        headers.update(self._headers_of(verdict))
        return self._speech.whole(verdict.answer, verdict.usage, self._told(verdict))

    def _told(self, verdict: Verdict) -> dict[str, Any] | None:
        return verdict.to_dict() if self._is_judged else None

    def _headers_of(self, verdict: Verdict) -> dict[str, str]:
        return verdict.headers() if self._is_judged else {}

    # ---------------------------------------------------------------- streamed

    async def _stream(self) -> Response:
        """A stream whose status and headers wait for what is known within the first seconds."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._live = _Live(self._asked, self._options, self._speech, queue)
        headers: dict[str, str] = {"cache-control": "no-store"}
        task = asyncio.ensure_future(self._write(queue, headers))
        first: str | None = ""
        try:
            with contextlib.suppress(TimeoutError):
                patience = self._gateway.keep_alive_s
                first = await unless_gone(self._http, asyncio.wait_for(queue.get(), patience))
            if first is None or (first == "" and task.done() and queue.empty()):
                await task  # a refusal before the first byte has a status of its own
        except BaseException:
            task.cancel()
            raise
        self._is_streaming = True
        return _Lines(self._lines(queue, first), task, headers)

    async def _lines(self, queue: asyncio.Queue[str | None], line: str | None) -> AsyncIterator[str]:
        while line is not None:
            yield line or self._speech.keep_alive()
            try:
                line = await asyncio.wait_for(queue.get(), self._gateway.keep_alive_s)
            except TimeoutError:
                line = ""

    async def _write(self, queue: asyncio.Queue[str | None], headers: dict[str, str]) -> None:
        """Everything the client gets, put into the queue; None ends it.

        Raises: RequestError while nothing is on its way.
        """
        assert self._live is not None
        try:
            verdict = await self._judged()
            headers.update(self._headers_of(verdict))
            if verdict.answer is None and not self._has_begun:
                raise Rejected(verdict, self._speech)
            for line in self._ending(verdict, self._live):
                queue.put_nowait(line)
        except RequestError as error:
            if not self._has_begun:
                raise
            queue.put_nowait(self._speech.failed(error))
        except Exception as error:
            if not self._has_begun:
                raise
            logger.exception("a stream failed")
            says = f"The gateway failed: {type(error).__name__}. Its log has the trace."
            queue.put_nowait(self._speech.failed(RequestError(says, status=500, type="server_error")))
        finally:
            queue.put_nowait(None)

    @property
    def _has_begun(self) -> bool:
        """Whether the client has a status, or a byte is on its way."""
        return self._is_streaming or (self._live is not None and self._live.has_begun)

    def _ending(self, verdict: Verdict, live: _Live) -> list[str]:
        """What follows the text that was already sent."""
        answer, told, speech = verdict.answer, self._told(verdict), self._speech
        if answer is None:
            return [speech.failed(verdict.error(), told)]
        lines: list[str] = []
        if not live.has_begun:
            speaks_first = not answer.reasoning and not answer.calls
            lines.append(speech.begin(answer, speaks_first=speaks_first, usage=verdict.usage))
        content = answer.content or ""
        if not content.startswith(live.sent):  # what is out stays said; the correction is told apart from it
            if told is not None:
                told["correction"] = {"content": content, "sent_characters": len(live.sent)}
            content = live.sent
        logprobs = None if live.has_told_logprobs else answer.logprobs
        for delta in deltas_of(replace(answer, content=content[len(live.sent) :], calls=answer.calls)):
            if "reasoning_content" in delta:
                if not live.has_begun:  # else it went before the text
                    lines.append(speech.delta({answer.reasoning_name: answer.reasoning}))
                continue
            is_text = "content" in delta
            lines.append(speech.delta(delta, logprobs if is_text else None))
            logprobs = None if is_text else logprobs
        lines += [speech.delta(delta) for delta in answer.deltas[live.num_others :]]
        if told is not None:
            lines.append(speech.verdict(told))
        lines.append(speech.end(answer.finish, verdict.usage, told, logprobs))
        return [line for line in lines if line]


class _Live:
    """What goes out before the verdict, by the way of streaming. sent: content that the client has.

    num_others: how many deltas it has with fields that nobody here reads. has_told_logprobs: they went with the text.
    """

    def __init__(self, asked: Asked, options: Options, speech: Speech, queue: asyncio.Queue[str | None]) -> None:
        self._asked, self._options, self._speech, self._queue = asked, options, speech, queue
        self._way = options.streaming
        self._holdback = Holdback(asked, options)
        self._reasoning, self._reasoning_name = "", "reasoning_content"
        self.sent = ""
        self.num_others = 0
        self.has_begun = self.has_told_logprobs = False

    def begin(self) -> None:
        """Another attempt at the first answer. Raises: RequestError when part of an earlier one is out already."""
        if self.has_begun:
            raise RequestError(
                "The upstream broke off within an answer of which a part was already sent. Send the request again.",
                status=502,
                type="upstream_error",
            )
        self._holdback, self._reasoning = Holdback(self._asked, self._options), ""

    def take(self, choice: Mapping[str, Any]) -> None:
        """A choice with a delta of the upstream; calls always wait."""
        if self._way == "buffer":
            return
        delta = choice["delta"]
        is_live = self._way == "annotate_after"
        name = "reasoning" if delta.get("reasoning_content") is None else "reasoning_content"
        reasoning = _whole(delta.get(name))
        if reasoning:
            self._reasoning_name = name
            if is_live:
                self._put({name: reasoning})
            else:
                self._reasoning += reasoning
        content = _whole(delta.get("content"))
        if content:
            piece = content if is_live else self._holdback.feed(content)
            if piece:
                if self._reasoning:  # an answer whose text goes out is not asked for again
                    self._put({self._reasoning_name: self._reasoning})
                    self._reasoning = ""
                self.sent += piece
                logprobs = choice.get("logprobs") if is_live and "logprobs" in self._asked.body else None
                self.has_told_logprobs |= logprobs is not None
                self._put({"content": piece}, logprobs)
        others = {key: value for key, value in delta.items() if key not in READ_FIELDS}
        if others and is_live:
            self.num_others += 1
            self._put(others)

    def _put(self, delta: dict[str, Any], logprobs: Any = None) -> None:
        if not self.has_begun:
            self.has_begun = True
            self._queue.put_nowait(self._speech.begin(None, speaks_first="content" in delta))
        line = self._speech.delta(delta, logprobs)
        if line:
            self._queue.put_nowait(line)


def _whole(text: Any) -> str | None:
    return whole_characters(text) if isinstance(text, str) else None


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
