"""Who may come in: nobody while the server goes away, and only known keys where it asks for them.

Open to all stay the pages with their files, the description of the API and `/health`, which say nothing about anybody.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rorqual.errors import RequestError
from rorqual.server.accounts import Accounts
from rorqual.server.auth import Identity, NoKey
from rorqual.server.drain import Drain
from rorqual.server.errors import error_body

_OPEN = ("/", "/dashboard", "/health", "/openapi.json")
_OPEN_WHILE_DRAINING = ("/health", "/metrics", "/stats")


class Gate:
    """ASGI middleware. It leaves the `identity` of the caller in the request's state, or the `refusal`."""

    def __init__(self, app: ASGIApp, accounts: Accounts, drain: Drain) -> None:
        self._app, self._accounts, self._drain = app, accounts, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._going_away(scope) or self._stranger(scope)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _going_away(self, scope: Scope) -> Response | None:
        if not self._drain.is_draining or scope["path"] in _OPEN_WHILE_DRAINING:
            return None
        error = RequestError(
            "This server is going away and takes no new requests. Send it again, to another one or later.",
            status=503,
            type="server_error",
            code="draining",
        )
        scope.setdefault("state", {})["refusal"] = error
        return JSONResponse(error_body(error, scope["path"]), 503, {"retry-after": "5", "connection": "close"})

    def _stranger(self, scope: Scope) -> Response | None:
        gatekeeper, headers = self._accounts.gatekeeper, Headers(scope=scope)
        path: str = scope["path"]
        state = scope.setdefault("state", {})
        if gatekeeper.is_open or path in _OPEN or path.startswith("/static/"):
            state["identity"] = Identity()
            return None
        sent = headers.get("authorization"), headers.get("x-api-key")
        try:
            state["identity"] = gatekeeper.identify(*sent)
            return None
        except NoKey:
            text = "Authentication Fails: no API key was sent. Send the header `Authorization: Bearer KEY`."
            state["refusal"] = RequestError(text, status=401, type="authentication_error")
            return PlainTextResponse(text, 401, {"www-authenticate": "Bearer"})
        except RequestError as error:
            state["refusal"] = error
            return JSONResponse(error_body(error, path), error.status, {"www-authenticate": "Bearer"})
