"""The referee as a gateway: the same API in front of any OpenAI-style endpoint, its answers checked on the way.

`/v1/chat/completions` is judged (or, in mode observe, passed on byte for byte and judged afterwards). `/v1/responses`
and Anthropic's `/v1/messages` are translated and judged the same way; in mode observe they are passed on to an upstream
that has them, and translated for one that has chat completions alone. The list of models, completions and embeddings
pass through. `POST /v1/referee/check` judges an answer that somebody already has.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from rorqual.errors import RequestError
from rorqual.referee import Answer, Asked, Continuity, Options, Referee, options_of, read_answer, read_message
from rorqual.referee.audit import Audit
from rorqual.referee.reasons import Finding
from rorqual.server import dashboard, errors, gateway_api, openapi, page
from rorqual.server.accounts import account_of, owner_of
from rorqual.server.dashboard import Dashboard
from rorqual.server.gateway_chat import Exchange
from rorqual.server.gateway_dialects import MESSAGES, RESPONSES, Dialect
from rorqual.server.gateway_relay import observe, relay
from rorqual.server.gateway_speech import ChatSpeech, Speech
from rorqual.server.gateway_threads import Threads, owner_with_key
from rorqual.server.gateway_wire import Upstream, UpstreamRefusal, encode
from rorqual.server.operations import Operations

_PASSED_ON = ("/v1/models", "/v1/completions", "/v1/embeddings")
_NOT_THERE = (404, 405, 501)


@dataclass
class Gateway:
    """What every request shares. options: for requests that say nothing themselves. verdicts: how many of each word."""

    upstream: Upstream
    options: Options
    referee: Referee = field(default_factory=Referee)
    audit: Audit = field(default_factory=lambda: Audit(None))
    threads: Threads = field(default_factory=lambda: Threads(Continuity()))
    operations: Operations = field(default_factory=Operations)
    keep_alive_s: float = 10.0
    verdicts: Counter[str] = field(default_factory=Counter)
    dashboard: Dashboard = field(default_factory=Dashboard)
    _lacking: set[str] = field(default_factory=set)
    """Paths that the upstream does not have."""

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions. Raises: RequestError for what cannot be served."""
        raw = await http.body()
        body = read_body(raw)
        given = body.pop("referee", None)
        options = options_of(given, self.options)
        if options.mode in ("off", "observe"):
            headers, owner, sent, _ = await self._restored(http, body)
            as_came = raw if given is None and sent is body else None
            return await observe(self, http, Asked(sent), options, headers, owner, as_came)
        if body.get("n") not in (None, 1):
            raise RequestError(
                f"n is {body['n']}, and the referee judges one answer a request. Send n=1, or mode off.",
                param="n",
            )
        return await self._judged(http, body, options, ChatSpeech(body))

    async def translated(self, http: HttpRequest, dialect: Dialect) -> Response:
        """POST of a request in another dialect. Raises: RequestError for what cannot be served."""
        raw = await http.body()
        body = read_body(raw)
        given = body.pop("referee", None)
        options = options_of(given, self.options)
        path, passed = http.scope["path"], None
        if options.mode in ("off", "observe") and path not in self._lacking:
            passed = await relay(self, http, raw if given is None else encode(body))
            if passed.status_code not in _NOT_THERE or isinstance(passed, StreamingResponse):
                return passed
        try:
            asked, speech = dialect.read(body, self.threads.keeps)
            with errors.named_as_sent(**dialect.sent_as):
                answer = await self._judged(http, asked, options, speech)
        except RequestError:
            if passed is not None:  # it has neither, so its own words say more
                return passed
            raise
        if passed is not None:
            self._lacking.add(path)
        return answer

    async def _judged(self, http: HttpRequest, body: dict[str, Any], options: Options, speech: Speech) -> Response:
        headers, owner, sent, found = await self._restored(http, body)
        return await Exchange(self, http, Asked(sent), options, headers, owner, found, speech).respond()

    async def _restored(
        self, http: HttpRequest, body: dict[str, Any]
    ) -> tuple[dict[str, str], str, Mapping[str, Any], list[Finding]]:
        """Headers for the upstream, whose conversation it is, the request with what was dropped, and what that was."""
        headers = self.upstream.headers(http.headers)
        owner = owner_with_key(owner_of(http, _user(body)), {} if self.upstream.has_key else http.headers)
        sent, found = await self.threads.restore(owner, body)
        return headers, owner, sent, found

    async def check(self, http: HttpRequest) -> Response:
        """POST /v1/referee/check: an answer somebody has, judged without asking any model."""
        try:
            given = CheckBody.model_validate(read_body(await http.body()))
        except ValidationError as error:
            raise errors.from_validation(error.errors()) from None
        began = time.monotonic()
        options = options_of(given.referee or {}, self.options)
        if options.mode in ("off", "observe"):
            options = options_of({"mode": "annotate"}, options)
        asked = Asked(given.model_dump(exclude={"answer", "finish_reason", "referee"}, exclude_none=True))
        answer = _given(given)
        verdict = await self.referee.judge_answer(asked, answer, options)
        self.verdicts[verdict.word] += 1
        self.audit.verdict(
            asked, options, verdict, account=account_of(http), trace=getattr(http.state, "trace", ""),
            duration_s=time.monotonic() - began,
        )  # fmt: skip
        message = None if verdict.answer is None else verdict.answer.message()
        finish = None if verdict.answer is None else verdict.answer.finish
        refusal = errors.error_body(verdict.error())["error"] if verdict.word == "rejected" else None
        body = {"referee": verdict.to_dict(), "message": message, "finish_reason": finish, "error": refusal}
        return JSONResponse(body, headers=verdict.headers())

    def note(self, word: str) -> None:
        """Count a verdict."""
        self.verdicts[word] += 1

    async def close(self) -> None:
        """Close the upstream's connections and the journal."""
        await self.upstream.close()
        await self.audit.settled()
        self.threads.close()
        self.dashboard.close()
        self.audit.close()


