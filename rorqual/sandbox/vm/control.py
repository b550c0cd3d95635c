"""The driver's own line to pid 1 of a machine (agent/vm_control.c): limits, the clock, the writable layer as a tar."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.sandbox.drivers.streams import connect_unix
from rorqual.sandbox.errors import SnapshotFailed, TransportError

MAX_PIECE = 1 << 20


class Control:
    """One connection; QEMU lets one client at a time be connected, so it is opened when needed and closed at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, folder: Path) -> Control:
        """Connect to the machine's control port. Raises: TransportError."""
        return cls(*await connect_unix(folder, "control"))

    async def wait_ready(self, timeout_s: float) -> None:
        """Until pid 1 says that the agent runs. Raises: TransportError."""
        try:
            while (line := await asyncio.wait_for(self._reader.readline(), timeout_s)).strip() != b"ready":
                if not line:
                    raise TransportError("the machine ended before its agent ran.")
        except TimeoutError as error:
            raise TransportError(f"the machine's agent did not run after {timeout_s:g} s.") from error

    async def ask(self, request: str, timeout_s: float = 30.0) -> None:
        """Send one request and wait for "ok". Raises: SandboxError with what it says instead; TransportError."""
        self._writer.write(request.encode() + b"\n")
        await self._writer.drain()
        try:
            while (line := await asyncio.wait_for(self._reader.readline(), timeout_s)).strip() == b"ready":
                pass
        except TimeoutError as error:
            raise TransportError(f"the machine did not answer {request!r} within {timeout_s:g} s.") from error
        if line.strip() != b"ok":
            raise SandboxError(
                f"the machine answered {request!r} with {line[:200].decode(errors='replace').strip()!r}."
            )

    async def number(self, request: str, timeout_s: float = 10.0) -> int:
        """Ask for one number. Raises: TransportError when there is no answer in time or it is none."""
        self._writer.write(request.encode() + b"\n")
        await self._writer.drain()
        try:
            while (line := await asyncio.wait_for(self._reader.readline(), timeout_s)).strip() == b"ready":
                pass
            return int(line)
        except (TimeoutError, ValueError) as error:
            raise TransportError(f"the machine gave no number for {request!r}: {error}.") from error

    async def receive_tar(self, target: Path, max_bytes: int, timeout_s: float = 30.0) -> None:
        """The writable layer as a tar file. Raises: SnapshotFailed; TransportError."""
        self._writer.write(b"tar\n")
        await self._writer.drain()
        received = 0
        with open(target, "wb") as file:
            try:
                while True:
                    size = struct.unpack("<I", await asyncio.wait_for(self._reader.readexactly(4), timeout_s))[0]
                    received += size
                    if size > MAX_PIECE or received > max_bytes:
                        raise SnapshotFailed(
                            f"the machine sent more than {max_bytes} bytes for its files. The snapshot before this one "
                            "stands."
                        )
                    if not size:
                        break
                    file.write(await asyncio.wait_for(self._reader.readexactly(size), timeout_s))
                verdict = await asyncio.wait_for(self._reader.readline(), timeout_s)
            except (TimeoutError, asyncio.IncompleteReadError) as error:
                raise TransportError("the machine stopped sending its files.") from error
        if verdict.strip() != b"ok":
            raise SnapshotFailed("files changed or could not be read while the machine sent them. Stop what writes.")

    async def close(self) -> None:
        """End the connection."""
        self._writer.close()

    async def __aenter__(self) -> Control:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
