"""Serve a model until stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from rorqual.engine import Engine, EngineSettings
from rorqual.errors import ConfigError
from rorqual.server.app import create_app

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def run(
    model: Any,  # what Engine takes
    tokenizer: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str = "minke",
    revision: str = "2026-04",
    settings: EngineSettings | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the API and the page until Ctrl-C; what is being generated then ends with an error (503).

    port: 0 takes a free one. settings: of the engine and its cache. on_ready: called with the URL once the server
    listens.
    Raises: ConfigError when the address cannot be used.
    """
    listener = bind(host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    is_loopback = host in ("127.0.0.1", "localhost", "::1")
    with (settings or EngineSettings()).open(model, tokenizer) as engine:
        app = create_app(engine, model_name, revision=revision, allowed_hosts=LOOPBACK if is_loopback else None)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
        server = _Server(config, engine)
        if on_ready is not None:
            on_ready(url)  # the socket listens already, so a browser opened now will get its answer
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
            server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends the engine's requests first when it shuts down, so that no open stream holds it up."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._engine.close)
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: ConfigError saying why the address cannot be used."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"cannot listen on port {port}: ports go from 0 (any free one) to 65535. Choose another.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {host!r}: no address belongs to that name ({error}). Use an address of this machine: "
            "127.0.0.1 for itself alone, 0.0.0.0 for every network it is in."
        ) from error
    except OSError as error:
        busy = error.errno == errno.EADDRINUSE
        reason = "another program listens there already" if busy else str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}. Choose another port, for example --port {port + 1}, "
            "or --port 0 for any free one."
        ) from error
    return listener