class CheckBody(BaseModel):
    """The body of /v1/referee/check: a chat request, and its answer: a message or a completion."""

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: list[dict[str, Any]] = []
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    answer: dict[str, Any]
    finish_reason: str | None = None
    referee: dict[str, Any] | None = None

    @property
    def assumed_finish(self) -> str:
        """Of a bare message, which has none."""
        return "tool_calls" if self.answer.get("tool_calls") else "stop"


def create_gateway(gateway: Gateway, allowed_hosts: Collection[str] | None = None) -> FastAPI:
    """The application. allowed_hosts: names the Host header may carry; None allows any. It closes the gateway."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        yield
        await gateway.close()

    app = FastAPI(title="Rorqual referee", docs_url=None, redoc_url=None, lifespan=lifespan)
    errors.install(app)
    paths, schemas = gateway_api.describe(CheckBody)
    openapi.install(app, {**paths, **dashboard.PATHS}, schemas)
    gateway.operations.install(app, allowed_hosts)

    @app.exception_handler(UpstreamRefusal)
    async def refused(request: HttpRequest, error: UpstreamRefusal) -> Response:
        request.state.refusal = error
        return Response(errors.body_as_sent(error.body, request.url.path), error.status, dict(error.headers))

    async def chat(http: HttpRequest) -> Response:
        return await gateway.chat(http)

    async def check(http: HttpRequest) -> Response:
        return await gateway.check(http)

    async def passed_on(http: HttpRequest) -> Response:
        return await relay(gateway, http, await http.body())

    async def messages(http: HttpRequest) -> Response:
        return await gateway.translated(http, MESSAGES)

    async def responses(http: HttpRequest) -> Response:
        return await gateway.translated(http, RESPONSES)

    async def health(http: HttpRequest) -> Response:
        return JSONResponse({"status": "draining" if gateway.operations.drain.is_draining else "ok"})

    async def statistics(http: HttpRequest) -> Response:
        return JSONResponse(
            {"mode": gateway.options.mode, "policy_id": gateway.options.policy.id, "upstream": gateway.upstream.url,
             "verdicts": dict(gateway.verdicts), "repair_rates": gateway.referee.rates.to_dict()}
        )  # fmt: skip

    async def metrics(http: HttpRequest) -> Response:
        return PlainTextResponse(gateway.operations.meters.text(), media_type="text/plain; version=0.0.4")

    for prefix in ("/v1", ""):
        app.add_route(f"{prefix}/chat/completions", chat, ["POST"])
    app.add_route("/v1/referee/check", check, ["POST"])
    for path in _PASSED_ON:
        app.add_route(path, passed_on, ["GET", "POST"])
    app.add_route("/v1/models/{name:path}", passed_on, ["GET"])
    for path in ("/v1/responses", "/responses"):
        app.add_route(path, responses, ["POST"])
    for path in ("/v1/messages", "/anthropic/v1/messages", "/anthropic/messages"):
        app.add_route(path, messages, ["POST"])
        app.add_route(f"{path}/count_tokens", passed_on, ["POST"])
    app.add_route("/health", health, ["GET"])
    app.add_route("/stats", statistics, ["GET"])
    app.add_route("/metrics", metrics, ["GET"])
    dashboard.install(app, gateway.dashboard)
    page.install_files(app)
    return app


def read_body(raw: bytes) -> dict[str, Any]:
    """A request body. Raises: RequestError when it is no JSON object."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"Failed to parse the request body as JSON: {error}. Send one JSON object.") from error
    if not isinstance(body, dict):
        raise RequestError("The request body is not a JSON object. Send one.")
    return body


def _given(body: CheckBody) -> Answer:
    """The answer of a check. Raises: RequestError 400 where it is none."""
    try:
        if "choices" in body.answer:
            return read_answer(body.answer)
        return read_message(body.answer, body.finish_reason or body.assumed_finish)
    except (RequestError, TypeError, AttributeError):
        raise RequestError(
            "answer is neither an assistant's message nor a chat completion with one. Send it as a server gave it.",
            param="answer",
        ) from None


def _user(body: Mapping[str, Any]) -> str:
    return str(body.get("user_id") or body.get("user") or "")
