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
