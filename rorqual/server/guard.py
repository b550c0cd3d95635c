"""What stands before every request: host names, body size, and headers that keep the page to itself.

A server on the loopback address is still reachable by any web page the user opens. Checking the Host header
stops a foreign name that was pointed at 127.0.0.1; requiring a JSON content type (done by FastAPI) makes
browsers ask first, and nothing here answers such a question. Keys and accounts are
asked for after it, in `gate.py`.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.errors import RequestError
from rorqual.server.errors import error_body

MAX_BODY_BYTES = 48 * 1024 * 1024
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Guard:
    """ASGI middleware. `allowed_hosts`: names that may stand in the Host header, None for any."""

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Collection[str] | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._app = app
        self._allowed = None if allowed_hosts is None else {host.lower() for host in allowed_hosts}
        self._max = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        if refusal is not None:
            scope.setdefault("state", {})["refusal"] = refusal
            await JSONResponse(error_body(refusal, scope["path"]), refusal.status)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max:
                refusal = self._too_large()  # FastAPI would make 400 of any other kind of exception
                raise HTTPException(refusal.status, refusal.message)
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, counted, with_headers)

    def _refusal(self, headers: Headers) -> RequestError | None:
        if self._allowed is not None:
            host = headers.get("host", "")
            name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
            if name.lower() not in self._allowed:
                return RequestError(
                    f"This server does not answer to the name {name!r}. Use http://127.0.0.1 with its port, "
                    "or start it with the host it should serve.",
                    status=403,
                )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max:
            return self._too_large()
        return None

    def _too_large(self) -> RequestError:
        return RequestError(
            f"The request body is larger than {self._max} bytes, the most this server reads. Send less.",
            status=413,
        )
