"""Commands of a sandbox: run one and wait, start one and come back to it later.

Results are capped at the source: of each stream the first and the last half of `max_output` bytes come back joined, and
`truncated_bytes` counts what was left out between them (after the first `max_output // 2` bytes).
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rorqual.errors import SandboxError
from rorqual.sandbox.channel import AgentRefusal
from rorqual.sandbox.errors import CommandError, OutcomeUnknown, TransportError
from rorqual.sandbox.history import Call, fingerprint
from rorqual.sandbox.link import BREAK
from rorqual.sandbox.spec import CommandResult
from rorqual.sandbox.wire import Fields, Start, Tag, Type, Value

if TYPE_CHECKING:
    from rorqual.sandbox.async_sandbox import AsyncSandbox

GRACE_S = 5.0
INLINE_STDIN = 256 << 10
STDIN_PIECE = 64 << 10
RETAINED = 16 << 20
"""Bytes of one stream that an agent keeps at most; one that promises more is not believed."""
OnText = Callable[[str], None]
Entries = list[dict[str, object]]  # `list` is a method of a class below
StartFields = list[tuple[Tag, Value]]


def to_argv(cmd: str | Sequence[str]) -> list[str]:
    """A string runs through the sandbox's /bin/sh, a list directly."""
    argv = ["/bin/sh", "-c", cmd] if isinstance(cmd, str) else list(cmd)
    if not argv or any("\0" in word for word in argv):
        raise SandboxError(f"{cmd!r} cannot be run: a command needs at least a program and no zero bytes.")
    return argv


