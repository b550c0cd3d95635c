"""The gateway's part of its OpenAPI document: its routes take what the upstream takes, so it is written by hand."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from rorqual.referee.policy import RefereeBody
from rorqual.server.anthropic.schema import MessagesRequest
from rorqual.server.openapi import STREAM
from rorqual.server.responses.schema import ResponsesRequest

_SCHEMAS: Final = "#/components/schemas/{model}"
_ANSWER: Final[dict[str, Any]] = {"200": {"description": "The answer.", "content": {"application/json": {}, **STREAM}}}
_PASSED: Final[dict[str, Any]] = {**_ANSWER, "default": {"description": "Whatever the upstream answers."}}
_CHAT: Final[dict[str, Any]] = {
    "type": "object",
    "description": "A chat request as the upstream takes it; `referee` is the gateway's own.",
    "required": ["messages"],
    "properties": {
        "model": {"type": "string"},
        "messages": {"type": "array", "items": {"type": "object"}},
        "stream": {"type": "boolean"},
        "tools": {"type": "array", "items": {"type": "object"}},
        "referee": {"$ref": _SCHEMAS.format(model="RefereeBody")},
    },
}


def describe(check: type[BaseModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Paths, and the schemas they refer to. check: the body of `/v1/referee/check`."""
    schemas: dict[str, Any] = {}
    for model in (RefereeBody, MessagesRequest, ResponsesRequest, check):
        schema = model.model_json_schema(ref_template=_SCHEMAS)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    for name in ("MessagesRequest", "ResponsesRequest"):
        schemas[name]["properties"]["referee"] = {"$ref": _SCHEMAS.format(model="RefereeBody")}

    def ref(name: str) -> dict[str, Any]:
        return {"$ref": _SCHEMAS.format(model=name)}

    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    anything = {"type": "object"}
    paths: dict[str, Any] = {
        "/v1/chat/completions": {"post": _post("A chat request, its answer judged.", _CHAT, _PASSED)},
        "/v1/responses": {"post": _post("The same in OpenAI's Responses API.", ref("ResponsesRequest"), _PASSED)},
        "/v1/messages": {"post": _post("The same in Anthropic's Messages API.", ref("MessagesRequest"), _PASSED)},
        "/v1/messages/count_tokens": {"post": _post("Passed on to the upstream.", anything, _PASSED)},
        "/v1/referee/check": {"post": _post("An answer somebody has, judged.", ref(check.__name__), _ANSWER)},
        "/v1/completions": {"post": _post("Passed on to the upstream.", anything, _PASSED)},
        "/v1/embeddings": {"post": _post("Passed on to the upstream.", anything, _PASSED)},
        "/v1/models": {"get": _get("The upstream's models.", _PASSED)},
        "/v1/models/{name}": {"get": {**_get("One of them.", _PASSED), "parameters": [named]}},
        "/health": {"get": _get("Whether new requests are taken.", _ANSWER)},
        "/stats": {"get": _get("Verdicts so far.", _ANSWER)},
        "/metrics": {"get": _get("Figures for Prometheus.", _text("text/plain"))},
    }
    return paths, schemas


def _post(summary: str, schema: dict[str, Any], responses: dict[str, Any]) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "requestBody": body, "responses": dict(responses)}


def _get(summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    return {"summary": summary, "responses": dict(responses)}


def _text(kind: str) -> dict[str, Any]:
    return {"200": {"description": "Text.", "content": {kind: {"schema": {"type": "string"}}}}}
