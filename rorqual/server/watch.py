"""Around every request: its trace id, its line in the log, its meters, and the end of what it was charged for."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.errors import RequestError
from rorqual.money import amount_text
from rorqual.server import logs
from rorqual.server.accounts import Outcome, Ticket, endpoint_of
from rorqual.server.drain import Drain
from rorqual.server.meters import Meters


class Watch:
    """ASGI middleware, the outermost. It leaves `trace` and `tickets` in the request's state, and reads `identity` and
    `refusal` there.
    """

    def __init__(self, app: ASGIApp, meters: Meters, drain: Drain) -> None:
        self._app, self._meters, self._drain = app, meters, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._meters, self._drain)
        token = logs.trace.set(exchange.trace)
        self._meters.running.inc()
        self._drain.enter(exchange.tickets)
        try:
            await self._app(scope, receive, exchange.send)
        except Exception:
            exchange.failed()
            raise
        finally:
            try:
                await exchange.close()
            finally:
                self._drain.leave(exchange.tickets)
                self._meters.running.dec()
                exchange.tell()
        logs.trace.reset(token)  # not after a failure, whose trace the server logs later


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, send: Send, meters: Meters, drain: Drain) -> None:
        self.trace = uuid.uuid4().hex
        self.tickets: list[Ticket] = []
        self._scope, self._send, self._meters, self._drain = scope, send, meters, drain
        self._state: dict[str, Any] = scope.setdefault("state", {})
        self._state.update(trace=self.trace, tickets=self.tickets)
        self._began = time.monotonic()
        self._status = 0
        self._is_whole = False  # the last byte of the answer went out
        self._is_stream = False
        self._num_parts, self._last_part = 0, 0.0
        self._gap: Callable[[float], None] | None = None

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on; what it cost is in the ledger before the last one leaves."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name in logs.TRACE_HEADERS:
                headers[name] = self.trace
            if self._drain.is_draining:
                headers["connection"] = "close"
            self._status = message["status"]
            self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            if self._is_stream:
                self._time_part(message.get("body", b""))
            if not message.get("more_body", False):
                self._is_whole = True
                await self.close()
        await self._send(message)

    def failed(self) -> None:
        """The application raised; an answer that had not begun becomes a 500 further out."""
        self._status = self._status if self._status >= 400 else 500
        for ticket in self.tickets:
            ticket.cancel(self._status)

    async def close(self) -> None:
        """End the tickets that are still open."""
        for ticket in self.tickets:
            await ticket.close(self._status, gone=not self._is_whole)

    def tell(self) -> None:
        """Write the line and the meters."""
        duration_s = time.monotonic() - self._began
        refusal: RequestError | None = self._state.get("refusal")
        endpoint = endpoint_of(self._scope)
        outcomes = [ticket.outcome for ticket in self.tickets if ticket.outcome is not None]
        is_gone = self._status == 499 or (not self._is_whole and self._status < 500)
        self._meters.answered(endpoint, self._status, duration_s, None if refusal is None else refusal.code)
        for outcome in outcomes:
            self._meters.ended(outcome)
        identity = self._state.get("identity")
        logs.write(
            {
                "trace": self.trace,
                "key": "" if identity is None else identity.account,
                "method": self._scope["method"],
                "endpoint": endpoint,
                "status": self._status,
                **_told(outcomes),
                "duration_s": round(duration_s, 6),
                "client_gone": is_gone,
                "refused": None if refusal is None else refusal.code,
            }
        )

    def _time_part(self, part: bytes) -> None:
        """Seconds between parts; the first opens the stream and the second brings the first token."""
        if not part or part.startswith(b":") or not self.tickets:
            return
        now = time.monotonic()
        self._num_parts += 1
        if self._num_parts > 2:
            if self._gap is None:
                self._gap = self._meters.gaps(self.tickets[0].asked.model)
            self._gap(now - self._last_part)
        self._last_part = now


def _told(outcomes: list[Outcome]) -> dict[str, Any]:
    """What the log says of the model's work; an exchange may have made it work several times."""
    if not outcomes:
        return {}
    used, last = [outcome.used for outcome in outcomes], outcomes[-1]
    first_s = outcomes[0].first_token_s
    return {
        "model": last.asked.model,
        "prompt_tokens": sum(one.prompt_tokens for one in used),
        "hit_tokens": sum(one.hit_tokens for one in used),
        "completion_tokens": sum(one.completion_tokens for one in used),
        "reasoning_tokens": sum(one.reasoning_tokens for one in used),
        "cost": amount_text(sum(one.cost for one in used)),
        "currency": last.currency,
        "first_token_s": None if first_s is None else round(first_s, 6),
        "finish": last.used.finish,
    }
