"""What a task of any form is: words for the agent, a state to begin from, and hidden tests that come in at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.errors import RorqualError


class TaskFailed(RorqualError):
    """The beginning of a task could not be built here, or its tests gave no verdict: no fault of the agent."""


@dataclass(frozen=True)
class Judged:
    """What the hidden tests said. score: from 0 to 1; details: for people, and files to keep as text."""

    score: float
    details: dict[str, Any] = field(default_factory=dict)


class AgentTask(ABC):
    """One task. cwd: absolute folder the agent works in; env: of its commands; agent_s: its time, None for no limit."""

    id: str
    instruction: str
    cwd: str = "/app"
    env: dict[str, str]
    agent_s: float | None = None
    image: str | None = None

    @abstractmethod
    def prepare(self, sandbox: Any) -> None:
        """Build the state to begin from in a fresh sandbox. Raises: TaskFailed, SandboxError."""

    @abstractmethod
    def judge(self, sandbox: Any) -> Judged:
        """Bring in the tests and run them on what the agent left. Raises: TaskFailed, SandboxError."""


class InvalidTask(AgentTask):
    """A task of a set that is malformed, or asks for what cannot be followed here. why: in words."""

    def __init__(self, id: str, why: str) -> None:
        self.id, self.why, self.instruction, self.env = id, why, "", {}

    def prepare(self, sandbox: Any) -> None:
        raise TaskFailed(self.why)

    def judge(self, sandbox: Any) -> Judged:
        raise TaskFailed(self.why)


def administer(sandbox: Any, command: str, *, cwd: str = "/", timeout_s: float = 600.0, env: Any = None) -> Any:
    """Run a command line with the rights of whoever builds the image: root, or the only user where there is but one."""
    user = None if sandbox.info().driver in ("bwrap", "zygote") else "root"
    return sandbox.commands.run(["/bin/sh", "-c", command], cwd=cwd, user=user, timeout=timeout_s, env=dict(env or {}))


def make_folder(sandbox: Any, path: str) -> None:
    """Make a folder anywhere and give it to the agent's user. Raises: TaskFailed."""
    quoted = "'" + path.replace("'", "'\\''") + "'"
    made = administer(
        sandbox, f"mkdir -p {quoted} && {{ [ -w {quoted} ] && [ $(id -u) != 0 ] || chown agent {quoted}; }}"
    )
    if made.exit_code != 0:
        raise TaskFailed(f"{path} could not be made in the sandbox: {made.stderr.strip()[-300:]}")


def put_in(sandbox: Any, source: Path, target: str) -> None:
    """Copy a file or the content of a folder to an absolute path."""
    folder = target if source.is_dir() else target.rsplit("/", 1)[0] or "/"
    if folder != "/":
        make_folder(sandbox, folder)
    if source.is_dir():
        sandbox.files.upload(source, target)
    else:
        sandbox.files.write(target, source.read_bytes())
        if source.stat().st_mode & 0o100:
            administer(sandbox, f"chmod +x '{target}'")
