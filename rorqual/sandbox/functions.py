"""Small Python calls in a sandbox: `sandbox.call(source, entry, args)` and what comes back.

A warm interpreter inside (function_runner.py) is forked for each call, so a call costs milliseconds, starts from the
same clean state, and leaves no process behind. Files stay from one call to the next until the sandbox is closed.

A call with a key runs once. Its name inside is made of the key, so whoever comes in a dead client's place sends the
same line to the same interpreter, which joins it to the call that runs, or says again how it ended. Only where that
interpreter is no more does nobody know.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.errors import SandboxError
from rorqual.sandbox.channel import AgentRefusal
from rorqual.sandbox.commands import GRACE_S, CommandHandle
from rorqual.sandbox.errors import OutcomeUnknown, TransportError
from rorqual.sandbox.history import fingerprint
from rorqual.sandbox.spec import CommandResult
from rorqual.sandbox.wire import Fields, Start, Type

if TYPE_CHECKING:
    from rorqual.sandbox.async_sandbox import AsyncSandbox

RUNNER = Path(__file__).with_name("function_runner.py")
LOADER = "import base64, sys; exec(compile(base64.b64decode(sys.stdin.buffer.readline()), '<string>', 'exec'))"
PREFIX = "functions-"
MAX_TASK = 8 << 20
RETAINED = 16 << 20
MAX_REPORT = 64 << 20
READY_S = 30.0


@dataclass(frozen=True)
class FunctionResult:
    """What a call came to: `value` (from JSON), or `error` with the exception's name, its message and traceback.

    duration_ms: time that the sandbox was paused not counted, which is paused_ms. truncated_bytes: per stream, how many
    bytes of the middle were left out. replayed: answered from the record.
    """

    value: Any = None
    error: str | None = None
    message: str = ""
    traceback: str = ""
    stdout: str = ""
    stderr: str = ""
    timed_out: bool = False
    duration_ms: float = 0.0
    paused_ms: float = 0.0
    truncated_bytes: Mapping[str, int] = field(default_factory=lambda: {"stdout": 0, "stderr": 0})
    replayed: bool = False

    @property
    def ok(self) -> bool:
        """Whether it returned."""
        return self.error is None


class Functions:
    """The warm interpreter of one sandbox, as this client sees it."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox
        self._handle: CommandHandle | None = None
        self._line = bytearray()
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._opening = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._incarnation = 0
        self._on_record: list[str] = []
        """Calls whose kept reports the interpreter may forget."""

    async def warm(self) -> CommandHandle:
        """Start the interpreter, or find the one that runs; returns it when it takes calls.

        Raises: SandboxError when there is no Python inside.
        """
        async with self._opening:
            handle = self._handle
            if handle is not None and self._incarnation == self._sandbox._record.incarnation:
                try:
                    await handle._attach()  # nothing to do unless the connection broke
                    return handle
                except AgentRefusal:  # it ended meanwhile
                    self._let_go(handle)
            self._incarnation = self._sandbox._record.incarnation
            there = next((entry for entry in await self._sandbox.commands.list() if _is_interpreter(entry)), None)
            self._line.clear()
            if there is None:
                handle = self._listen(CommandHandle(self._sandbox, PREFIX + secrets.token_hex(8)))
                await self._start(handle)
                return handle
            handle = self._listen(CommandHandle(self._sandbox, str(there["id"])))
            handle._offsets[0] = int(str(there["stdout_bytes"]))
            handle._attached = False
            try:
                await handle._attach()
                await handle.write("\n")  # its client before this one may have died in the middle of a line
            except SandboxError as error:
                if not _takes_nothing(error):
                    raise
                await self._see_end(handle, error)
                handle = self._listen(CommandHandle(self._sandbox, PREFIX + secrets.token_hex(8)))
                await self._start(handle)
            return handle

    async def _see_end(self, handle: CommandHandle, error: Exception) -> None:
        """An interpreter that takes nothing any more was just killed: wait until that is known. Raises: the error."""
        try:
            with contextlib.suppress(AgentRefusal):
                await asyncio.wait_for(handle._ended(), READY_S)
        except TimeoutError:
            raise error from None
        self._let_go(handle)

    def _listen(self, handle: CommandHandle) -> CommandHandle:
        """Take this interpreter's output, and let go of it when it ends."""
        handle._listen(None, None, self._take)
        self._handle = handle
        usual = handle._event

        def event(kind: int, fields: Fields) -> None:
            usual(kind, fields)
            if kind == Type.EXITED:
                self._let_go(handle)

        self._sandbox._link.listeners[handle.id] = event
        return handle

    def _let_go(self, handle: CommandHandle) -> None:
        """It ended: whoever waits for it is told."""
        self._sandbox._link.listeners.pop(handle.id, None)
        if self._handle is handle:
            self._handle = None
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(TransportError("the warm interpreter ended.", retryable=False))

    async def _start(self, handle: CommandHandle) -> None:
        ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[""] = ready
        argv = ["python3", "-I", "-c", LOADER]
        commands = self._sandbox.commands
        fields = commands._start_fields(handle.id, argv, None, None, {"PYTHONDONTWRITEBYTECODE": "1"}, None, RETAINED)
        try:
            await commands._launch(handle, argv, fields, Start.STDIN, True)
            await handle.write(base64.b64encode(RUNNER.read_bytes()) + b"\n")
            await self._until(ready, handle, READY_S)
        except (SandboxError, TimeoutError) as error:
            self._handle = None
            raise SandboxError(
                f"no Python interpreter came up in sandbox {self._sandbox.id}: {error}. "
                "sandbox.call needs python3 in the image; commands.run needs none."
            ) from error
        finally:
            self._waiting.pop("", None)
            _drop(ready)

    def _take(self, data: bytes) -> None:
        """What came on its standard output: reports, and whatever the code inside wrote there."""
        self._line += data
        if len(self._line) > MAX_REPORT and b"\n" not in data:
            self._line.clear()
        while b"\n" in self._line:
            text, _, rest = self._line.partition(b"\n")
            self._line = bytearray(rest)
            try:
                report = json.loads(text)
                future = self._waiting.get(report["id"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # what runs inside may write to this stream too
            if future is not None and not future.done():
                future.set_result(report)

    async def call(
        self,
        source: str,
        entry: str | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        timeout: float | None,
        max_output: int,
        call: str | None,
    ) -> FunctionResult:
        """See AsyncSandbox.call."""
        task = {
            "source": source,
            "entry": entry,
            "args": list(args),
            "kwargs": dict(kwargs),
            "timeout": timeout,
            "max_output": max_output,
            "keyed": call is not None,
        }
        try:
            printed = fingerprint(["python-call"], {name: task[name] for name in ("source", "entry", "args", "kwargs")})
            number = secrets.token_hex(12) if call is None else self._name(call, printed)
            line = json.dumps({"id": number, **task}).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise SandboxError(f"the arguments of a call must be what JSON can hold: {error}.") from error
        if len(line) > MAX_TASK:
            raise SandboxError(
                f"a call of {len(line):,} bytes is more than the {MAX_TASK:,} carried. Write a file first."
            )
        async with self._sandbox._calling(call):
            history, incarnation = self._sandbox._history(), self._sandbox._record.incarnation
            known = history.find(call, printed, incarnation) if call is not None else None
            if isinstance(known, CommandResult):
                return _unpacked(known)
            handle = await self.warm()
            if known is not None and known.handle != handle.id:
                raise _unknown(call, "the interpreter that ran it is no more")
            record = known or await history.accept(
                call or "", handle.id, printed, incarnation, {"argv": ["python-call", entry or ""]}
            )
            try:
                report = await self._report(handle, number, line, timeout)
            except TransportError as error:
                if known is None or self._handle is handle:
                    raise
                raise _unknown(call, "the interpreter that ran it is no more") from error
            if report.get("dropped"):
                raise _unknown(call, "its result was dropped inside before anybody came for it")
            result = _result(report)
            await history.finish(record, _packed(result))
            if call is not None:
                self._on_record.append(number)
            return result

    def _name(self, call: str, printed: str) -> str:
        """What the interpreter knows a keyed call by. A copy of a sandbox, memory and all, makes calls of its own."""
        return hashlib.sha256("\0".join((self._sandbox.id, call, printed)).encode()).hexdigest()[:32]

    async def _report(self, handle: CommandHandle, number: str, line: bytes, timeout: float | None) -> dict[str, Any]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            if self._handle is not handle:  # it ended right after it was found
                raise TransportError("the warm interpreter ended.", retryable=False)
            if self._on_record:
                line = json.dumps({"forget": self._on_record}).encode() + b"\n" + line
                self._on_record = []
            async with self._writing:  # two long lines must not be mixed
                try:
                    await handle.write(line)
                except SandboxError as error:
                    if not _takes_nothing(error):
                        raise
                    await self._see_end(handle, error)
                    raise TransportError("the warm interpreter ended.", retryable=False) from error
            return await self._until(future, handle, None if timeout is None else timeout + GRACE_S)
        except TimeoutError as error:
            raise TransportError(
                f"a call did not report within its timeout of {timeout:g} s and {GRACE_S:g} s more; close the sandbox.",
                retryable=False,
            ) from error
        finally:
            self._waiting.pop(number, None)
            _drop(future)

    async def _until(
        self, future: asyncio.Future[dict[str, Any]], handle: CommandHandle, seconds: float | None
    ) -> dict[str, Any]:
        """What is reported, waited for while the sandbox runs; where the connection breaks it is asked for again.

        Raises: TimeoutError; TransportError when the interpreter ended; Gone, StaleEpoch.
        """
        clock = self._sandbox._clock
        ended = asyncio.ensure_future(handle._ended())
        try:
            in_time = await clock.wait({future, ended}, None if seconds is None else clock.now() + seconds)
            if not in_time:
                raise TimeoutError("it did not report in time")
            if not future.done():
                with contextlib.suppress(AgentRefusal):
                    ended.result()
                self._let_go(handle)
            return future.result()
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)


def _unknown(call: str | None, why: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"call {call!r} began and its client went away before its result was recorded; {why}. Roll back to a snapshot "
        "from before, then ask again."
    )


def _takes_nothing(error: SandboxError) -> bool:
    """Whether the agent said so: the interpreter is gone, or its standard input is."""
    return isinstance(error, AgentRefusal) or isinstance(error.__cause__, AgentRefusal)


def _is_interpreter(entry: Mapping[str, object]) -> bool:
    return str(entry["id"]).startswith(PREFIX) and bool(entry["running"])


def _drop(future: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more, so its exception is not one that went unnoticed."""
    if not future.cancel() and not future.cancelled():
        future.exception()


def _result(report: Mapping[str, Any]) -> FunctionResult:
    """The report as a result. Code inside may have written one itself; then it may be of any shape."""

    def text(name: str) -> str:
        return base64.b64decode(report.get(name, "")).decode("utf-8", errors="replace")

    try:
        return FunctionResult(
            value=report.get("value"),
            error=None if report.get("error") is None else str(report["error"]),
            message=str(report.get("message", "")),
            traceback=str(report.get("traceback", "")),
            stdout=text("stdout"),
            stderr=text("stderr"),
            timed_out=bool(report.get("timed_out")),
            duration_ms=float(report.get("duration_ms", 0.0)),
            paused_ms=float(report.get("paused_ms", 0.0)),
            truncated_bytes={name: int(report.get(f"{name}_lost", 0)) for name in ("stdout", "stderr")},
        )
    except (ValueError, TypeError, OverflowError) as error:
        return FunctionResult(error="WorkerEnded", message=f"the call's report was tampered with: {error}")


def _packed(result: FunctionResult) -> CommandResult:
    """As the log holds every result: the structured part stands in for standard output."""
    parts = {name: getattr(result, name) for name in ("value", "error", "message", "traceback", "stdout", "stderr")}
    return CommandResult(
        exit_code=0 if result.ok else 1,
        stdout_bytes=json.dumps(parts).encode(),
        timed_out=result.timed_out,
        truncated_bytes=dict(result.truncated_bytes),
        duration_ms=result.duration_ms,
        paused_ms=result.paused_ms,
    )


def _unpacked(result: CommandResult) -> FunctionResult:
    return FunctionResult(
        **json.loads(result.stdout_bytes),
        timed_out=result.timed_out,
        duration_ms=result.duration_ms,
        paused_ms=result.paused_ms,
        truncated_bytes=result.truncated_bytes,
        replayed=True,
    )
