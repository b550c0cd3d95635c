"""Serve a model until stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from rorqual.engine import EngineSettings
from rorqual.server import logs
from rorqual.server.app import create_app
from rorqual.server.auth import check_exposure, is_loopback
from rorqual.server.dashboard import Dashboard
from rorqual.server.listen import LOOPBACK, Certificate, address_of, bind, serve_app
from rorqual.server.operations import Operations
from rorqual.server.service import Behaviour
from rorqual.server.upstream import UpstreamSettings


def run(
    model: Any,  # what Engine takes
    tokenizer: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str = "minke",
    revision: str = "2026-04",
    settings: EngineSettings | UpstreamSettings | None = None,
    operations: Operations | None = None,
    behaviour: Behaviour | None = None,
    shown: Dashboard | None = None,
    certificate: Certificate | None = None,
    drain_s: float = 30.0,
    log_style: logs.Style = "off",
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the API and the page until a signal.

    SIGTERM: new requests are refused (503), running ones have `drain_s` to finish, and what is left then ends where it
    stands, as the API ends what the service cuts off. A second signal, or Ctrl-C, ends everything at once.

    port: 0 takes a free one. settings: of the engine and its cache, or where the model runs (`upstream.py`); of
    `model` only the `cfg` is used then. operations: accounts and limits, closed at the end.
    behaviour: where the server differs from the hosted one. shown: what the dashboard shows.
    on_ready: called with the URL once the server listens.
    Raises: ConfigError when the address cannot be used, or others reach it and no key is asked for.
    """
    operations = operations or Operations()
    check_exposure(host, operations.accounts.gatekeeper)
    listener = bind(host, port)
    url = address_of(host, listener, certificate)
    hosts = (*LOOPBACK, host) if is_loopback(host) else None
    with contextlib.closing(operations), (settings or EngineSettings()).open(model, tokenizer) as engine:
        app = create_app(
            engine, model_name, revision=revision, behaviour=behaviour, allowed_hosts=hosts, operations=operations,
            shown=shown,
        )  # fmt: skip
        serve_app(
            app, listener, operations, engine.close, url=url, certificate=certificate, drain_s=drain_s,
            log_style=log_style, on_ready=on_ready,
        )  # fmt: skip
