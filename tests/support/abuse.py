"""The hostile program of `abuse/` built and run in a sandbox, or in a weaker place that shows that the suite would notice.

A row of its output is an attempt: name, verdict, what was seen. `breaches` are those that worked. Every check of the
suite is run twice: in the sandbox, where there must be no breach, and in a setting with one wall taken away, where the
same judgement must find one.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from rorqual import Sandbox
from rorqual.sandbox.agent.build import compiler
from rorqual.sandbox.drivers.base import Running
from rorqual.sandbox.drivers.bwrap import Bwrap
from rorqual.sandbox.spec import SandboxSpec

SOURCES = Path(__file__).parent / "abuse"
PLACE = "/tmp/probe"


@dataclass(frozen=True)
class Row:
    """One attempt."""

    name: str
    verdict: str
    seen: str


def rows(text: str) -> list[Row]:
    """The attempts in what the program wrote."""
    return [Row(*(line.split("\t") + ["", ""])[:3]) for line in text.splitlines() if line]


def breaches(found: Sequence[Row], allowed: Sequence[str] = ()) -> dict[str, str]:
    """What worked, and what could not be tried; `allowed` names what is no breach in that kind of sandbox."""
    return {row.name: row.seen for row in found if row.verdict not in ("shut", "absent") and row.name not in allowed}


@functools.cache
def program() -> Path:
    """The hostile program, built for this machine; static, so that it runs on any root."""
    cc = compiler()
    if cc is None:
        pytest.skip("there is no C compiler to build the hostile program with")
    folder = Path(tempfile.mkdtemp(prefix="abuse-"))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sources = map(str, sorted(SOURCES.glob("*.c")))
    flags = ("-static", "-O1", "-std=gnu11", "-Wall", "-Wextra")
    subprocess.run([*cc, *flags, "-o", str(folder / "probe"), *sources], check=True)
    folder.chmod(0o755)
    return folder / "probe"


def arm(sandbox: Sandbox) -> None:
    """Put the program into a sandbox."""
    sandbox.files.upload(program(), PLACE)


def attack(sandbox: Sandbox, *arguments: str, timeout: float = 60.0, user: str | None = None) -> list[Row]:
    """Run a part of the program in a sandbox."""
    result = sandbox.commands.run([PLACE, *arguments], timeout=timeout, user=user, cwd="/tmp")
    assert result.exit_code == 0 and not result.timed_out, (arguments, result.exit_code, result.stderr)
    return rows(result.stdout)


def amount(sandbox: Sandbox, *arguments: str, timeout: float = 60.0) -> int:
    """How much of something the program got in a sandbox."""
    return int(attack(sandbox, *arguments, timeout=timeout)[0].verdict)


def on_host(*arguments: str, cwd: Path, privileged: bool = False) -> list[Row]:
    """The same with no sandbox at all: the control run.

    privileged: in mount, name and process namespaces of its own, so that what works there harms nobody; an ordinary
    user gets a user namespace too.
    """
    command = [str(program()), *arguments]
    if privileged:
        walls = ["--mount", "--uts", "--pid", "--fork", "--mount-proc", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        command = ["unshare", *walls, "sh", "-c", '"$@"; true', "sh", *command]  # the shell is process 1
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return rows(result.stdout)


class Weakened(Bwrap):
    """The container driver with a wall taken away. filter: the system call filter; options: bwrap's, edited."""

    def __init__(
        self, *, filter: bool = True, without: Sequence[str] = (), more: Sequence[str] = (), environment: bool = False
    ) -> None:
        self._filter, self._without, self._more, self._environment = filter, without, more, environment

    def _bwrap(self, spec: SandboxSpec, shown: list[str], name: str) -> list[str]:
        options = [option for option in super()._bwrap(spec, shown, name) if option not in self._without]
        if self._environment:
            options += [] if "--clearenv" not in options else []
        at = options.index("--chdir")
        return [*options[:at], *self._more, *options[at:]]

    async def start(self, spec: SandboxSpec, home: Path) -> Running:
        running = await super().start(spec, home)
        running.extra["filter"] = self._filter
        return running


@contextmanager
def weakened(monkeypatch: pytest.MonkeyPatch, driver: Weakened, **arguments: object) -> Iterator[Sandbox]:
    """A container with a wall taken away."""

    async def choose(*_: object) -> Weakened:
        return driver

    with monkeypatch.context() as patch:
        patch.setattr("rorqual.sandbox.async_sandbox.choose", choose)
        sandbox = Sandbox.create("container", **arguments)  # type: ignore[arg-type]
    with sandbox:
        arm(sandbox)
        yield sandbox