class CommandHandle:
    """A command that was started; it goes on when the client goes away, and `attach(id)` finds it again."""

    def __init__(self, sandbox: AsyncSandbox, handle_id: str) -> None:
        self.id = handle_id
        self._sandbox = sandbox
        self._offsets = [0, 0, 0]
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(2)]
        self._callbacks: list[OnText | None] = [None, None]
        self._raw: list[Callable[[bytes], None] | None] = [None, None, None]
        self._end: asyncio.Event | None = None
        self._attached = False
        self._attaching = asyncio.Lock()
        self._missed = [0, 0, 0]
        """Bytes of each stream that were dropped inside before they could be sent here."""
        self._input_at: int | None = None
        """How much input was taken inside; None where it is not known."""
        self._failure: BaseException | None = None

    def _listen(self, on_stdout: OnText | None, on_stderr: OnText | None, *raw: Callable[[bytes], None] | None) -> bool:
        """Whether anybody wants the output as it comes."""
        self._callbacks = [on_stdout, on_stderr]
        self._raw = [*raw, None, None, None][:3]
        wanted = any(self._callbacks) or any(self._raw)
        if wanted:
            self._end = asyncio.Event()
            self._attached = True
            self._sandbox._link.listeners[self.id] = self._event
        return wanted

    def _event(self, kind: int, fields: Fields) -> None:
        assert self._end is not None
        if kind == BREAK:
            self._attached = False
            self._end.set()
        elif kind == Type.EXITED:
            self._end.set()
        elif kind == Type.OUTPUT:
            index, data = range(3)[fields.number(Tag.STREAM) - 1], fields.bytes(Tag.DATA)
            start, had = fields.number(Tag.OFFSET), self._offsets[index]
            self._missed[index] += max(0, start - had)
            self._offsets[index] = max(had, start + len(data))
            data = data[max(0, had - start) :]  # after a break some comes again
            try:
                self._deliver(index, data)
            except BaseException as error:  # the caller's own function failed: it is told so by wait()
                self._failure = self._failure or error

    def _deliver(self, index: int, data: bytes) -> None:
        raw = self._raw[index]
        if raw is not None:
            raw(data)
        if index < 2:
            callback = self._callbacks[index]
            text = self._decoders[index].decode(data)
            if callback is not None and text:
                callback(text)

    async def wait(self, timeout: float | None = None) -> CommandResult:
        """How it ended. timeout: seconds to wait here; the command itself goes on. Raises: TimeoutError."""
        return await asyncio.wait_for(self._wait(), timeout)

    async def _wait(self) -> CommandResult:
        fields = await self._sandbox._ask(Type.WAIT, [(Tag.HANDLE, self.id)])
        if self._end is not None:
            if not self._attached:
                await self._attach()
            await self._ended()
            self._sandbox._link.listeners.pop(self.id, None)
        if self._failure is not None:
            raise self._failure
        return await self._sandbox.commands._result(self.id, fields)

    async def _ended(self) -> None:
        """Returns when it has ended and all it wrote was delivered; listens again when only the connection broke.

        Raises: AgentRefusal when the agent knows it no more; Gone, StaleEpoch.
        """
        assert self._end is not None
        while True:
            await self._end.wait()
            if self._attached and self._end.is_set():  # not so where another waiter listens again already
                return
            if not self._attached:
                await self._sandbox._link.until_going()
                await self._attach()

    async def _attach(self) -> None:
        """Have what it writes sent here from where it stopped."""
        assert self._end is not None
        async with self._attaching:
            if self._attached:
                return
            self._attached = True
            self._end.clear()
            at = [(Tag.OFFSET, self._offsets[0]), (Tag.INDEX, self._offsets[1])]
            try:
                state = await self._sandbox._link.request(Type.ATTACH, [(Tag.HANDLE, self.id), *at])
            except BaseException:
                self._attached = False
                self._end.set()
                raise
            self._note_input(state)

    def _note_input(self, state: Fields) -> None:
        """What the agent says of the input it took; one of an earlier version says nothing."""
        self._input_at = state.number(Tag.IN_TOTAL) if state.has(Tag.IN_TOTAL) else None

    async def kill(self, signal: int = 9) -> None:
        """Signal it. 9 ends its whole tree, whatever that does to escape."""
        await self._sandbox._ask(Type.KILL, [(Tag.HANDLE, self.id), (Tag.SIGNAL, signal)])

    async def write(self, data: str | bytes) -> None:
        """Write to its standard input (made with stdin="" or a terminal); waits while it does not read."""
        raw = data.encode() if isinstance(data, str) else data
        for start in range(0, len(raw), STDIN_PIECE):
            piece = raw[start : start + STDIN_PIECE]
            pause = 0.005
            while True:
                try:
                    await self._write_piece(piece)
                    break
                except AgentRefusal as refusal:
                    if refusal.number != errno.EAGAIN:
                        raise SandboxError(f"writing to command {self.id} failed: {refusal.text}.") from refusal
                await asyncio.sleep(pause)
                pause = min(0.2, 2 * pause)

    async def _write_piece(self, piece: bytes) -> None:
        """Exactly once, also where the connection breaks: the agent takes a piece whole or not at all, and counts."""
        fields: StartFields = [(Tag.HANDLE, self.id), (Tag.DATA, piece)]
        before = self._input_at
        try:
            self._note_input(await self._sandbox._ask(Type.WRITE, fields, again=False))
        except TransportError as error:
            if not error.retryable or before is None:
                raise
            self._note_input(await self._sandbox.commands._state(self.id, wake=True))
            if self._input_at == before:
                self._note_input(await self._sandbox._ask(Type.WRITE, fields, again=False))
            elif self._input_at != before + len(piece):
                raise  # another one wrote too, so nobody knows

    async def close_stdin(self) -> None:
        """Say that no more input comes."""
        await self._sandbox._ask(Type.CLOSE_STDIN, [(Tag.HANDLE, self.id)])


