"""The sandbox of a trajectory, over as many processes as it takes: made, found again, taken back, made anew.

A sandbox outlives the process that drives it. The next process connects to it by the id on record; when it is gone, or
when nobody knows how a call ended, the state before that call is restored from the newest snapshot (or from the
beginning) and the finished calls after it are run again and compared with what the model was shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rorqual import log as logs
from rorqual.agents.errors import AgentError, InfraFailed
from rorqual.agents.keys import attempt_key
from rorqual.agents.log import SnapshotFact, TrajectoryLog
from rorqual.agents.toolkit import build_toolkit
from rorqual.agents.tools.base import ToolContext
from rorqual.errors import SandboxError
from rorqual.journal.records import EnvSnapshot
from rorqual.sandbox.errors import Gone, OutcomeUnknown, SnapshotFailed, TransportError, Unsupported
from rorqual.sandbox.spec import CommandResult

logger = logs.get(__name__)
T = TypeVar("T")

MOST_RECOVERIES = 3
"""Recoveries at one call; a call that ruins its sandbox each time ends the run."""

SNAPSHOT_AFTER_MS = 60_000.0
"""Command time since the last snapshot that is worth another one: about what a restore would have to run again."""

INPUT, OUTPUT = "files", "out"
"""Folders in the working folder: what the user gave, and what they get back."""

MAX_DOWNLOAD_BYTES = 256 << 20
MAX_DOWNLOAD_FILES = 2_000


class SandboxMaker(Protocol):
    """`rorqual.sandbox.Sandbox` itself, or another with these four."""

    def create(self, kind: Any, **options: Any) -> Any: ...
    def connect(self, sandbox_id: str, *, takeover: bool = False) -> Any: ...
    def list(self) -> Any: ...
    def end(self, sandbox_id: str) -> Any: ...


@dataclass(frozen=True)
class EnvironmentSettings:
    """What kind of sandbox, and what goes in. options: further arguments of `Sandbox.create`.

    take_over: drive it although a process that hangs still does; that one is fenced off. prepare: builds in each new
    sandbox what the task begins from, before the files go in.
    """

    kind: str = "container"
    files: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    take_over: bool = False
    prepare: Callable[[Any], None] = lambda sandbox: None


class Environment:
    """The sandbox of one trajectory. name: marks its sandboxes, so that one nobody recorded is found and ended.

    rerun: runs the finished call of that number again and returns whether its outcome is the recorded one.
    """

    def __init__(self, maker: SandboxMaker, settings: EnvironmentSettings, log: TrajectoryLog, name: str) -> None:
        self._maker, self._settings, self._log, self._name = maker, settings, log, name
        self._sandbox: Any = None
        self._toolkit_is_there = False
        self._restores_for: dict[int, int] = {}
        self._command_ms = 0.0
        self._is_abandoned = False
        self._restores_at_work = 0  # one may happen within another, at a call that is run again
        self.rerun: Callable[[int], bool] = lambda index: False
        self.note: Callable[[str], None] = lambda text: None

    @property
    def sandbox(self) -> Any:
        """The live sandbox, made or found at first use. Raises: SandboxError, InfraFailed, AgentError."""
        if self._is_abandoned:
            raise AgentError("the run was asked to stop, so its sandbox is left as it is. Go on with --resume.")
        if self._sandbox is None:
            self._open()
        return self._sandbox

    @property
    def id(self) -> str:
        """Of the sandbox on record, "" before there is one."""
        return str((self._log.facts.sandbox or {}).get("id", ""))

    @property
    def incarnation(self) -> int:
        """How often a sandbox was made for this trajectory."""
        return int((self._log.facts.sandbox or {}).get("incarnation", 0))

    # ------------------------------------------------------------------ calls

    def command(
        self,
        context: ToolContext,
        command: str | Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout_s: float = 60.0,
        prepare: Callable[[Any], None] = lambda sandbox: None,
    ) -> CommandResult:
        """Run a command as the call `context`: once, however often this is asked for.

        prepare: puts what the command needs into the sandbox; done again in one that was restored meanwhile.
        Raises: InfraFailed when its outcome is lost and cannot be had again.
        """
        argv = command if isinstance(command, str) else list(command)

        def run(sandbox: Any) -> CommandResult:
            prepare(sandbox)
            key = attempt_key(context.key, self._log.facts.generation)
            result: CommandResult = sandbox.commands.run(argv, stdin=stdin, timeout=timeout_s, call=key)
            return result

        result = self.use(context, run)
        self._command_ms += result.duration_ms
        return result

    def use(self, context: ToolContext, work: Callable[[Any], T]) -> T:
        """Do something with the sandbox for the call `context`, again after a recovery when it was lost meanwhile.

        Raises: InfraFailed as `command`.
        """
        while True:
            try:
                return work(self.sandbox)
            except SandboxError as error:
                self._after(error, context)

    def _after(self, error: SandboxError, context: ToolContext) -> None:
        """Do what an error of the sandbox asks for before the call is made again. Raises: it, if that is nothing."""
        if self._is_abandoned:
            raise error  # it comes of letting go, and the sandbox goes on
        match error:
            case OutcomeUnknown():
                self._recover(context, f"its outcome is unknown: {error}", needs_restore=context.policy != "rerun")
            case Gone():
                self._recover(context, f"the sandbox is gone ({error.reason})", needs_restore=True, in_place=False)
            case TransportError(retryable=True):
                self._reconnect(context, error)
            case TransportError():
                self._recover(context, f"the channel broke: {error}", needs_restore=True)
            case _:
                raise error

    def bring_toolkit(self, sandbox: Any) -> None:
        """Upload the tools' program unless it is there; part of preparing a command."""
        kit = build_toolkit()
        if not self._toolkit_is_there:
            if not sandbox.files.exists(kit.path):
                sandbox.files.write(kit.path, kit.data)
            self._toolkit_is_there = True

    def put(self, context: ToolContext, path: str, data: bytes) -> str:
        """Write a file into the sandbox; its path."""
        self.use(context, lambda sandbox: sandbox.files.write(path, data))
        return path

    def read_bytes(self, context: ToolContext, path: str, limit: int) -> bytes:
        """A file's bytes. Raises: SandboxError when it is not there; ValueError when it is larger than `limit`."""
        data: bytes = self.use(context, lambda sandbox: sandbox.files.read(path, format="bytes", limit=limit + 1))
        if len(data) > limit:
            raise ValueError(f"{path} is larger than {limit:,} bytes")
        return data

    # ---------------------------------------------------------------- opening

    def _open(self) -> None:
        facts = self._log.facts
        if facts.sandbox is None:
            self._make(None)
            self._snapshot()
            return
        try:
            self._adopt(self._connect())
        except (Gone, TransportError) as error:
            self._maker.end(self.id)  # where its agent does not answer, something of it may still be there
            self._restore(len(facts.results), f"the sandbox {self.id} is gone: {error}", in_place=False)
            return
        if facts.restoring:
            self._restore(len(facts.results), "an earlier restore was interrupted", in_place=True)

    def _connect(self) -> Any:
        try:
            return self._maker.connect(self.id, takeover=self._settings.take_over)
        except TransportError as error:
            if not error.retryable:
                raise
            return self._maker.connect(self.id, takeover=self._settings.take_over)

    def _make(self, snapshot: str | None) -> None:
        """A new sandbox, with the user's files unless they are in the snapshot; on record once it is complete."""
        if snapshot is None and self._settings.files is not None and not self._settings.files.is_dir():
            raise AgentError(
                f"a new sandbox needs the files of {self._settings.files}, and that is no folder any more. Bring it "
                "back, then go on with --resume."
            )
        self._end_strays()
        options = dict(self._settings.options)
        if snapshot is not None:  # it has the image in it
            options = {name: value for name, value in options.items() if name not in ("image", "layers")}
            options["snapshot"] = snapshot
        metadata = {**options.pop("metadata", {}), "trajectory": self._name}
        sandbox = self._maker.create(self._settings.kind, metadata=metadata, **options)
        self._adopt(sandbox)
        try:
            if snapshot is None:
                self._fill(sandbox)
            info = sandbox.info()
            fields = {"id": sandbox.id, "kind": info.kind, "driver": info.driver, "isolation": info.isolation}
            self._log.write(self._log.event("sandbox", **fields, incarnation=self.incarnation + 1))
        except BaseException:  # it is not on record, so nobody would go on with it or end it
            self.release()
            with contextlib.suppress(SandboxError, OSError):
                self._maker.end(sandbox.id)
            raise

    def _fill(self, sandbox: Any) -> None:
        """What a task begins from: its own preparation, a folder for results, the user's files."""
        self._settings.prepare(sandbox)
        sandbox.files.mkdir(OUTPUT)
        if self._settings.files is not None:
            sandbox.files.upload(str(self._settings.files), INPUT)

    def _adopt(self, sandbox: Any) -> None:
        self._sandbox, self._toolkit_is_there = sandbox, False

    def _end_strays(self) -> None:
        """End what a process left that died between making a sandbox and recording it; nothing ran in it."""
        for info in self._maker.list():
            if info.metadata.get("trajectory") == self._name and info.id != self.id:
                self._maker.end(info.id)

    def _reconnect(self, context: ToolContext, error: TransportError) -> None:
        """The channel broke and the sandbox may live on: connect again, and ask again with the same key."""
        self._count(context, str(error))
        self.release()

    # --------------------------------------------------------------- recovery

    def _count(self, context: ToolContext, why: str) -> None:
        count = self._restores_for.get(context.index, 0) + 1
        self._restores_for[context.index] = count
        if count > MOST_RECOVERIES:
            raise InfraFailed(
                f"call {context.index} lost its sandbox {count} times ({why}), so the run cannot go on. Look at the "
                "call in `rorqual agent show`; more memory or another kind of sandbox may help.",
                {"call_index": context.index, "key": context.key, "why": why},
            )

    def _recover(self, context: ToolContext, why: str, *, needs_restore: bool, in_place: bool = True) -> None:
        self._count(context, why)
        if needs_restore:
            self._restore(context.index, f"call {context.index}: {why}", in_place=in_place)
        else:
            self.note(f"call {context.index} is run again: {why}")
            restoring = self._log.facts.restoring  # as the restore has it that this call may be run again in
            self._log.write(self._log.event("generation", generation=self._next, restoring=restoring, why=why))

    @property
    def _next(self) -> int:
        return self._log.facts.generation + 1

    def _restore(self, index: int, why: str, *, in_place: bool) -> None:
        """Bring the files to where they were before call `index`. Raises: InfraFailed when that cannot be done."""
        facts = self._log.facts
        fitting = [fact for fact in facts.snapshots if fact.calls_before <= index]
        snapshot = fitting[-1] if fitting else None
        self.note(f"restoring the sandbox: {why}")
        # the new generation is durable before anything changes, so that no key of it was ever used before
        self._log.write(self._log.event("generation", generation=self._next, restoring=True, why=why))
        try:
            self._to(snapshot, in_place)
        except (SandboxError, OSError) as error:
            raise InfraFailed(
                f"the sandbox could not be restored ({error}), so the run cannot go on.", {"why": why, "index": index}
            ) from error
        self._restores_at_work += 1
        try:
            self._rerun_from(snapshot, index, why)
        finally:
            self._restores_at_work -= 1
        if self._restores_at_work == 0:
            self._log.write(self._log.event("restored", generation=self._log.facts.generation))

    def _rerun_from(self, snapshot: SnapshotFact | None, index: int, why: str) -> None:
        for earlier in range(snapshot.calls_before if snapshot else 0, index):
            if not self.rerun(earlier):
                raise InfraFailed(
                    f"call {earlier} was run again after the sandbox was lost and gave another result than the one "
                    "on record, so the files are not what the model believes. The run cannot go on.",
                    {"why": why, "call_index": earlier, "snapshot": snapshot.snapshot_id if snapshot else None},
                )

    def _to(self, snapshot: SnapshotFact | None, in_place: bool) -> None:
        if in_place and snapshot is not None and self._sandbox is not None and snapshot.sandbox_id == self.id:
            try:
                self._sandbox.rollback(snapshot.snapshot_id)
            except Unsupported:
                logger.info("no rollback in place with this driver; making a new sandbox from the snapshot")
            else:
                self._toolkit_is_there = False
                return
        old, self._sandbox = self._sandbox, None
        if old is not None:
            with contextlib.suppress(SandboxError):
                old.kill()
        self._make(snapshot.snapshot_id if snapshot else None)

    def after_call(self) -> None:
        """Take a snapshot when enough command time has gone into the files since the last one."""
        if self._command_ms >= SNAPSHOT_AFTER_MS:
            self._snapshot()

    def _snapshot(self) -> None:
        self._command_ms = 0.0
        try:
            taken = self._sandbox.snapshot("disk")
        except (Unsupported, SnapshotFailed) as error:
            logger.info("no snapshot of %s: %s", self.id, error)
            return
        self._log.write(EnvSnapshot(self.id, taken.id, taken.kind, taken.history_seq, self._log.number))

    # ------------------------------------------------------------------- ends

    def abandon(self) -> None:
        """From now on nothing is restored or begun: what a call still at work meets is for the next process."""
        self._is_abandoned = True

    def pause(self) -> None:
        """Let the sandbox rest until the run goes on; a driver that cannot leaves it running."""
        if self._sandbox is not None:
            with contextlib.suppress(SandboxError):
                self._sandbox.pause()

    def download(self, folder: Path) -> list[Path]:
        """What lies in the output folder, each file whole or not at all. Raises: SandboxError, AgentError."""
        partial = folder.parent / f".{folder.name}.part"
        if partial.exists():
            _remove(partial)
        partial.mkdir(parents=True)
        try:
            try:
                self._download(partial)
            except (Gone, TransportError) as error:
                self.note(f"the sandbox ended before its files were fetched: {error}")
                self.release()  # the next use restores it
                self._download(partial)
            return _move_into(partial, folder)
        finally:
            _remove(partial)

    def _download(self, folder: Path) -> None:
        limits = {"max_bytes": MAX_DOWNLOAD_BYTES, "max_files": MAX_DOWNLOAD_FILES}
        self.sandbox.files.download(OUTPUT, str(folder), **limits)

    def end(self) -> None:
        """Remove the sandbox, if there is one. Raises: SandboxError naming what could not be removed."""
        if self._sandbox is not None:
            self._sandbox.kill()
            self._sandbox = None
        elif self.id:
            self._maker.end(self.id)

    def release(self) -> None:
        """Let go of the sandbox without ending it: its commands go on, and the next process connects to it."""
        if self._sandbox is not None:
            with contextlib.suppress(SandboxError):
                self._sandbox.detach()
            self._sandbox = None


def _move_into(source: Path, folder: Path) -> list[Path]:
    moved = []
    for path in sorted(source.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        target = folder / path.relative_to(source)
        if target.is_dir():
            raise AgentError(f"{target} is a folder, and the run made a file of that name. Choose another --out.")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        moved.append(target)
    return moved


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
