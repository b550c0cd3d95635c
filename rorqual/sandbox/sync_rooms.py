"""Commands, files, terminals and ports without await; each is the asynchronous one of the same name, waited for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.commands import CommandHandle as AsyncHandle
from rorqual.sandbox.files import MAX_TRANSFER, FileInfo
from rorqual.sandbox.ports import Forward as AsyncForward
from rorqual.sandbox.pty import Pty as AsyncPty
from rorqual.sandbox.session import Session as AsyncSession
from rorqual.sandbox.spec import CommandResult
from rorqual.sandbox.sync_loop import Calls, wait_for

OnText = Callable[[str], None]


class CommandHandle:
    """A started command; see commands.CommandHandle."""

    def __init__(self, handle: AsyncHandle, calls: Calls | None = None) -> None:
        self._handle = handle
        self._calls = calls or Calls()

    @property
    def id(self) -> str:
        """By which commands.attach finds it again."""
        return self._handle.id

    def wait(self, timeout: float | None = None) -> CommandResult:
        """How it ended; its callbacks are called meanwhile, in this thread. Raises: TimeoutError."""
        return self._calls.wait_for(self._handle.wait(timeout))

    def kill(self, signal: int = 9) -> None:
        """Signal it; 9 ends its whole tree."""
        wait_for(self._handle.kill(signal))

    def write(self, data: str | bytes) -> None:
        """Write to its standard input."""
        wait_for(self._handle.write(data))

    def close_stdin(self) -> None:
        """Say that no more input comes."""
        wait_for(self._handle.close_stdin())


class Session:
    """A shell that stays; see session.Session."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    def run(self, cmd: str, *, timeout: float = 60.0, max_output: int = 1 << 20) -> CommandResult:
        """Run a command in it."""
        return wait_for(self._session.run(cmd, timeout=timeout, max_output=max_output))

    def close(self) -> None:
        """End the shell and what it started."""
        wait_for(self._session.close())

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Commands:
    """`sandbox.commands`; see commands.Commands for what the arguments mean."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._commands = sandbox.commands

    def run(
        self,
        cmd: str | Sequence[str],
        *,
        timeout: float | None = 60.0,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        max_output: int = 1 << 20,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        check: bool = False,
        call: str | None = None,
    ) -> CommandResult:
        """Run a command and wait for its end."""
        calls = Calls()
        return calls.wait_for(
            self._commands.run(
                cmd,
                timeout=timeout,
                cwd=cwd,
                env=env,
                user=user,
                stdin=stdin,
                max_output=max_output,
                on_stdout=calls.wrap(on_stdout),
                on_stderr=calls.wrap(on_stderr),
                check=check,
                call=call,
            )
        )

    def start(
        self,
        cmd: str | Sequence[str],
        *,
        timeout: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        max_output: int = 1 << 20,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        call: str | None = None,
    ) -> CommandHandle:
        """Start a command and return at once; callbacks are called while somebody waits on the handle."""
        calls = Calls()
        handle = wait_for(
            self._commands.start(
                cmd,
                timeout=timeout,
                cwd=cwd,
                env=env,
                user=user,
                stdin=stdin,
                max_output=max_output,
                on_stdout=calls.wrap(on_stdout),
                on_stderr=calls.wrap(on_stderr),
                call=call,
            )
        )
        return CommandHandle(handle, calls)

    def session(
        self,
        *,
        shell: str = "/bin/sh",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> Session:
        """A shell that stays: its folder, variables and functions hold from one `run` to the next."""
        return Session(wait_for(self._commands.session(shell=shell, cwd=cwd, env=env, user=user)))

    def attach(
        self, handle_id: str, *, offset: int = 0, on_stdout: OnText | None = None, on_stderr: OnText | None = None
    ) -> CommandHandle:
        """A command that was started earlier, also by another process."""
        calls = Calls()
        handle = wait_for(
            self._commands.attach(
                handle_id, offset=offset, on_stdout=calls.wrap(on_stdout), on_stderr=calls.wrap(on_stderr)
            )
        )
        return CommandHandle(handle, calls)

    def read(self, handle_id: str, stream: str = "stdout", offset: int = 0) -> tuple[int, bytes]:
        """Retained output of a command from `offset` on: where it begins, and the bytes."""
        return wait_for(self._commands.read(handle_id, stream, offset))

    def list(self) -> list[dict[str, object]]:
        """Commands that run or whose result is kept."""
        return wait_for(self._commands.list())


class Files:
    """`sandbox.files`; see files.Files."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._files = sandbox.files

    @overload
    def read(
        self, path: str, *, format: Literal["text"] = "text", offset: int = 0, limit: int | None = None
    ) -> str: ...

    @overload
    def read(self, path: str, *, format: Literal["bytes"], offset: int = 0, limit: int | None = None) -> bytes: ...

    def read(
        self, path: str, *, format: Literal["text", "bytes"] = "text", offset: int = 0, limit: int | None = None
    ) -> str | bytes:
        """A file's content."""
        if format == "bytes":
            return wait_for(self._files.read(path, format="bytes", offset=offset, limit=limit))
        return wait_for(self._files.read(path, offset=offset, limit=limit))

    def write(
        self, path: str, data: str | bytes, *, mode: int = 0o644, append: bool = False, mkdirs: bool = True
    ) -> None:
        """Write a whole file."""
        wait_for(self._files.write(path, data, mode=mode, append=append, mkdirs=mkdirs))

    def list(self, path: str, depth: int = 1) -> list[FileInfo]:
        """What lies in a folder."""
        return wait_for(self._files.list(path, depth))

    def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """One file."""
        return wait_for(self._files.stat(path, follow=follow))

    def exists(self, path: str) -> bool:
        """Whether there is something of that name."""
        return wait_for(self._files.exists(path))

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """Make a folder and those above it."""
        wait_for(self._files.mkdir(path, mode))

    def move(self, src: str, dst: str) -> None:
        """Rename."""
        wait_for(self._files.move(src, dst))

    def remove(self, path: str, recursive: bool = False) -> None:
        """Remove a file, an empty folder, or a tree."""
        wait_for(self._files.remove(path, recursive))

    def upload(self, local: str | Path, remote: str) -> int:
        """Copy a file or a tree from the host."""
        return wait_for(self._files.upload(local, remote))

    def download(
        self, remote: str, local: str | Path, *, max_bytes: int = MAX_TRANSFER, max_files: int = 10_000
    ) -> Paths:
        """Copy a file or a tree to the host."""
        return wait_for(self._files.download(remote, local, max_bytes=max_bytes, max_files=max_files))


