"""Firecracker's API: HTTP over a unix socket, a JSON body a request, 204 when it worked.

Source: Firecracker's src/firecracker/swagger/firecracker.yaml (1.x). Only what the driver needs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxError
from rorqual.sandbox.drivers.streams import connect_unix
from rorqual.sandbox.errors import TransportError

MAX_ANSWER = 1 << 20
TIMEOUT_S = 10.0


class Api:
    """Requests to one Firecracker, each over a connection of its own."""

    def __init__(self, folder: Path, socket: str = "api") -> None:
        self._folder = folder
        self._socket = socket

    async def wait(self, timeout_s: float) -> None:
        """Until it listens. Raises: TransportError."""
        end = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                _, writer = await connect_unix(self._folder, self._socket)
                writer.close()
                return
            except TransportError:
                if asyncio.get_running_loop().time() > end:
                    raise
                await asyncio.sleep(0.005)

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request; the answer's JSON object, empty for 204.

        Raises: SandboxError with Firecracker's `fault_message`; TransportError when it does not answer.
        """
        reader, writer = await connect_unix(self._folder, self._socket)
        data = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        if data:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        try:
            writer.write(head.encode() + b"\r\n" + data)
            await writer.drain()
            status, answer = await asyncio.wait_for(_read_answer(reader), TIMEOUT_S)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise TransportError(f"Firecracker gave no right answer to {method} {path}: {error!r}.") from error
        finally:
            writer.close()
        if status >= 300:
            why = answer.get("fault_message", answer)
            raise SandboxError(f"Firecracker refused {method} {path} ({status}): {why}")
        return answer

    async def boot(
        self,
        *,
        cpus: int,
        memory_mb: int,
        kernel: str,
        initramfs: str,
        boot_args: str,
        disks: Sequence[tuple[str, str, bool]],
        vsock: str,
    ) -> None:
        """Describe the machine and start it. disks: (name, path, read only) in the order the guest sees them."""
        machine = {"vcpu_count": cpus, "mem_size_mib": memory_mb, "smt": False, "track_dirty_pages": False}
        await self.request("PUT", "/machine-config", machine)
        source = {"kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": boot_args}
        await self.request("PUT", "/boot-source", source)
        for name, path, read_only in disks:
            disk = {"drive_id": name, "path_on_host": path, "is_root_device": False, "is_read_only": read_only}
            await self.request("PUT", f"/drives/{name}", disk)
        await self.request("PUT", "/vsock", {"guest_cid": 3, "uds_path": vsock})
        await self.request("PUT", "/entropy", {})
        await self.request("PUT", "/actions", {"action_type": "InstanceStart"})

    async def set_state(self, paused: bool) -> None:
        """Stop or continue the machine."""
        await self.request("PATCH", "/vm", {"state": "Paused" if paused else "Resumed"})


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    first = (await reader.readline()).split()
    if len(first) < 2 or not first[0].startswith(b"HTTP/1."):
        raise ValueError(f"no HTTP answer: {first!r}")
    length = 0
    while (line := (await reader.readline()).strip()) != b"":
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
    if not 0 <= length <= MAX_ANSWER:
        raise ValueError(f"an answer of {length} bytes")
    body = await reader.readexactly(length) if length else b""
    found = json.loads(body) if body else {}
    return int(first[1]), found if isinstance(found, dict) else {}


async def connect_vsock(folder: Path, socket: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream to a port that the guest listens on, through Firecracker's socket. Raises: TransportError."""
    reader, writer = await connect_unix(folder, socket)
    try:
        writer.write(b"CONNECT %d\n" % port)
        await writer.drain()
        answer = await asyncio.wait_for(reader.readline(), TIMEOUT_S)
    except (TimeoutError, OSError) as error:
        writer.close()
        raise TransportError(f"Firecracker did not connect to the guest's port {port}: {error!r}.") from error
    if not answer.startswith(b"OK "):
        writer.close()
        raise TransportError(f"the guest does not listen on port {port} (yet).")
    return reader, writer
