"""The dashboard: evals and the referee's verdicts over time. A page at `/dashboard`, and the numbers behind it.

`GET /v1/referee/stats?by=hour|day&last=N` counts verdicts from the audit journal; `GET /v1/evals` lists the results of
a folder of runs. Like `/stats`, both ask for a key where the server does, and say nothing of single requests.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response

from rorqual.errors import JournalError, RequestError
from rorqual.referee.history import HOURS_OF, By, History
from rorqual.server.page import CACHE, STATIC

MOST_RUNS: Final = 200
MOST_BYTES: Final = 32 * 1024 * 1024
MOST_BUCKETS: Final = 400
_USUAL: Final[Mapping[By, int]] = {"hour": 48, "day": 30}


@dataclass
class Dashboard:
    """evals: folder whose runs are shown. verdicts: folder of a referee's journal. None: there is none to show."""

    evals: Path | None = None
    verdicts: Path | None = None

    @cached_property
    def _history(self) -> History | None:
        return None if self.verdicts is None else History(self.verdicts)

    def stats(self, by: By, last: int) -> dict[str, Any]:
        """Verdicts over time. Raises: RequestError."""
        if self._history is None:
            raise RequestError(
                "This server keeps no record of verdicts, so there is nothing to count. Use `rorqual referee` with a "
                "journal, or `rorqual serve --verdicts FOLDER`.",
                status=404,
            )
        try:
            return self._history.over(by, last, time.time())
        except JournalError as error:
            raise RequestError(
                f"The journal of verdicts cannot be read: {error}", status=500, type="server_error"
            ) from error

    def runs(self) -> dict[str, Any]:
        """Results of evals, newest first, and the files that are none. Raises: RequestError."""
        if self.evals is None:
            raise RequestError(
                "This server was told of no evals, so there are none to show. Start it with --evals FOLDER.", status=404
            )
        found = [(when, path) for path in _result_files(self.evals) if (when := _time_of(path)) is not None]
        shown, unreadable = list[dict[str, Any]](), list[dict[str, str]]()
        for when, path in sorted(found, reverse=True)[:MOST_RUNS]:
            name = path.parent.relative_to(self.evals).as_posix()
            try:
                shown.append({"name": name, "time": when, **read_result(path)})
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                unreadable.append({"name": name, "why": f"{type(error).__name__}: {error}"[:200]})
        return {"runs": shown, "unreadable": unreadable, "left_out": max(0, len(found) - MOST_RUNS)}

    def close(self) -> None:
        """Give the journal's mapping back."""
        if self._history is not None:
            self._history.close()


def _result_files(folder: Path) -> list[Path]:
    patterns = ("result.json", "*/result.json", "*/*/result.json")
    # unlike Path.glob, it passes over folders that are removed while it looks
    names = [name for pattern in patterns for name in glob(pattern, root_dir=folder, include_hidden=True)]
    return [path for path in (folder / name for name in names) if path.is_file()]


def _time_of(path: Path) -> float | None:
    """When it was written; None where it is gone since the folder was listed."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def read_result(path: Path) -> dict[str, Any]:
    """What the page shows of a run's `result.json`. Raises: OSError, ValueError, KeyError, TypeError."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES} bytes")
    result = json.loads(path.read_text(encoding="utf-8"))
    model = result["model"]
    out = {
        "suite": str(result["suite"]),
        "model": str(model["id"] if isinstance(model, dict) else model),
        "n": int(result["n"]),
        "valid": bool(result["valid"]),
        "headline": {str(name): _number(value) for name, value in result["headline"].items()},
        "intervals": {
            str(name): [float(low), float(high)]
            for name, (low, high) in result.get("intervals", {}).items()
            if math.isfinite(float(low)) and math.isfinite(float(high))
        },
    }
    if result["suite"] == "trial":
        out["trial"] = {arm: _arm(result[arm]) for arm in ("before", "after")}
    return out


def _arm(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "wrong": None if arm["wrong"] is None else _number(arm["wrong"]["value"]),
        "p50_ms": _number(arm["latency_ms"]["p50"]),
        "cost": _number(arm.get("cost")),
    }


def _number(value: Any) -> float | None:
    """None also for what Python's JSON has and the page's has not: NaN and the infinite."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


_QUERY: Final[list[dict[str, Any]]] = [
    {"name": "by", "in": "query", "schema": {"enum": list(HOURS_OF)}},
    {"name": "last", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": MOST_BUCKETS}},
]
_JSON: Final[dict[str, Any]] = {"200": {"description": "The numbers.", "content": {"application/json": {}}}}
_PAGE: Final[dict[str, Any]] = {"200": {"description": "The page.", "content": {"text/html": {}}}}
PATHS: Final[dict[str, Any]] = {
    "/dashboard": {"get": {"summary": "The dashboard.", "responses": _PAGE}},
    "/v1/referee/stats": {"get": {"summary": "Verdicts over time.", "parameters": _QUERY, "responses": _JSON}},
    "/v1/evals": {"get": {"summary": "Results of evals.", "responses": _JSON}},
}
"""For the OpenAPI document."""


def install(app: FastAPI, dashboard: Dashboard) -> None:
    """The page's and its numbers' routes. The files under `/static` are the page's (`page.install_files`)."""

    async def page(http: HttpRequest) -> Response:
        return FileResponse(STATIC / "dashboard.html", headers={"cache-control": CACHE})

    async def stats(http: HttpRequest) -> Response:
        by, last = read_span(http.query_params)
        return JSONResponse(await run_in_threadpool(dashboard.stats, by, last))

    async def evals(http: HttpRequest) -> Response:
        return JSONResponse(await run_in_threadpool(dashboard.runs))

    app.add_route("/dashboard", page, ["GET"], include_in_schema=False)
    app.add_route("/v1/referee/stats", stats, ["GET"], include_in_schema=False)
    app.add_route("/v1/evals", evals, ["GET"], include_in_schema=False)


def read_span(given: Mapping[str, str]) -> tuple[By, int]:
    """`by` and `last` of a query. Raises: RequestError."""
    for name in given:
        if name not in ("by", "last"):
            raise RequestError(f"{name} is unknown here. Give by (hour or day) and last.", param=name)
    by: Any = given.get("by", "hour")
    if by not in HOURS_OF:
        raise RequestError(f"by is {by!r}. Use hour or day.", param="by")
    last = given.get("last", str(_USUAL[by]))
    if not (last.isascii() and last.isdigit() and 1 <= int(last) <= MOST_BUCKETS):
        raise RequestError(f"last is {last!r}. Use a number from 1 to {MOST_BUCKETS}.", param="last")
    return by, int(last)