class Commands:
    """`sandbox.commands`."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox

    async def run(
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
        """Run a command and wait for its end.

        timeout: seconds, after which the whole tree is killed inside and the result says `timed_out`. on_stdout,
        on_stderr: called with text as it comes. check: raise unless the exit code is 0. call: a key that names this
        call for ever; asked again, it is answered from the record or joined, never run twice.
        Raises: CommandError (check=True); OutcomeUnknown, ReplayDivergence (call=...); SandboxError and its kinds.
        """
        argv = to_argv(cmd)
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        about = {"argv": argv, "cwd": cwd, "user": user, "env": sorted(env or {}), "timeout": timeout}  # no values
        printed = fingerprint(
            argv, {"cwd": cwd, "user": user, "env": dict(env or {}), "stdin": hashlib.sha256(raw or b"").hexdigest()}
        )
        async with self._sandbox._calling(call):
            known, lost = await self._known(call, printed)
            if isinstance(known, CommandResult):
                return self._checked(known, check, argv, timeout)
            handle = CommandHandle(self._sandbox, known.handle if known else _handle_name(call))
            record = known or await self._sandbox._history().accept(
                call or "", handle.id, printed, self._sandbox._record.incarnation, about
            )
            streaming = handle._listen(on_stdout, on_stderr)
            handle._attached = streaming and not lost  # one that runs already streams to nobody until it is asked to
            fields = self._start_fields(handle.id, argv, timeout, cwd, env, user, max_output)
            flags = Start.STREAM if streaming else Start(0)
            flags |= self._input_fields(fields, raw)
            try:
                result = await self._bounded(self._start_and_wait(handle, record, fields, flags, raw), timeout)
            except asyncio.CancelledError:
                if call is None:  # with a key somebody may come back for it
                    await asyncio.shield(self._end_unwanted(handle))
                raise
            finally:
                self._sandbox._link.listeners.pop(handle.id, None)
            sequence = await self._sandbox._history().finish(record, result)
            await self._forget(handle.id)
        return self._checked(_placed(result, record.index, sequence), check, argv, timeout)

    async def _known(self, call: str | None, printed: str) -> tuple[CommandResult | Call | None, bool]:
        if call is None:
            return None, False
        known = self._sandbox._history().find(call, printed, self._sandbox._record.incarnation)
        return known, isinstance(known, Call)

    async def _start_and_wait(
        self,
        handle: CommandHandle,
        record: Call,
        fields: StartFields,
        flags: Start,
        raw: bytes | None,
    ) -> CommandResult:
        """Start it (or join it: a name that the agent knows is never started again) and wait."""
        try:
            state = await self._sandbox._ask(Type.START, [*fields, (Tag.FLAGS, int(flags))])
        except AgentRefusal as refusal:
            if refusal.number == errno.ESTALE and record.key:
                raise OutcomeUnknown(
                    f"call {record.key!r} ran and its result was dropped before it was recorded. Roll back to a "
                    "snapshot from before, then ask again."
                ) from refusal
            raise await self._not_started(refusal, record, handle) from refusal
        if raw is not None and len(raw) > INLINE_STDIN and not state.number(Tag.IN_CLOSED):
            await self._send_input(handle, raw, state, record)
        return await handle._wait()

    async def _send_input(self, handle: CommandHandle, raw: bytes, state: Fields, record: Call) -> None:
        """Hand over what it has not got yet: of a call that is joined, its first client may have died half-way."""
        if not state.has(Tag.PID):  # joined, and the agent, of an earlier version, does not say how much it has
            raise OutcomeUnknown(
                f"call {record.key!r} runs and waits for its input, of which an unknown part arrived before its "
                "client went away. Kill it, roll back to a snapshot from before, then ask again."
            )
        handle._note_input(state)
        try:
            await handle.write(raw[handle._input_at or 0 :])
            await handle.close_stdin()
        except SandboxError as error:
            if isinstance(error, TransportError):
                raise
            # it ended, or closed its input, without reading everything: as in a pipeline, that is its own affair

    async def _not_started(self, refusal: AgentRefusal, record: Call, handle: CommandHandle) -> Exception:
        """A program that is not there is the command's fault, as in a shell; the rest is ours."""
        if refusal.text.startswith(("starting the program", "changing to its working directory")):
            code = 127 if refusal.number in (errno.ENOENT, errno.ENOTDIR) else 126
            result = CommandResult(code, b"", f"{refusal.text}\n".encode())
            if (on_stderr := handle._callbacks[1]) is not None:
                on_stderr(result.stderr)
            return _NeverStarted(result)
        await self._sandbox._history().refuse(record, refusal.text)
        return SandboxError(f"the sandbox could not start the command: {refusal.text}.")

    async def _bounded(self, work: Coroutine[Any, Any, CommandResult], timeout: float | None) -> CommandResult:
        """The guest enforces the timeout; this bound is for a guest that does not answer any more."""
        try:
            if timeout is None:
                return await work
            task = asyncio.ensure_future(work)
            clock = self._sandbox._clock
            if await clock.wait({task}, clock.now() + timeout + GRACE_S):
                return await task
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise TransportError(
                f"the sandbox did not say how a command ended within its timeout of {timeout:g} s and {GRACE_S:g} s "
                "more. The command's outcome is unknown; close the sandbox.",
                retryable=False,
            )
        except _NeverStarted as error:
            return error.result
        except asyncio.CancelledError:
            if timeout is not None:
                task.cancel()
            raise

    async def start(
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
        """Start a command and return at once. stdin: its first input; the input stays open when it is given."""
        argv = to_argv(cmd)
        handle = CommandHandle(self._sandbox, _handle_name(call))
        fields = self._start_fields(handle.id, argv, timeout, cwd, env, user, max_output)
        flags = Start.STDIN if stdin is not None else Start(0)
        await self._launch(handle, argv, fields, flags, handle._listen(on_stdout, on_stderr), call)
        raw = stdin.encode() if isinstance(stdin, str) else stdin or b""
        await handle.write(raw[handle._input_at or 0 :])  # of a call that is joined, what it has not got
        return handle

    async def _launch(
        self,
        handle: CommandHandle,
        argv: list[str],
        fields: StartFields,
        flags: Start,
        streaming: bool,
        call: str | None = None,
    ) -> None:
        async with self._sandbox._calling(call):
            about = {"handle": handle.id, "argv": argv, "incarnation": self._sandbox._record.incarnation}
            await self._sandbox._history().write("service_up", about)
            flags |= Start.STREAM if streaming else Start(0)
            try:
                handle._note_input(await self._sandbox._ask(Type.START, [*fields, (Tag.FLAGS, int(flags))]))
            except AgentRefusal as refusal:
                self._sandbox._link.listeners.pop(handle.id, None)
                raise SandboxError(f"the sandbox could not start {argv[0]!r}: {refusal.text}.") from refusal

    async def attach(
        self, handle_id: str, *, offset: int = 0, on_stdout: OnText | None = None, on_stderr: OnText | None = None
    ) -> CommandHandle:
        """A command that was started earlier, also by another process; output from byte `offset` on is sent again.

        Raises: SandboxError when there is none of that id (any more).
        """
        handle = CommandHandle(self._sandbox, handle_id)
        streaming = handle._listen(on_stdout, on_stderr)
        try:
            if streaming:
                handle._offsets[0] = offset
                state = await self._sandbox._ask(
                    Type.ATTACH, [(Tag.HANDLE, handle_id), (Tag.OFFSET, offset), (Tag.INDEX, 0)], wake=False
                )
            else:
                state = await self._state(handle_id)
            handle._note_input(state)
        except AgentRefusal as refusal:
            self._sandbox._link.listeners.pop(handle_id, None)
            raise SandboxError(
                f"sandbox {self._sandbox.id} has no command {handle_id!r}: {refusal.text}. commands.list() shows them."
            ) from refusal
        return handle

    async def _state(self, handle_id: str, *, wake: bool = False) -> Fields:
        """What the agent says of one command. Raises: AgentRefusal when it knows none of that id."""
        listed = await self._sandbox._ask(Type.LIST, wake=wake)
        for entry in map(Fields, listed.all(Tag.ENTRY)):
            if entry.text(Tag.HANDLE) == handle_id:
                return entry
        raise AgentRefusal(errno.ESRCH, "no such command")

    async def read(self, handle_id: str, stream: str = "stdout", offset: int = 0) -> tuple[int, bytes]:
        """Retained output from `offset` on: where it really begins (later if the middle is gone), and the bytes."""
        number = {"stdout": 1, "stderr": 2}[stream]
        fields = await self._sandbox._ask(
            Type.FETCH, [(Tag.HANDLE, handle_id), (Tag.STREAM, number), (Tag.OFFSET, offset)], wake=False
        )
        return fields.number(Tag.OFFSET), fields.bytes(Tag.DATA)

    async def session(
        self,
        *,
        shell: str = "/bin/sh",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> Session:
        """A shell that stays: its folder, variables and functions hold from one `run` to the next."""
        return await Session.open(self._sandbox, [shell], cwd, env, user)

    async def list(self) -> Entries:
        """Commands that run or whose result is still kept. Looking does not count as use."""
        fields = await self._sandbox._ask(Type.LIST, wake=False)
        entries = [Fields(one) for one in fields.all(Tag.ENTRY)]
        return [
            {
                "id": entry.text(Tag.HANDLE),
                "pid": entry.number(Tag.PID),
                "running": not entry.number(Tag.DONE),
                "duration_ms": entry.number(Tag.DURATION_US) / 1000,
                "stdout_bytes": entry.number(Tag.OUT_TOTAL),
                "stderr_bytes": entry.number(Tag.ERR_TOTAL),
            }
            for entry in entries
        ]

    def _start_fields(
        self,
        handle: str,
        argv: Sequence[str],
        timeout: float | None,
        cwd: str | None,
        env: Mapping[str, str] | None,
        user: str | None,
        max_output: int,
    ) -> StartFields:
        fields: StartFields = [(Tag.HANDLE, handle), (Tag.MAX_OUTPUT, max(0, max_output))]
        fields += [(Tag.ARG, word) for word in argv]
        fields += [(Tag.ENV, f"{name}={value}") for name, value in (env or {}).items()]
        if timeout is not None:
            fields.append((Tag.TIMEOUT_MS, max(1, int(timeout * 1000))))
        if cwd is not None:
            fields.append((Tag.CWD, cwd))
        if user is not None:
            fields.append((Tag.USER, user))
        return fields

    def _input_fields(self, fields: StartFields, raw: bytes | None) -> Start:
        if raw is None:
            return Start(0)
        if len(raw) <= INLINE_STDIN:
            fields.append((Tag.DATA, raw))
        return Start.STDIN

    async def _result(self, handle: str, fields: Fields) -> CommandResult:
        streams, lost = [], {}
        for index, name in enumerate(("stdout", "stderr")):
            total = fields.number((Tag.OUT_TOTAL, Tag.ERR_TOTAL)[index])
            lost[name] = fields.number((Tag.OUT_LOST, Tag.ERR_LOST)[index])
            inline = (Tag.OUT_DATA, Tag.ERR_DATA)[index]
            streams.append(
                fields.bytes(inline) if fields.has(inline) else await self._fetch(handle, name, total, lost[name])
            )
        status = fields.number(Tag.STATUS) & 0xFFFF
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        code = 128 + number if number is not None else os.WEXITSTATUS(status)
        return CommandResult(
            exit_code=code,
            stdout_bytes=streams[0],
            stderr_bytes=streams[1],
            signal=number,
            timed_out=bool(fields.number(Tag.TIMED_OUT)),
            oom_killed=code != 0 and await self._sandbox._new_oom_kills(),
            truncated_bytes=lost,
            duration_ms=fields.number(Tag.DURATION_US) / 1000,
            paused_ms=fields.number(Tag.PAUSED_US) / 1000,
        )

    async def _fetch(self, handle: str, stream: str, total: int, lost: int) -> bytes:
        data, offset = bytearray(), 0
        while len(data) < min(total - lost, RETAINED):
            at, piece = await self.read(handle, stream, offset)
            if not piece:
                break
            data += piece
            offset = at + len(piece)
        return bytes(data)

    async def _forget(self, handle: str) -> None:
        """Let the agent drop a result that is on record here; if it cannot be told, it drops it by itself."""
        with contextlib.suppress(SandboxError, AgentRefusal):
            await self._sandbox._ask(Type.FORGET, [(Tag.HANDLE, handle)], wake=False)

    async def _end_unwanted(self, handle: CommandHandle) -> None:
        with contextlib.suppress(SandboxError, AgentRefusal, TimeoutError):
            await asyncio.wait_for(handle.kill(), GRACE_S)

    def _checked(self, result: CommandResult, check: bool, argv: Sequence[str], timeout: float | None) -> CommandResult:
        if check and (result.exit_code != 0 or result.timed_out):
            how = f"ended with exit code {result.exit_code}"
            if result.timed_out:
                how = f"was killed after its timeout of {timeout:g} s" if timeout is not None else "was killed"
            elif result.oom_killed:
                how = "was killed because the sandbox's memory was used up"
            tail = result.stderr[-500:].strip() or result.stdout[-500:].strip()
            raise CommandError(f"{' '.join(argv)[:200]!r} {how}: {tail or 'it wrote nothing'}", result)
        return result


from rorqual.sandbox.session import Session  # noqa: E402 - it builds on the handles above


class _NeverStarted(Exception):
    def __init__(self, result: CommandResult) -> None:
        self.result = result


def _handle_name(call: str | None) -> str:
    if call is None:
        return secrets.token_hex(8)
    return "call-" + hashlib.sha256(call.encode()).hexdigest()[:32]


def _placed(result: CommandResult, index: int, sequence: int) -> CommandResult:
    from dataclasses import replace

    return replace(result, call_index=index, journal_seq=sequence)
