"""Terminals: a program of the sandbox on a pseudo-terminal inside."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rorqual.sandbox.commands import CommandHandle
from rorqual.sandbox.spec import CommandResult
from rorqual.sandbox.wire import Start, Tag, Type

if TYPE_CHECKING:
    from rorqual.sandbox.async_sandbox import AsyncSandbox

MAX_UNREAD = 1 << 20


class Pty:
    """An open terminal. What it writes goes to `on_data` if that was given, and can be read with `read` otherwise."""

    def __init__(self, sandbox: AsyncSandbox, handle: CommandHandle, on_data: Callable[[bytes], None] | None) -> None:
        self._sandbox = sandbox
        self._handle = handle
        self._on_data = on_data
        self._unread = bytearray()
        self._arrived = asyncio.Event()
        self._over = False

    @property
    def id(self) -> str:
        """Of the command behind it, for commands.attach."""
        return self._handle.id

    def _take(self, data: bytes) -> None:
        if self._on_data is not None:
            self._on_data(data)
            return
        self._unread += data
        if len(self._unread) > MAX_UNREAD:
            del self._unread[: len(self._unread) - MAX_UNREAD]
        self._arrived.set()

    async def write(self, data: str | bytes) -> None:
        """Type."""
        await self._handle.write(data)

    async def resize(self, cols: int, rows: int) -> None:
        """Change its size; the program is told (SIGWINCH)."""
        await self._sandbox._ask(Type.RESIZE, [(Tag.HANDLE, self.id), (Tag.COLS, cols), (Tag.ROWS, rows)])

    async def read(self, timeout: float | None = None) -> bytes:
        """What it wrote since the last read, at least a byte; b"" when it ended. Raises: TimeoutError."""
        if not self._unread:
            self._arrived.clear()
            waiting = asyncio.ensure_future(self._arrived.wait())
            ended = asyncio.ensure_future(self._handle._ended())
            try:
                done, _ = await asyncio.wait({waiting, ended}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
                ended.cancel()
                await asyncio.gather(waiting, ended, return_exceptions=True)
            if not done:
                raise TimeoutError(f"the terminal wrote nothing for {timeout:g} s")
        data = bytes(self._unread)
        self._unread.clear()
        return data

    async def wait(self, timeout: float | None = None) -> CommandResult:
        """How its program ended; its output is in `stdout_bytes`."""
        return await self._handle.wait(timeout)

    async def kill(self) -> None:
        """End its program and all that it started."""
        await self._handle.kill()


class PtyFactory:
    """`sandbox.pty`."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox

    async def open(
        self,
        cols: int = 80,
        rows: int = 24,
        shell: str | Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        on_data: Callable[[bytes], None] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
    ) -> Pty:
        """Open a terminal with a shell (or the named program) on it."""
        argv = [shell] if isinstance(shell, str) else list(shell) if shell is not None else ["/bin/sh", "-i"]
        commands = self._sandbox.commands
        handle = CommandHandle(self._sandbox, "pty-" + secrets.token_hex(8))
        pty = Pty(self._sandbox, handle, on_data)
        fields = commands._start_fields(handle.id, argv, timeout, cwd, env, user, 1 << 20)
        fields += [(Tag.COLS, cols), (Tag.ROWS, rows)]
        await commands._launch(handle, argv, fields, Start.PTY, handle._listen(None, None, pty._take))
        return pty
