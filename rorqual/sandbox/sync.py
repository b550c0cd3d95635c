"""`Sandbox`: the same as `AsyncSandbox` without await.

Both share one implementation: the asynchronous one runs on a background event loop, one thread for the whole process,
and these methods wait for it. Callbacks run in the caller's own thread. Inside a running event loop they would block
it, so they refuse; use AsyncSandbox there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import queue
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from rorqual.errors import SandboxError
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.commands import CommandHandle as AsyncHandle
from rorqual.sandbox.files import MAX_TRANSFER, FileInfo
from rorqual.sandbox.functions import FunctionResult
from rorqual.sandbox.ports import Forward as AsyncForward
from rorqual.sandbox.pty import Pty as AsyncPty
from rorqual.sandbox.session import Session as AsyncSession
from rorqual.sandbox.spec import CommandResult, Info, Isolation, Kind, Snapshot

T = TypeVar("T")
OnText = Callable[[str], None]

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0


def _background() -> asyncio.AbstractEventLoop:
    global _loop, _owner
    with _lock:
        if _loop is None or _owner != os.getpid():  # threads do not survive a fork
            _loop = asyncio.new_event_loop()
            _owner = os.getpid()
            threading.Thread(target=_loop.run_forever, name="rorqual-sandbox", daemon=True).start()
        return _loop


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run on the background loop and wait. Raises: SandboxError inside a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        work.close()
        raise SandboxError(
            "Sandbox was called inside a running event loop, which it would block. Use AsyncSandbox there, with await."
        )
    future = asyncio.run_coroutine_threadsafe(work, _background())
    try:
        return future.result()
    except BaseException:  # also KeyboardInterrupt: nothing is left running behind the caller's back
        if not future.done():
            future.cancel()
            concurrent.futures.wait([future], timeout=5)
        raise


MAX_UNTAKEN = 4 << 20
"""Characters or bytes of output that wait for callbacks at most; what comes beyond is not handed to them."""


class _Calls:
    """Takes callbacks of the background loop to the thread that waits.

    The loop may not wait for that thread, and a program inside can write faster than any callback takes: so what waits
    has a bound. The command's result is not touched by it.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[Any], None], Any] | None] = queue.SimpleQueue()
        self._untaken = 0
        self._counting = threading.Lock()

    def wrap(self, function: Callable[[Any], None] | None) -> Callable[[Any], None] | None:
        if function is None:
            return None

        def later(value: Any) -> None:
            with self._counting:
                if self._untaken + len(value) > MAX_UNTAKEN:
                    return
                self._untaken += len(value)
            self._queue.put((function, value))

        return later

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        async def whole() -> T:
            try:
                return await work
            finally:
                self._queue.put(None)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            return wait_for(work)  # refuses
        future = asyncio.run_coroutine_threadsafe(whole(), _background())
        try:
            while (item := self._queue.get()) is not None:
                with self._counting:
                    self._untaken -= len(item[1])
                item[0](item[1])
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                concurrent.futures.wait([future], timeout=5)
            raise


class CommandHandle:
    """A started command; see commands.CommandHandle."""

    def __init__(self, handle: AsyncHandle, calls: _Calls | None = None) -> None:
        self._handle = handle
        self._calls = calls or _Calls()

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
        calls = _Calls()
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
        calls = _Calls()
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
        calls = _Calls()
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

    def __init__(self, pty: AsyncPty, calls: _Calls) -> None:
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
        calls = _Calls()
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


