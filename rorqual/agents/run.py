"""One run from its folder: opens everything, goes through the loop, hands over the files, and puts all away again.

The same call starts a run and goes on with it, whatever killed it before.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.agents.environment import Environment, EnvironmentSettings, SandboxMaker
from rorqual.agents.errors import AgentError, InfraFailed
from rorqual.agents.log import TrajectoryLog
from rorqual.agents.loop import Answer, converse
from rorqual.agents.models.base import Backend
from rorqual.agents.models.choose import open_backend
from rorqual.agents.observer import Observer
from rorqual.agents.prompt import opening
from rorqual.agents.runs import RunFolder
from rorqual.agents.session import Limits, Session, SessionParts
from rorqual.agents.settings import RunSettings
from rorqual.agents.skills import Skill, find_skills
from rorqual.agents.tools import Tool, ToolBox, standard_tools
from rorqual.errors import SandboxError
from rorqual.journal import Journal
from rorqual.sandbox.errors import CapacityRejected, Gone, ReplayDivergence, StaleEpoch, TransportError


@dataclass(frozen=True)
class RunResult:
    """How a run ended. files: what it made, where it now lies. note: why they could not be had, "" where they could.

    verdict: what the judge said, where there is one.
    """

    answer: Answer
    files: list[Path]
    folder: Path
    note: str = ""
    verdict: dict[str, Any] | None = None


@dataclass
class RunHooks:
    """What a caller may put in: who watches, when to stop, and for tests another journal, sandbox or model.

    prepare: builds in a new sandbox what the task begins from. judge: looks at the sandbox when the agent is done; what
    it says (JSON-ready) goes on record once, before the run is closed.
    """

    observer: Observer = field(default_factory=Observer)
    stop: Callable[[], bool] = lambda: False
    journal: Callable[..., Journal] = Journal
    maker: SandboxMaker | None = None
    backend: Callable[[RunSettings, ToolBox], Backend] = open_backend
    more_tools: tuple[Tool, ...] = ()
    accept_new_weights: bool = False
    take_over: bool = False
    prepare: Callable[[Any], None] = lambda sandbox: None
    judge: Callable[[Any], dict[str, Any]] | None = None


def run_agent(folder: RunFolder, hooks: RunHooks | None = None) -> RunResult:
    """Run, or go on with, the run in this folder until it ends.

    Raises: Preempted when it was asked to stop; InfraFailed when the platform ended it; ReplayDivergence when the
    record and the loop disagree; ConfigError, MissingExtraError for what cannot begin; other RorqualErrors after
    which `--resume` goes on.
    """
    hooks = hooks or RunHooks()
    settings = folder.settings
    with contextlib.ExitStack() as stack:
        skills = find_skills([Path(skill) for skill in settings.skills])
        toolbox = ToolBox([*stack.enter_context(_tools(folder, settings, skills)), *hooks.more_tools])
        journal = stack.enter_context(hooks.journal(folder.journal, take_over=hooks.take_over))
        log = TrajectoryLog(journal)
        _check_not_failed(log)
        if log.facts.closed is None:
            log.attach(f"{socket.gethostname()}:{os.getpid()}")
        backend = hooks.backend(settings, toolbox)
        stack.callback(backend.close)
        environment = Environment(_maker(hooks), _environment(settings, hooks), log, folder.name)
        stack.callback(environment.release)
        session = Session(
            SessionParts(
                log, backend, toolbox, environment, folder.outbox, folder.name, settings.seed,
                limits=Limits(settings.turn_tokens, settings.total_tokens), observer=hooks.observer,
                stop=hooks.stop, accept_new_weights=hooks.accept_new_weights,
            )
        )  # fmt: skip
        mail_to = settings.mail_to[0] if settings.mail_to else None
        messages = opening(settings.task, skills, mail_to, settings.briefing)
        try:
            answer = converse(session, messages, settings.max_turns)
            if hooks.judge is not None and log.facts.closed is None and log.facts.verdict is None:
                log.write(log.event("verdict", verdict=hooks.judge(environment.sandbox)))
            return _finish(folder, log, session, environment, answer)
        except (InfraFailed, ReplayDivergence) as error:
            _fail(log, session, environment, error)
            raise


def _finish(
    folder: RunFolder, log: TrajectoryLog, session: Session, environment: Environment, answer: Answer
) -> RunResult:
    """Hand over the files, then say on record that this is done, then let the sandbox go."""
    out = folder.out()
    if log.facts.closed is None:
        files, note = _fetch(environment, out) if environment.id else ([], "")
        session.close(answer.ending, files=[path.relative_to(out).as_posix() for path in files], note=note)
    else:
        totals = log.facts.closed.totals
        files, note = [out / name for name in totals.get("files", ())], totals.get("note", "")
    environment.end()
    return RunResult(answer, files, folder.path, note, log.facts.verdict)


def _fetch(environment: Environment, out: Path) -> tuple[list[Path], str]:
    """The run's files, or why its sandbox will never give them; the answer stands without them.

    Raises: AgentError when they cannot be written here; SandboxError for what another try may mend.
    """
    try:
        return environment.download(out), ""
    except (Gone, TransportError, StaleEpoch, CapacityRejected):
        raise
    except SandboxError as error:
        return [], f"the files it made could not be fetched: {error}"
    except OSError as error:
        raise AgentError(f"the files it made cannot be written to {out} ({error}). Mend that, then --resume.") from None


def _fail(log: TrajectoryLog, session: Session, environment: Environment, error: Exception) -> None:
    """Put on record that the platform ended the run, and why; nobody goes on with its sandbox."""
    evidence = {name: str(value) for name, value in getattr(error, "evidence", {}).items()}
    log.write(log.event("infra_failed", error=type(error).__name__, message=str(error), evidence=evidence))
    session.close("infra_failed")
    with contextlib.suppress(SandboxError, OSError):
        environment.end()


def _check_not_failed(log: TrajectoryLog) -> None:
    closed = log.facts.closed
    if closed is not None and closed.stop_reason == "infra_failed":
        raise InfraFailed(
            "this run ended as INFRA_FAILED and is not gone on with; `rorqual agent show` has the evidence. Begin a "
            "new run."
        )


@contextlib.contextmanager
def _tools(folder: RunFolder, settings: RunSettings, skills: dict[str, Skill]) -> Iterator[list[Tool]]:
    tools = standard_tools()
    server = settings.mail_server()
    if server is not None:
        from rorqual.agents.tools.mail import mail_tool

        tools.append(mail_tool(server, settings.mail_from or settings.mail_to[0], settings.mail_to))
    if skills:
        from rorqual.agents.tools.skill import skill_tool

        tools.append(skill_tool(skills))
    if settings.mcp is None:
        yield tools
        return
    from rorqual.agents.tools.mcp import McpTools, read_servers

    with McpTools(read_servers(Path(settings.mcp)), folder.path / "mcp.log") as connected:
        yield [*tools, *connected.tools]


def _environment(settings: RunSettings, hooks: RunHooks) -> EnvironmentSettings:
    files = None if settings.files is None else Path(settings.files)
    return EnvironmentSettings(settings.kind, files, dict(settings.sandbox), hooks.take_over, hooks.prepare)


def _maker(hooks: RunHooks) -> Any:
    if hooks.maker is not None:
        return hooks.maker
    from rorqual.sandbox import Sandbox

    return Sandbox
