"""Every refusal leaves the server in one shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from rorqual.errors import RequestError, RorqualError
from rorqual.server.logs import TRACE_HEADERS
from rorqual.server.refusals import unknown_field

_ANTHROPIC = ("/anthropic/", "/v1/messages")


class ClientGone(Exception):
    """The client closed the connection before its whole answer was there."""


def error_body(error: RequestError, path: str = "") -> dict[str, Any]:
    """The JSON body of a refusal; on Anthropic's paths with what its clients look for besides."""
    # A message may quote the request, and JSON can carry half a surrogate pair, which UTF-8 cannot.
    message, param = (
        text.encode("utf-8", "replace").decode() if text is not None else None for text in (error.message, error.param)
    )
    body = {"error": {"message": message, "type": error.type, "param": param, "code": error.code}}
    return for_anthropic(body) if path.startswith(_ANTHROPIC) else body


def for_anthropic(body: dict[str, Any]) -> dict[str, Any]:
    """An error body with the mark that it is one, and the code, where it says more than the type, once more under
    the name it has there.
    """
    error = body["error"]
    details = {} if error["code"] == error["type"] else {"details": {"error_code": error["code"]}}
    return {"type": "error", "error": {**error, **details}}


def body_as_sent(body: bytes, path: str) -> bytes:
    """Another server's error body as it came, on Anthropic's paths with what its clients look for besides."""
    if not path.startswith(_ANTHROPIC):
        return body
    try:
        read = json.loads(body)
        if read.get("type") == "error":
            return body
        error = {"message": "", "type": "api_error", "param": None, "code": None, **read["error"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        error = {"message": body.decode("utf-8", "replace")[:2000], "type": "api_error", "param": None, "code": None}
        read = {}
    return json.dumps({**read, **for_anthropic({"error": error})}).encode()


def from_validation(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """The refusal for what pydantic found; unknown fields first, since a misspelt name explains the rest."""
    error = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    path = _path([part for part in error["loc"] if part != "body"])
    kind, given = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return unknown_field(path)
    if kind == "json_invalid":
        reason = error.get("ctx", {}).get("error", "invalid JSON")
        return RequestError(
            f"Failed to parse the request body as JSON: {reason} at byte {error['loc'][-1]}. Send one JSON object."
        )
    if kind == "missing" and path:
        return RequestError(f"missing field `{path}`: it is required. Add it to the request.", param=path)
    if kind == "literal_error":
        expected = error["ctx"]["expected"].replace("'", "`").replace(" or ", ", ")
        return RequestError(f"{path}: unknown variant `{given}`, expected one of {expected}", param=path)
    if kind == "string_unicode":
        shown = str(given).encode("utf-8", "replace").decode()
        return RequestError(
            f"{path or 'The request body'} holds the name or text `{shown}` with half of a surrogate pair, which is no "
            "character. Send the whole character, or remove the half.",
            param=path or shown,
        )
    if not path:
        return RequestError(
            "The request body is not a JSON object. Send one, with the header `Content-Type: application/json`."
        )
    shown = repr(given) if len(repr(given)) <= 80 else f"{repr(given)[:80]}…"
    return RequestError(f"{path}: {error['msg']} (got {shown}).", param=path)


def _path(parts: Sequence[str | int]) -> str:
    """`messages[0].role` from its parts."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


@contextmanager
def named_as_sent(**names: str) -> Iterator[None]:
    """Refusals of `key` name the field `value` instead, which is what the caller sent."""
    try:
        yield
    except RequestError as error:
        name = names.get(error.param or "")
        if name is None:
            raise
        message = error.message.replace(str(error.param), name)
        raise RequestError(message, status=error.status, type=error.type, param=name, code=error.code) from None


def install(app: FastAPI) -> None:
    """Make every failure answer in the one shape."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        request.state.refusal = error
        again = error.retry_after_s
        headers = None if again is None else {"retry-after": str(max(1, math.ceil(again)))}
        return JSONResponse(error_body(error, request.url.path), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(error_body(from_validation(error.errors()), request.url.path), 400)

    @app.exception_handler(ValidationError)
    async def invalid_inside(request: Request, error: ValidationError) -> JSONResponse:
        return JSONResponse(error_body(from_validation(error.errors()), request.url.path), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"There is nothing at {request.url.path}. The API is at /v1/chat/completions, the page at /."
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}."
        elif isinstance(error.__cause__, RecursionError):
            message = "The request body is JSON nested too deeply to be read. Send a flatter object."
        elif isinstance(error.__cause__, UnicodeDecodeError):
            message = f"The request body is not UTF-8 text ({error.__cause__}). Send JSON encoded as UTF-8."
        elif isinstance(error.__cause__, ValueError):  # Python's bound on the digits of an integer
            message = "The request body holds an integer of too many digits to be read. Send one that fits 64 bits."
        refusal = request.state.refusal = RequestError(message, status=error.status_code)
        return JSONResponse(error_body(refusal, request.url.path), error.status_code, headers=error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it; the number is the custom for this

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        known = isinstance(error, RorqualError)  # anything else is logged with its trace by the server
        message = str(error) if known else f"The server failed: {type(error).__name__}. Its log has the trace."
        # It is answered outside of what adds the trace.
        headers = dict.fromkeys(TRACE_HEADERS, getattr(request.state, "trace", ""))
        refusal = RequestError(message, status=500, type="server_error")
        return JSONResponse(error_body(refusal, request.url.path), 500, headers)
