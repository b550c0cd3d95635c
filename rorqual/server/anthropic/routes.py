"""The paths of the dialect: under /anthropic as on the hosted API, and those without it that are not OpenAI's."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rorqual.errors import RequestError
from rorqual.server import openapi
from rorqual.server.anthropic.answer import answer, count_tokens
from rorqual.server.anthropic.schema import MessagesRequest
from rorqual.server.served import ServedModel
from rorqual.server.service import Service

_UNKNOWN_DATE = "1970-01-01T00:00:00Z"
_PAGING: dict[str, Any] = {
    "parameters": [
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000}},
        {"name": "after_id", "in": "query", "schema": {"type": "string"}},
        {"name": "before_id", "in": "query", "schema": {"type": "string"}},
    ]
}


def make_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/anthropic/v1/messages", responses={200: {"content": openapi.STREAM}})
    @router.post("/anthropic/messages", include_in_schema=False)
    @router.post("/v1/messages", include_in_schema=False)
    async def messages(body: MessagesRequest, http: HttpRequest) -> Response:
        return await answer(body, http, service)

    @router.post("/anthropic/v1/messages/count_tokens")
    @router.post("/anthropic/messages/count_tokens", include_in_schema=False)
    @router.post("/v1/messages/count_tokens", include_in_schema=False)
    async def count(body: MessagesRequest, http: HttpRequest) -> Response:
        return await count_tokens(body, http, service)

    @router.get("/anthropic/v1/models", openapi_extra=_PAGING)
    async def models(http: HttpRequest) -> dict[str, Any]:
        return list_models(http, service)

    @router.get("/anthropic/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return describe(service.find(name, status=404, claude=True))

    @router.get("/anthropic", include_in_schema=False)
    @router.head("/anthropic", include_in_schema=False)
    async def base() -> dict[str, str]:
        """What clients find that only look whether anybody is there."""
        return {"messages": "/anthropic/v1/messages", "models": "/anthropic/v1/models"}

    return router


def describe(model: ServedModel) -> dict[str, Any]:
    """A model in Anthropic's words."""
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": _UNKNOWN_DATE,
        "lifecycle": "active",
        "max_input_tokens": model.engine.context_limit,
        "max_tokens": model.max_output,
    }


def list_models(http: HttpRequest, service: Service) -> dict[str, Any]:
    """A page of models: `limit` of them (20 unless given) after `after_id` or before `before_id`.

    Raises: RequestError naming the parameter that is wrong.
    """
    query, names = http.query_params, list(service.models)
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit) <= 1000):
        raise RequestError(f"limit is {limit}, but a page has 1 to 1000 models. Leave it out for 20.", param="limit")
    after, before = _place(query.get("after_id"), "after_id", names), _place(query.get("before_id"), "before_id", names)
    if before is not None:
        first, end = max(0, before - int(limit)), before
        has_more = first > 0
    else:
        first = 0 if after is None else after + 1
        end = min(len(names), first + int(limit))
        has_more = end < len(names)
    page = names[first:end]
    return {
        "data": [describe(service.models[name]) for name in page],
        "has_more": has_more,
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }


def _place(name: str | None, field: str, names: list[str]) -> int | None:
    if name is None:
        return None
    if name not in names:
        raise RequestError(f"{field} is {name!r}, which is no model here. Use an id of the list.", param=field)
    return names.index(name)