class Sandbox:
    """One sandbox, driven by this process. Make one with `create` or `connect`; use it as a context manager.

    >>> with Sandbox.create("container") as sandbox:
    ...     sandbox.commands.run("echo hello").stdout
    'hello\\n'
    """

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox
        self.commands = Commands(sandbox)
        self.files = Files(sandbox)
        self.pty = PtyFactory(sandbox)
        self.ports = Ports(sandbox)

    @classmethod
    def create(
        cls,
        kind: Kind = "container",
        *,
        image: str | None = None,
        layers: Sequence[str] = (),
        snapshot: str | Snapshot | None = None,
        cpu: float = 1.0,
        memory_mb: int = 512,
        disk_mb: int = 1024,
        pids: int = 256,
        network: str | Sequence[str] = "none",
        env: Mapping[str, str] | None = None,
        user: str = "agent",
        cwd: str | None = None,
        create_timeout: float = 60.0,
        idle_ttl: float = 300.0,
        max_lifetime: float = 3600.0,
        paused_ttl: float = 86400.0,
        driver: str | None = None,
        min_isolation: Isolation | None = None,
        metadata: Mapping[str, str] | None = None,
        home: str | Path | None = None,
    ) -> Sandbox:
        """A new sandbox, ready for commands; see AsyncSandbox.create."""
        return cls(
            wait_for(
                AsyncSandbox.create(
                    kind,
                    image=image,
                    layers=layers,
                    snapshot=snapshot,
                    cpu=cpu,
                    memory_mb=memory_mb,
                    disk_mb=disk_mb,
                    pids=pids,
                    network=network,
                    env=env,
                    user=user,
                    cwd=cwd,
                    create_timeout=create_timeout,
                    idle_ttl=idle_ttl,
                    max_lifetime=max_lifetime,
                    paused_ttl=paused_ttl,
                    driver=driver,
                    min_isolation=min_isolation,
                    metadata=metadata,
                    home=home,
                )
            )
        )

    @classmethod
    def connect(cls, sandbox_id: str, *, takeover: bool = False, home: str | Path | None = None) -> Sandbox:
        """Drive a sandbox that another process made; see AsyncSandbox.connect."""
        return cls(wait_for(AsyncSandbox.connect(sandbox_id, takeover=takeover, home=home)))

    @classmethod
    def list(
        cls, *, metadata: Mapping[str, str] | None = None, state: str | None = None, home: str | Path | None = None
    ) -> list[Info]:
        """Sandboxes of this user that live."""
        return wait_for(AsyncSandbox.list(metadata=metadata, state=state, home=home))

    @classmethod
    def end(cls, sandbox_id: str, *, home: str | Path | None = None) -> None:
        """Kill a sandbox by id, whoever drives it; fine if it is gone already."""
        wait_for(AsyncSandbox.end(sandbox_id, home=home))

    @property
    def id(self) -> str:
        """Its name, by which other processes find it."""
        return self._sandbox.id

    @property
    def kind(self) -> Kind:
        """function, container, microvm or vm."""
        return self._sandbox.kind

    def info(self) -> Info:
        """State, driver, isolation, and what holds each limit."""
        return wait_for(self._sandbox.info())

    def metrics(self) -> dict[str, float]:
        """Host memory, running commands, seconds idle and paused."""
        return wait_for(self._sandbox.metrics())

    def ping(self) -> None:
        """Returns when the agent inside answers."""
        wait_for(self._sandbox.ping())

    def history(self, since: int = 0) -> Entries:
        """Entries of its log after number `since`."""
        return wait_for(self._sandbox.history(since))

    def call(
        self,
        source: str,
        entry: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = 60.0,
        max_output: int = 1 << 20,
        call: str | None = None,
    ) -> FunctionResult:
        """Run Python in a fresh fork of a warm interpreter inside; see AsyncSandbox.call."""
        return wait_for(
            self._sandbox.call(source, entry, args, kwargs, timeout=timeout, max_output=max_output, call=call)
        )

    def pause(self, keep_memory: bool = True) -> None:
        """Stop everything inside where it is."""
        wait_for(self._sandbox.pause(keep_memory))

    def resume(self) -> None:
        """Let it run on."""
        wait_for(self._sandbox.resume())

    def set_ttl(
        self, idle: float | None = None, max_lifetime: float | None = None, paused: float | None = None
    ) -> None:
        """Change times."""
        wait_for(self._sandbox.set_ttl(idle, max_lifetime, paused))

    def snapshot(self, kind: Literal["disk", "full"] = "disk", name: str | None = None) -> Snapshot:
        """Store its files, or files and memory."""
        return wait_for(self._sandbox.snapshot(kind, name))

    def fork(self, n: int = 1) -> Sandboxes:
        """`n` new sandboxes with the files as they are now."""
        return [Sandbox(one) for one in wait_for(self._sandbox.fork(n))]

    def rollback(self, snapshot: str | Snapshot) -> None:
        """Back to the files of a snapshot."""
        wait_for(self._sandbox.rollback(snapshot))

    def close(self) -> None:
        """End it; fine to call again."""
        wait_for(self._sandbox.close())

    kill = close

    def detach(self) -> None:
        """Let go of it without ending it."""
        wait_for(self._sandbox.detach())

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sandbox._ended is None:
            self.close()

    def __repr__(self) -> str:
        return repr(self._sandbox).replace("AsyncSandbox", "Sandbox")


Entries = list[dict[str, Any]]  # `list` is a method of the class above
Sandboxes = list[Sandbox]
