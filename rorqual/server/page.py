"""The web page: files as they lie in `static/`, asked for anew after each start of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
CACHE = "no-cache"  # a browser may keep a file, but asks whether it is still the same: modules must fit each other


class _Files(StaticFiles):
    def file_response(self, *args: Any, **more: Any) -> Response:  # Any: as starlette's
        response = super().file_response(*args, **more)
        response.headers["cache-control"] = CACHE
        return response


def install(app: FastAPI) -> None:
    """The page at `/`, and what it is made of."""

    @app.get("/", include_in_schema=False)
    @app.head("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"cache-control": CACHE})

    install_files(app)


def install_files(app: FastAPI) -> None:
    """What pages are made of, under `/static`."""
    app.mount("/static", _Files(directory=STATIC), name="static")
