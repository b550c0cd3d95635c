"""Streams to an agent, by the kinds of channel a driver may have."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from rorqual.sandbox.errors import TransportError

BUFFER = 1 << 20


async def connect_unix(home: Path, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the socket `name` in folder `home`, however long the folder's path is.

    Raises: TransportError when nobody listens.
    """
    folder = os.open(home, os.O_PATH | os.O_DIRECTORY)
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(link, f"/proc/self/fd/{folder}/{name}")
        return await asyncio.open_unix_connection(sock=link, limit=BUFFER)
    except OSError as error:
        link.close()
        raise TransportError(f"the sandbox's agent cannot be reached at {home / name}: {error}.") from error
    finally:
        os.close(folder)


async def connect_fifos(home: Path, inward: str, outward: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a pair of FIFOs in folder `home`: what is written to `inward` reaches the agent, `outward` is its answer.

    Raises: TransportError when nobody holds their other ends.
    """
    loop = asyncio.get_running_loop()
    opened: list[int] = []
    try:
        opened.append(os.open(home / outward, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        opened.append(os.open(home / inward, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        for descriptor in opened:
            os.close(descriptor)
        raise TransportError(f"the sandbox's agent cannot be reached at {home / inward}: {error}.") from error
    reader = asyncio.StreamReader(limit=BUFFER)
    protocol = asyncio.StreamReaderProtocol(reader)
    reading, _ = await loop.connect_read_pipe(lambda: protocol, os.fdopen(opened[0], "rb", 0))
    writing, _ = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(opened[1], "wb", 0))
    return reader, _FifoWriter(writing, writing.get_protocol(), reader, loop, reading)


class _FifoWriter(asyncio.StreamWriter):
    """A writer that also lets go of the FIFO that is read from."""

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        protocol: asyncio.BaseProtocol,
        reader: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
        reading: asyncio.ReadTransport,
    ) -> None:
        super().__init__(transport, protocol, reader, loop)
        self._reading = reading

    def close(self) -> None:
        """Close both ends."""
        self._reading.close()
        super().close()
