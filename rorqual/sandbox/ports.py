"""Ports: a program that listens inside is reached from the host's loopback, through the channel and no network."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rorqual.errors import SandboxError
from rorqual.sandbox.channel import AgentRefusal
from rorqual.sandbox.link import BREAK
from rorqual.sandbox.wire import Fields, Tag, Type

if TYPE_CHECKING:
    from rorqual.sandbox.async_sandbox import AsyncSandbox

PIECE = 64 << 10
MOST_AHEAD = 2 << 20
"""Bytes taken from a port that the host's side has not read; the agent's window is a quarter of it."""


@dataclass
class Forward:
    """A port of the sandbox on the host: connect to (host, port)."""

    inner: int
    host: str
    port: int
    _server: asyncio.Server
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self.host}:{self.port}"

    async def close(self) -> None:
        """Stop listening and end its connections."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Ports:
    """`sandbox.ports`."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox
        self._forwards: list[Forward] = []
        self._last = 0

    async def forward(self, port: int, host: str = "127.0.0.1", host_port: int = 0) -> Forward:
        """Listen on the host's loopback for TCP port `port` of 127.0.0.1 inside; a free host port unless one is named.

        Raises: SandboxError.
        """
        if not 0 < port < 65536:
            raise SandboxError(f"{port} is no port. Name one from 1 to 65535.")
        tasks: set[asyncio.Task[None]] = set()

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await self._carry(port, reader, writer)
            except asyncio.CancelledError:
                pass  # the forward is closed; asyncio would report the cancellation as an error
            finally:
                tasks.discard(task)
                writer.close()

        try:
            server = await asyncio.start_server(carry, host, host_port)
        except OSError as error:
            raise SandboxError(f"{host}:{host_port} cannot be listened on: {error.strerror}.") from error
        address = server.sockets[0].getsockname()
        forward = Forward(port, address[0], address[1], server, tasks)
        self._forwards.append(forward)
        return forward

    async def _carry(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._last += 1
        number = self._last
        link = self._sandbox._link
        arriving: asyncio.Queue[bytes | None] = asyncio.Queue()
        ahead = 0

        def event(kind: int, fields: Fields) -> None:
            nonlocal ahead
            data = fields.bytes(Tag.DATA) if kind == Type.PORT_BYTES else None
            ahead += len(data or b"")
            over = ahead > MOST_AHEAD or arriving.qsize() > MOST_AHEAD >> 10
            if not over:
                arriving.put_nowait(data)
            if kind == BREAK or over:  # an agent that keeps its window does not run ahead
                link.listeners.pop(number, None)
                arriving.put_nowait(None)
                writer.close()

        link.listeners[number] = event
        try:
            await self._sandbox._ask(Type.PORT_OPEN, [(Tag.ID, number), (Tag.PORT, port)], again=False)
            inward = asyncio.ensure_future(self._inward(number, reader))
            try:
                while (data := await arriving.get()) is not None:
                    ahead -= len(data)
                    writer.write(data)
                    await writer.drain()
                    await link.request(Type.PORT_DATA, [(Tag.ID, number), (Tag.SIZE, len(data))], again=False)
                with contextlib.suppress(OSError):
                    writer.write_eof()
                await inward
            finally:
                inward.cancel()
        except (AgentRefusal, SandboxError, OSError):
            pass  # nobody listens inside, or it is over: the connection is closed, as a network would
        finally:
            link.listeners.pop(number, None)
            with contextlib.suppress(AgentRefusal, SandboxError, asyncio.CancelledError):
                await link.request(Type.PORT_CLOSE, [(Tag.ID, number), (Tag.DONE, 1)], again=False)

    async def _inward(self, number: int, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(PIECE):
            await self._sandbox._ask(Type.PORT_DATA, [(Tag.ID, number), (Tag.DATA, data)], again=False)
        await self._sandbox._ask(Type.PORT_CLOSE, [(Tag.ID, number), (Tag.DONE, 0)], again=False)

    async def close(self) -> None:
        """Close every forward."""
        for forward in self._forwards:
            await forward.close()
        self._forwards.clear()