Paths = list[Path]  # `list` is a method of the class above


class Pty:
    """An open terminal; see pty.Pty."""

    def __init__(self, pty: AsyncPty, calls: Calls) -> None:
        self._pty, self._calls = pty, calls

    @property
    def id(self) -> str:
        """Of the command behind it."""
        return self._pty.id

    def write(self, data: str | bytes) -> None:
        """Type."""
        wait_for(self._pty.write(data))

    def resize(self, cols: int, rows: int) -> None:
        """Change its size."""
        wait_for(self._pty.resize(cols, rows))

    def read(self, timeout: float | None = None) -> bytes:
        """What it wrote since the last read; b"" when it ended. Raises: TimeoutError."""
        return wait_for(self._pty.read(timeout))

    def wait(self, timeout: float | None = None) -> CommandResult:
        """How its program ended; `on_data` is called meanwhile, in this thread."""
        return self._calls.wait_for(self._pty.wait(timeout))

    def kill(self) -> None:
        """End its program and all that it started."""
        wait_for(self._pty.kill())


class PtyFactory:
    """`sandbox.pty`; see pty.PtyFactory."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._factory = sandbox.pty

    def open(
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
        """Open a terminal with a shell on it."""
        calls = Calls()
        return Pty(wait_for(self._factory.open(cols, rows, shell, env, calls.wrap(on_data), cwd, user, timeout)), calls)


class Forward:
    """A port of the sandbox on the host: connect to (host, port)."""

    def __init__(self, forward: AsyncForward) -> None:
        self._forward = forward
        self.host, self.port, self.address = forward.host, forward.port, forward.address

    def close(self) -> None:
        """Stop listening and end its connections."""
        wait_for(self._forward.close())


class Ports:
    """`sandbox.ports`; see ports.Ports."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._ports = sandbox.ports

    def forward(self, port: int, host: str = "127.0.0.1", host_port: int = 0) -> Forward:
        """Listen on the host's loopback for a TCP port inside."""
        return Forward(wait_for(self._ports.forward(port, host, host_port)))
