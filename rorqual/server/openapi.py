"""The OpenAPI document: what FastAPI finds out, with every refusal in the shape and under the status it has here."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

REFUSALS: Final = {
    400: "The request cannot be served as it is; `param` names the field.",
    401: "No key, or a wrong one.",
    402: "The key's budget does not cover the request.",
    403: "The server does not answer to this host name.",
    404: "No such path or model.",
    405: "The path does not take this method.",
    413: "The body is larger than this server reads.",
    429: "Too many requests; `Retry-After` says when to ask again.",
    499: "The client closed the connection first.",
    500: "The server failed; its log says why.",
    503: "The model cannot run requests now.",
}
STREAM: Final[dict[str, Any]] = {"text/event-stream": {"schema": {"type": "string"}}}
"""The content of an answer with `stream`."""

_ERROR: Final[dict[str, Any]] = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What happened, why, and what to do."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def install(app: FastAPI, paths: Mapping[str, Any] | None = None, schemas: Mapping[str, Any] | None = None) -> None:
    """Make `app.openapi()` tell the truth about refusals. paths, schemas: of routes that FastAPI knows nothing of."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, paths or {}, schemas or {})
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _document(app: FastAPI, paths: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own shape, which is never sent
        schemas.pop(name, None)
    schemas["Error"] = _ERROR
    schemas.update(more)
    document["paths"].update(deepcopy(dict(paths)))
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            for status, words in REFUSALS.items():
                operation["responses"].setdefault(str(status), {"description": words, "content": body})
    return document
