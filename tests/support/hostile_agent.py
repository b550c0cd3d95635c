"""An agent that somebody hostile has taken over: it has the key, so its frames are right; what they hold is not.

`HostileDriver` puts it where a sandbox's agent would be, so the whole SDK can be run against it. `answer` decides what
is sent for each request: rows of (type, request id, payload); "raw" as the type sends the payload as it is.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from rorqual import AsyncSandbox
from rorqual.sandbox import processes
from rorqual.sandbox.drivers.base import Driver, Running
from rorqual.sandbox.drivers.streams import connect_unix
from rorqual.sandbox.spec import Capabilities, Kind, SandboxSpec
from rorqual.sandbox.wire import AGENT, CLIENT, Frame, Parser, Tag, Type, code, frame, pack, session_key

Rows = Sequence[tuple["int | Literal['raw']", int, bytes]]
Answer = Callable[[Frame], Rows]


def sealed(key: bytes, number: int, kind: int, request: int, payload: bytes) -> bytes:
    """A frame of any type, as the agent would seal it."""
    body = bytearray(frame(key, number, AGENT, Type.OK, request, payload)[:-16])
    body[16] = kind
    return bytes(body) + code(key, number, AGENT, bytes(body))


class HostileDriver(Driver):
    """A sandbox that is nothing but its agent, in this process."""

    kind: Kind = "container"  # type: ignore[misc]
    name = "bwrap"

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._servers: list[asyncio.Server] = []
        self._stand_in: subprocess.Popen[bytes] | None = None
        self._secret = secrets.token_bytes(32)

    def missing(self) -> str | None:
        """Nothing."""
        return None

    def capabilities(self) -> Capabilities:
        """None."""
        return Capabilities("namespace")

    async def start(self, spec: SandboxSpec, home: Path) -> Running:
        """Listen in the sandbox's folder."""
        self._stand_in = subprocess.Popen(["sleep", "100"])
        stand_in = processes.identify(self._stand_in.pid)
        assert stand_in is not None
        folder = os.open(home, os.O_PATH | os.O_DIRECTORY)  # a test's folder may be too long for a socket's name
        try:
            name = f"/proc/self/fd/{folder}/channel"
            self._servers.append(await asyncio.start_unix_server(self._serve, name))
        finally:
            os.close(folder)
        return Running([stand_in], {"unix": "channel"}, self._secret.hex())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = Parser(self._secret, CLIENT)
        parser.hunting = False  # a hello may be long, and this client is honest
        number = 0
        try:
            while True:
                while (asked := parser.next()) is None:
                    data = await reader.read(1 << 16)
                    if not data:
                        return
                    parser.feed(data)
                if asked.kind == Type.HELLO:
                    nonce = asked.fields.bytes(Tag.NONCE)
                    welcome = pack([(Tag.NONCE, nonce), (Tag.TOKEN, b"n" * 16), (Tag.EPOCH, 1), (Tag.PID, 1)])
                    writer.write(frame(self._secret, 0, AGENT, Type.WELCOME, 0, welcome))
                    key = session_key(self._secret, nonce, b"n" * 16)
                    parser.expect(key)
                    number = 0
                    continue
                for kind, request, payload in self._answer(asked):
                    if kind == "raw":
                        writer.write(payload)
                    else:
                        writer.write(sealed(key, number, kind, request, payload))
                        number += 1
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def connect(self, running: Running, home: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to it."""
        return await connect_unix(home, running.channel["unix"])

    async def stop(self, running: Running, home: Path) -> list[str]:
        """End it."""
        for server in self._servers:
            server.close()
        if self._stand_in is not None:
            self._stand_in.kill()
            self._stand_in.wait()
        return []


@asynccontextmanager
async def hostile(monkeypatch: pytest.MonkeyPatch, answer: Answer, home: Path) -> AsyncIterator[AsyncSandbox]:
    """The SDK's sandbox with such an agent in it."""
    driver = HostileDriver(answer)

    async def choose(*_: object) -> Driver:
        return driver

    with monkeypatch.context() as patch:
        patch.setattr("rorqual.sandbox.async_sandbox.choose", choose)
        sandbox = await AsyncSandbox.create("container", home=home)
    try:
        yield sandbox
    finally:
        await sandbox.close()
