"""Listen on an address and serve an application there until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from rorqual.errors import ConfigError
from rorqual.server import logs
from rorqual.server.operations import Operations

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Certificate:
    """Files of a TLS certificate; without `key_file` the certificate's file holds the key too.

    Raises: ConfigError when they do not load.
    """

    file: Path
    key_file: Path | None = None

    def __post_init__(self) -> None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.file, self.key_file, lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the certificate {self.file} with the key {self.key_file or self.file} does not load: {error}. "
                "Give PEM files that belong together, the key without a password."
            ) from error


def serve_app(
    app: FastAPI,
    listener: socket.socket,
    operations: Operations,
    end: Callable[[], None] = lambda: None,
    *,
    url: str,
    certificate: Certificate | None = None,
    drain_s: float = 30.0,
    log_style: logs.Style = "off",
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve an application on a listening socket until a signal, as `run.run` says. end: ends what still runs then."""
    logs.configure(log_style)
    tls: dict[str, Any] = {}
    if certificate is not None:
        tls = {"ssl_certfile": certificate.file, "ssl_keyfile": certificate.key_file}
    if log_style == "json":
        tls["log_config"] = None  # uvicorn's lines then go where all others do
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3, **tls)
    server = _Server(config, end, operations, drain_s)
    if on_ready is not None:
        on_ready(url)  # the socket listens already, so a browser opened now will get its answer
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
        server.run(sockets=[listener])


def address_of(host: str, listener: socket.socket, certificate: Certificate | None) -> str:
    """The URL of what listens there."""
    scheme = "http" if certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


class _Server(uvicorn.Server):
    """Drains at SIGTERM, and ends what runs before it shuts down, so that no open stream holds it up."""

    def __init__(self, config: uvicorn.Config, end: Callable[[], None], operations: Operations, drain_s: float) -> None:
        super().__init__(config)
        self._end, self._drain, self._drain_s = end, operations.drain, drain_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM or self._drain.is_draining or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._drain.begin()  # the signal counts as handled: the process ends by returning, and closes its files
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._leave())

    async def _leave(self) -> None:
        await self._drain.finish(self._drain_s)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._end)
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
