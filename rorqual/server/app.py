"""The HTTP application: routes and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rorqual.engine import Engine
from rorqual.server import chat, completions, dashboard, errors, openapi, page
from rorqual.server.accounts import account_of
from rorqual.server.anthropic import routes as anthropic
from rorqual.server.dashboard import Dashboard
from rorqual.server.engine_view import engine_picks, engine_view
from rorqual.server.metadata import metrics, statistics
from rorqual.server.operations import Operations
from rorqual.server.responses import answer as responses
from rorqual.server.responses.schema import ResponsesRequest
from rorqual.server.schema import ChatRequest, CompletionRequest
from rorqual.server.served import ServedModel
from rorqual.server.service import Behaviour, make_service
from rorqual.server.upstream import RemoteEngine


def create_app(
    engine: Engine | RemoteEngine,
    model_name: str = "minke",
    *,
    revision: str = "2026-04",
    others: Sequence[ServedModel] = (),
    behaviour: Behaviour | None = None,
    keep_alive_s: float = 10.0,
    allowed_hosts: Collection[str] | None = None,
    operations: Operations | None = None,
    shown: Dashboard | None = None,
) -> FastAPI:
    """The API and the page for one model, or several.

    revision: the prompt format the checkpoint was trained with.
    others: further models; the first one is what the page offers first.
    behaviour: where the server differs from the hosted one.
    keep_alive_s: a waiting stream gets a comment line this often.
    allowed_hosts: names the Host header may carry; None allows any. `run` sets it for loopback addresses.
    operations: accounts, log, meters and what else running a server for others takes.
    shown: the evals and verdicts of the dashboard.
    The engines stay the caller's to close. Raises: ConfigError when two models share a name.
    """
    operations = operations or Operations()
    offered = [ServedModel(model_name, engine, revision), *others]
    service = make_service(offered, behaviour, keep_alive_s, operations.accounts)
    models = service.models
    # FastAPI's own documentation pages load scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="Rorqual", docs_url=None, redoc_url=None)
    errors.install(app)
    openapi.install(app, dashboard.PATHS)
    operations.install(app, allowed_hosts)

    streams: dict[int | str, dict[str, Any]] = {200: {"content": openapi.STREAM}}

    @app.post("/v1/chat/completions", responses=streams)
    @app.post("/chat/completions", include_in_schema=False)
    @app.post("/beta/chat/completions", include_in_schema=False)
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        return await chat.answer(body, http, service)

    @app.post("/v1/responses", responses=streams)
    @app.post("/responses", include_in_schema=False)
    async def responses_(body: ResponsesRequest, http: HttpRequest) -> Response:
        return await responses.answer(body, http, service)

    @app.post("/beta/completions", responses=streams)
    @app.post("/v1/completions", include_in_schema=False)
    @app.post("/completions", include_in_schema=False)
    async def text_completions(body: CompletionRequest, http: HttpRequest) -> Response:
        return await completions.answer(body, http, service)

    app.include_router(anthropic.make_router(service))

    def describe(model: ServedModel) -> dict[str, object]:
        return {"id": model.name, "object": "model", "owned_by": "rorqual"}

    @app.get("/v1/models")
    @app.get("/models", include_in_schema=False)
    @app.get("/beta/models", include_in_schema=False)
    async def list_models(http: HttpRequest) -> dict[str, object]:
        if "anthropic-version" in http.headers:  # that API has the same path
            return anthropic.list_models(http, service)
        return {"object": "list", "data": [describe(model) for model in models.values()]}

    @app.get("/v1/models/{name:path}")
    @app.get("/models/{name:path}", include_in_schema=False)
    @app.get("/beta/models/{name:path}", include_in_schema=False)
    async def one_model(name: str) -> dict[str, object]:
        return describe(service.find(name, status=404))

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> JSONResponse:
        """200 while every engine can run requests and new ones are taken, else 503."""
        alive = all(model.engine.is_alive for model in models.values())
        state = {}
        for name, model in models.items():
            running, waiting = model.engine.occupancy()
            state[name] = {"running": running, "waiting": waiting}
        status = "failed" if not alive else "draining" if operations.drain.is_draining else "ok"
        return JSONResponse({"status": status, "models": state}, 200 if status == "ok" else 503)

    @app.get("/stats")
    async def stats() -> JSONResponse:
        """What every engine and its cache have done and are doing, in numbers."""
        return JSONResponse({name: statistics(model) for name, model in models.items()})

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> PlainTextResponse:
        """The same for Prometheus."""
        return PlainTextResponse(metrics(models) + operations.meters.text(), media_type="text/plain; version=0.0.4")

    @app.get("/engine/view")
    async def view(http: HttpRequest) -> JSONResponse:
        """What every engine is doing now: requests and their phases, memory by kind, the last steps."""
        return JSONResponse(await run_in_threadpool(engine_view, service, account_of(http)))

    @app.get("/engine/picks")
    async def picks(request: str, http: HttpRequest) -> JSONResponse:
        """Which blocks of its context the indexer picked for an answer of this process, by the answer's id."""
        return JSONResponse(await engine_picks(service, request, account_of(http)))

    dashboard.install(app, shown or Dashboard())
    page.install(app)
    return app
