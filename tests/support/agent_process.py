"""Runs of agents in processes of their own, which kill themselves at a chosen place: the seams are a journal and a
sandbox that count, and die before or after what they are asked for.

Processes are forked from a server that has everything imported, so that a kill costs milliseconds. Imports no torch.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_sandbox import LocalSandbox, Maker

from rorqual.agents import Observer, RunHooks, create_run, find_run, run_agent
from rorqual.agents.cost import Meter
from rorqual.agents.report import records_of
from rorqual.agents.settings import RunSettings
from rorqual.agents.view import JsonView
from rorqual.journal import Journal
from rorqual.journal.records import Record, Tokens, ToolResult

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["agent_process"])


@dataclass
class Fuse:
    """Counts the places that a run passes and kills the process at number `at`; `names` are those passed."""

    at: int | None = None
    tokens_too: bool = False
    names: list[str] = field(default_factory=list)

    def passing(self, name: str) -> None:
        if self.at is not None and len(self.names) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)


class FusedJournal(Journal):
    """A journal with a fuse before and after each append and commit."""

    def __init__(self, *args: Any, fuse: Fuse, **more: Any) -> None:
        super().__init__(*args, **more)
        self._fuse = fuse
        self._last = ""

    def append(self, record: Record) -> int:
        self._last = getattr(record, "kind", "") or type(record).__name__
        self._pass("before append")
        lsn = super().append(record)
        self._pass("after append")
        return lsn

    def commit(self) -> int:
        self._pass("before commit")
        lsn = super().commit()
        self._pass("after commit")
        return lsn

    def _pass(self, where: str) -> None:
        if self._last != Tokens.__name__ or self._fuse.tokens_too:
            self._fuse.passing(f"{where} of {self._last}")


class FusedMaker(Maker):
    """Sandboxes with a fuse around everything they are asked for."""

    def __init__(self, root: Path, fuse: Fuse) -> None:
        super().__init__(root)
        self._fuse = fuse

    def create(self, kind: str, **options: Any) -> Any:
        self._fuse.passing("before create")
        made = self._fused(super().create(kind, **options))
        self._fuse.passing("after create")
        return made

    def connect(self, id: str, *, takeover: bool = False) -> Any:
        return self._fused(super().connect(id))

    def _fused(self, sandbox: LocalSandbox) -> LocalSandbox:
        for owner, name in (
            (sandbox.commands, "run"), (sandbox.files, "upload"), (sandbox.files, "download"), (sandbox, "snapshot"),
            (sandbox, "rollback"), (sandbox, "kill"),
        ):  # fmt: skip
            setattr(owner, name, self._around(getattr(owner, name), name))
        return sandbox

    def _around(self, inner: Any, name: str) -> Any:
        def outer(*args: Any, **more: Any) -> Any:
            self._fuse.passing(f"before {name}")
            result = inner(*args, **more)
            self._fuse.passing(f"after {name}")
            return result

        return outer


def script(path: Path, replies: Sequence[Mapping[str, Any]]) -> str:
    """A reply script on disk."""
    path.write_text(json.dumps({"replies": list(replies)}))
    return str(path)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """A call in a reply."""
    return {"name": name, "arguments": arguments}


_started: list[Any] = []


def end_started() -> None:
    """Kill every process that a test left: a stopped one would keep this one from ending."""
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


@dataclass
class Lab:
    """A place for runs: their home, their sandboxes, and processes that drive them."""

    home: Path

    @property
    def sandboxes(self) -> Path:
        return self.home / "sandboxes-of-test"

    def create(self, settings: RunSettings, name: str = "run") -> None:
        os.environ["RORQUAL_HOME"] = str(self.home)
        create_run(settings, name)

    def run(self, name: str = "run", **more: Any) -> "Ended":
        """Drive the run in a process until it ends or is killed."""
        process = self.start(name, **more)
        process.join()
        return self.ended(process, name)

    def start(self, name: str = "run", **more: Any) -> Any:
        process = SERVER.Process(target=drive, args=(str(self.home), name, more))
        process.start()
        _started.append(process)
        return process

    def ended(self, process: Any, name: str) -> "Ended":
        notes = self.home / f"{name}.passed"
        passed = json.loads(notes.read_text()) if notes.exists() else []
        error = self.home / f"{name}.error"
        return Ended(process.exitcode, passed, error.read_text() if error.exists() else "", self.ids(name))

    def ids(self, name: str = "run") -> list[int]:
        """The trajectory's ids after the prompt, as its journal holds them."""
        os.environ["RORQUAL_HOME"] = str(self.home)
        ids: list[int] = []
        for record in records_of(find_run(name)):
            ids += record.ids if isinstance(record, Tokens) else ()
            ids += record.observation_ids if isinstance(record, ToolResult) else ()
        return ids

    def records(self, name: str = "run") -> list[Record]:
        os.environ["RORQUAL_HOME"] = str(self.home)
        return list(records_of(find_run(name)))

    def acknowledged(self, name: str = "run") -> list[dict[str, Any]]:
        """What all processes of the run printed, in order; a last line that was cut off is none."""
        path = self.home / f"{name}.printed"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class Ended:
    """How a process ended. passed: the fuse's places, if it lived to tell."""

    code: int | None
    passed: list[str]
    error: str
    ids: list[int]

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


def drive(home: str, name: str, more: dict[str, Any]) -> None:
    """In the process: go on with the run, and write down how that went."""
    os.environ["RORQUAL_HOME"] = home
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    fuse = Fuse(more.get("at"), more.get("tokens_too", False))
    maker: Any = None
    if not more.get("real"):
        maker = FusedMaker(Path(home) / "sandboxes-of-test", fuse)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    with (Path(home) / f"{name}.printed").open("a") as printed:
        observer: Observer = JsonView(Meter(), printed)
        hooks = RunHooks(
            observer,
            stop=lambda: bool(stopped),
            journal=lambda path, **options: FusedJournal(path, fuse=fuse, **options),
            maker=maker,
            take_over=more.get("take_over", False),
        )
        error = Path(home) / f"{name}.error"
        error.unlink(missing_ok=True)
        try:
            run_agent(find_run(name), hooks)
        except Exception as problem:
            error.write_text(f"{type(problem).__name__}: {problem}")
            raise SystemExit(3) from None
        (Path(home) / f"{name}.passed").write_text(json.dumps(fuse.names))
