"""Speaks QMP, the control language of QEMU: one JSON object a line over a unix socket.

Source: QEMU's docs/interop/qmp-spec.rst. Left out: out-of-band commands.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import TransportError

MAX_LINE = 1 << 20
"""Bytes of one message; QEMU is not trusted more than the guest it runs."""


class QMP:
    """A connection to one QEMU; not for several tasks at once.

    Example::

        async with await QMP.connect(folder / "qmp.sock", timeout_s=5) as qmp:
            await qmp.execute("stop")
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._buffer = bytearray()
        self._events: deque[dict[str, Any]] = deque(maxlen=256)
        self._next_id = 0
        self.version: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    async def connect(cls, path: Path, timeout_s: float) -> QMP:
        """Connect, wait for the greeting and leave negotiation mode.

        Raises: TransportError when nobody answers within `timeout_s`.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                _connect(connection, path)
                break
            except OSError as error:
                connection.close()
                if asyncio.get_running_loop().time() > deadline:
                    raise TransportError(f"QEMU's control socket {path} cannot be reached: {error}.") from error
                await asyncio.sleep(0.005)
        qmp = cls(connection)
        try:
            remaining = max(0.1, deadline - asyncio.get_running_loop().time())
            await asyncio.wait_for(qmp._negotiate(), remaining)
        except (TimeoutError, SandboxError) as error:
            qmp.close()
            raise TransportError(f"QEMU's control socket {path} gave no greeting in time: {error}.") from error
        return qmp

    async def _negotiate(self) -> None:
        greeting = await self._message()
        try:
            version = greeting["QMP"]["version"]["qemu"]
            self.version = (version["major"], version["minor"], version["micro"])
        except (KeyError, TypeError) as error:
            raise TransportError(f"this is no QMP greeting: {str(greeting)[:200]}.") from error
        await self.execute("qmp_capabilities")

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, descriptor: int | None = None
    ) -> Any:
        """Run one command and return what it returned; `descriptor` travels with it (`getfd`, `add-fd`).

        Raises: SandboxError with QEMU's own words when it refuses; TransportError when the connection ends.
        """
        self._next_id += 1
        identity = self._next_id
        message: dict[str, Any] = {"execute": command, "id": identity}
        if arguments is not None:
            message["arguments"] = dict(arguments)
        await self._send(json.dumps(message).encode() + b"\n", descriptor)
        while True:
            answer = await self._message()
            if "event" in answer:
                self._events.append(answer)
            elif answer.get("id") == identity:
                break
        if "error" in answer:
            error = answer["error"]
            raise SandboxError(f"QEMU refused {command}: {error.get('desc', error)}.")
        return answer.get("return")

    async def wait_for_event(self, name: str) -> dict[str, Any]:
        """The next event of that name, those before it being dropped. Raises: TransportError at the end."""
        while True:
            while self._events:
                event = self._events.popleft()
                if event["event"] == name:
                    return event
            message = await self._message()
            if "event" in message:
                self._events.append(message)

    def close(self) -> None:
        """End the connection; the machine runs on."""
        self._socket.close()

    async def __aenter__(self) -> QMP:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _send(self, data: bytes, descriptor: int | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            if descriptor is not None:  # the first byte carries the descriptor
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
                sent = self._socket.sendmsg([data], [rights])
                data = data[sent:]
            await loop.sock_sendall(self._socket, data)
        except OSError as error:
            raise TransportError(f"QEMU's control connection broke: {error}.") from error

    async def _message(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE:
                raise TransportError(f"QEMU sent a message of more than {MAX_LINE} bytes.", retryable=False)
            try:
                received = await loop.sock_recv(self._socket, 65536)
            except OSError as error:
                raise TransportError(f"QEMU's control connection broke: {error}.") from error
            if not received:
                raise TransportError("QEMU ended and closed its control connection.")
            self._buffer += received
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise TransportError(f"QEMU sent something that is no JSON: {line[:200]!r}.", retryable=False) from error
        if not isinstance(message, dict):
            raise TransportError(f"QEMU sent no object: {line[:200]!r}.", retryable=False)
        return message


def _connect(connection: socket.socket, path: Path) -> None:
    """Connect to a socket however long the name of its folder is (an address holds 108 bytes)."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        connection.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
