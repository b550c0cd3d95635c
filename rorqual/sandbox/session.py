"""A shell that stays open in a sandbox, so that folder, variables and functions hold from one command to the next.

Each command is handed to the shell's `eval`, and its end is marked on standard output, on standard error and, with the
exit code, on a third pipe; the mark is drawn anew each time, so what a command writes is not taken for it.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rorqual.errors import SandboxError
from rorqual.sandbox.spec import CommandResult
from rorqual.sandbox.wire import Start

if TYPE_CHECKING:
    from rorqual.sandbox.async_sandbox import AsyncSandbox
    from rorqual.sandbox.commands import CommandHandle

STATUS_BYTES = 4096


class _Stream:
    """What came since the last command began, the middle left out beyond `limit` bytes."""

    def __init__(self) -> None:
        self.limit = 0
        self.begin(1 << 20, b"", 0)

    def begin(self, limit: int, mark: bytes, missed: int) -> None:
        """missed: how much of this stream never came, up to now."""
        self.limit, self.mark, self.missed = limit, mark, missed
        self.head, self.tail = bytearray(), bytearray()
        self.lost = 0
        self.done = False

    def take(self, data: bytes) -> None:
        if self.done:
            return  # of a process in the background, after the command
        self.tail += data
        at = self.tail.find(self.mark) if self.mark else -1
        if at >= 0:
            del self.tail[at:]
            self.done = True
        room = self.limit // 2 - len(self.head)
        keep = 0 if self.done else len(self.mark)  # half a mark may be at the end
        if room > 0:
            moved = min(room, max(0, len(self.tail) - keep))
            self.head += self.tail[:moved]
            del self.tail[:moved]
        over = len(self.tail) - keep - self.limit // 2
        if over > 0:
            self.lost += over
            del self.tail[:over]

    def bytes(self) -> bytes:
        return bytes(self.head + self.tail)


class Session:
    """An open shell. Make one with `sandbox.commands.session()`; one command at a time."""

    def __init__(self, sandbox: AsyncSandbox, handle: CommandHandle) -> None:
        self._sandbox = sandbox
        self._handle = handle
        self._streams = [_Stream(), _Stream(), _Stream()]
        self._news = asyncio.Event()
        self._busy = asyncio.Lock()
        self._closed = False

    @classmethod
    async def open(
        cls,
        sandbox: AsyncSandbox,
        argv: Sequence[str],
        cwd: str | None,
        env: Mapping[str, str] | None,
        user: str | None,
    ) -> Session:
        """Start the shell. Raises: SandboxError when it cannot be."""
        from rorqual.sandbox.commands import CommandHandle

        handle = CommandHandle(sandbox, "session-" + secrets.token_hex(8))
        session = cls(sandbox, handle)
        commands = sandbox.commands
        fields = commands._start_fields(handle.id, argv, None, cwd, env, user, 1 << 20)
        takers = [session._taker(index) for index in range(3)]
        streaming = handle._listen(None, None, *takers)
        await commands._launch(handle, list(argv), fields, Start.STDIN | Start.STATUS_PIPE, streaming)
        return session

    def _taker(self, index: int):  # type: ignore[no-untyped-def]
        def take(data: bytes) -> None:
            self._streams[index].take(data)
            self._news.set()

        return take

    async def run(self, cmd: str, *, timeout: float = 60.0, max_output: int = 1 << 20) -> CommandResult:
        """Run a command in the shell. After a timeout the shell is ended with all it started.

        timeout: seconds, in which time that the sandbox was paused does not count; max_output: bytes of each stream.
        Raises: SandboxError when the shell has ended.
        """
        async with self._busy:
            if self._closed:
                raise SandboxError(f"the shell of session {self._handle.id} has ended. Open another session.")
            mark = secrets.token_hex(16)
            for index, limit in enumerate((max_output, max_output, STATUS_BYTES)):
                wanted = mark.encode() if index < 2 else f"{mark}\n".encode()
                self._streams[index].begin(limit, wanted, self._handle._missed[index])
            history = self._sandbox._history()
            about = {"session": self._handle.id, "argv": [cmd], "timeout": timeout}
            record = await history.accept("", self._handle.id, "", self._sandbox._record.incarnation, about)
            clock = self._sandbox._clock
            started, stopped_s = clock.now(), clock.stopped_s
            end = f"{{ printf '%d {mark}\\n' $? >&3; printf {mark}; printf {mark} >&2; }}"
            await self._handle.write(f"command eval {shlex.quote(cmd)} </dev/null 3>&-\n{end}\n")
            over = await self._until_marked(started + timeout)
            result = self._result(over, (clock.now() - started) * 1000, (clock.stopped_s - stopped_s) * 1000)
            await history.finish(record, result)
            return result

    async def _until_marked(self, end: float) -> str:
        """Why waiting ended: "done", "ended" (the shell) or "timeout" (the sandbox's clock shows `end`)."""
        over = "done"
        ended = asyncio.ensure_future(self._handle._ended())  # listens again where only the connection broke
        try:
            while over == "done" and not all(stream.done for stream in self._streams):
                self._news.clear()
                news = asyncio.ensure_future(self._news.wait())
                try:
                    in_time = await self._sandbox._clock.wait({news, ended}, end)
                finally:
                    news.cancel()
                if not self._news.is_set():
                    over = "ended" if ended.done() else over if in_time else "timeout"
            if ended.done():
                ended.result()
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
        if over != "done":
            await self.close()
        return over

    def _result(self, over: str, duration_ms: float, paused_ms: float) -> CommandResult:
        missed = [self._handle._missed[index] - self._streams[index].missed for index in range(2)]
        out, err, status = self._streams
        said = status.bytes().split()[:1]
        code = 137
        if over == "done":  # the shell's exit code, unless something inside wrote to its pipe
            code = int(said[0]) if said and said[0].isdigit() and len(said[0]) < 4 else 255
        return CommandResult(
            exit_code=code,
            stdout_bytes=out.bytes(),
            stderr_bytes=err.bytes(),
            signal=None if over == "done" else 9,
            timed_out=over == "timeout",
            truncated_bytes={"stdout": out.lost + missed[0], "stderr": err.lost + missed[1]},
            duration_ms=duration_ms,
            paused_ms=paused_ms,
        )

    async def close(self) -> None:
        """End the shell and what it started."""
        if not self._closed:
            self._closed = True
            await self._handle.kill()
            await self._handle._wait()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
