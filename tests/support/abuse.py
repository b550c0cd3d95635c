"""The hostile program of `abuse/`, run in a sandbox or in a weaker place, which shows that the suite would notice.

A row of its output is an attempt: name, verdict, what was seen; `breaches` are those that worked. Every check of the
suite runs twice: in the sandbox, where there must be no breach, and in a setting with a wall taken away, where the same
judgement must find one.

Run as a program it attacks a sandbox of the kind and driver named and prints what worked, as JSON.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sandboxes import need

from rorqual import Sandbox
from rorqual.sandbox.agent.build import compiler
from rorqual.sandbox.drivers import ORDER
from rorqual.sandbox.drivers.base import Running
from rorqual.sandbox.drivers.bwrap import Bwrap
from rorqual.sandbox.spec import Kind, SandboxSpec

SOURCES = Path(__file__).parent / "abuse"
PLACE = "/tmp/probe"
OWN_DEVICES = {"device nodes", "/dev/fuse", "/dev/net/tun"}
ALLOWED: dict[str, set[str]] = {
    "gvisor": {
        *OWN_DEVICES,
        "descriptors of init",
        "environment of init",
        "maps of init",
        "sysrq-trigger",
        "sysctl overcommit",
    }
}
"""For each driver what is no breach there: gVisor's kernel makes these files and devices up, and they lead nowhere.

It lets the numbers of the agent's descriptors be seen, but not opened, and its environment, which holds nothing.
"""
CASES = [
    pytest.param((kind, name), id=f"{kind}-{name}", marks=() if name == "bwrap" else pytest.mark.slow)
    for kind, drivers in ORDER.items()
    for name, _ in drivers
]
"""Every kind through every driver; one of them with each change, all of them in the long run."""
ROOT_CAPABILITIES = 0b1111_1011  # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID


@dataclass(frozen=True)
class Row:
    """One attempt."""

    name: str
    verdict: str
    seen: str


def rows(text: str) -> list[Row]:
    """The attempts in what the program wrote."""
    return [Row(*[*line.split("\t", 2), "", ""][:3]) for line in text.splitlines() if line]


def breaches(found: Sequence[Row], allowed: Collection[str] = ()) -> dict[str, str]:
    """What worked, and what could not be tried."""
    return {row.name: row.seen for row in found if row.verdict not in ("shut", "absent") and row.name not in allowed}


def excess(got: int, limit: int) -> str | None:
    """Whether more of something was had than its limit allows."""
    return f"{got} of at most {limit}" if got > limit else None


@functools.cache
def program() -> Path:
    """The hostile program, built for this machine; static, so that it runs on any root."""
    cc = compiler()
    if cc is None:
        pytest.skip("there is no C compiler to build the hostile program with")
    folder = Path(tempfile.mkdtemp(prefix="abuse-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sources = map(str, sorted(SOURCES.glob("*.c")))
    flags = ("-static", "-O1", "-std=gnu11", "-Wall", "-Wextra")
    subprocess.run([*cc, *flags, "-o", str(folder / "probe"), *sources], check=True)
    folder.chmod(0o755)
    return folder / "probe"


def arm(sandbox: Sandbox) -> Sandbox:
    """Put the program into a sandbox."""
    sandbox.files.upload(program(), PLACE)
    return sandbox


def attack(sandbox: Sandbox, *arguments: str, timeout: float = 60.0, user: str | None = None) -> list[Row]:
    """Run a part of the program in a sandbox."""
    result = sandbox.commands.run([PLACE, *arguments], timeout=timeout, user=user, cwd="/tmp")
    assert result.exit_code == 0, (arguments, result.exit_code, result.timed_out, result.stderr)
    return rows(result.stdout)


def amount(sandbox: Sandbox, *arguments: str, timeout: float = 60.0) -> int:
    """How much of something the program got in a sandbox; nothing, if it was ended for taking it."""
    result = sandbox.commands.run([PLACE, *arguments], timeout=timeout, cwd="/tmp")
    if result.exit_code == 137:
        return 0
    assert result.exit_code == 0, (arguments, result.exit_code, result.stderr)
    return int(result.stdout.split()[1])


def memory_limit(sandbox: Sandbox, asked: int) -> int:
    """MiB that may be had: more where the keeper only looks now and then, or where gVisor needs some itself."""
    how = sandbox.info().enforced["memory"]
    return 2 * asked if "watched" in how else asked + 32 + (192 if "gVisor" in how else 0)


def on_host(*arguments: str, cwd: Path, privileged: bool = False, **more: Any) -> list[Row]:
    """The same with no sandbox at all: the control run.

    privileged: in mount, name and process namespaces of its own, so that what works there harms nobody; an ordinary
    user gets a user namespace too.
    """
    command = [str(program()), *arguments]
    if privileged:
        own = [] if os.geteuid() == 0 else ["--map-root-user"]
        shell = ["sh", "-c", 'exec 9</etc/passwd; "$@"; true', "sh"]  # it is process 1, which the program attacks
        command = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", *own, *shell, *command]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **more)
    assert result.returncode == 0, result.stderr
    return rows(result.stdout)


def all_descriptors() -> None:
    """In a child: as many open files as this machine lets it have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Weakened(Bwrap):
    """The container driver with a wall taken away. filter: the system call filter; more: options added for bwrap."""

    def __init__(self, *, filter: bool = True, more: Sequence[str] = ()) -> None:
        self._filter, self._more = filter, more

    def _bwrap(self, spec: SandboxSpec, shown: list[str], name: str) -> list[str]:
        options = super()._bwrap(spec, shown, name)
        at = options.index("--chdir")
        return [*options[:at], *self._more, *options[at:]]

    async def start(self, spec: SandboxSpec, home: Path) -> Running:
        """As the driver it weakens."""
        running = await super().start(spec, home)
        running.extra["filter"] = self._filter
        return running


@contextmanager
def weakened(monkeypatch: pytest.MonkeyPatch, driver: Weakened, **arguments: Any) -> Iterator[Sandbox]:
    """A container with a wall taken away, armed."""
    need(("container", "bwrap"))

    async def choose(*_: object) -> Weakened:
        return driver

    with monkeypatch.context() as patch:
        patch.setattr("rorqual.sandbox.async_sandbox.choose", choose)
        sandbox = Sandbox.create("container", **arguments)
    with sandbox:
        yield arm(sandbox)


def assault(kind: Kind, driver: str) -> dict[str, Any]:
    """What works in one sandbox, of all that the program can try without a helper outside."""
    found: dict[str, Any] = {}
    with Sandbox.create(kind, driver=driver, pids=64, memory_mb=128, disk_mb=32) as sandbox:
        arm(sandbox)
        found["enforced"] = dict(sandbox.info().enforced)
        tried = [
            attack(sandbox, "kernel"),
            attack(sandbox, "channel"),
            attack(sandbox, "network", "tcp:169.254.169.254:80"),
        ]
        found["attempts"] = sum(map(len, tried))
        found["breaches"] = {
            name: seen for part in tried for name, seen in breaches(part, ALLOWED.get(driver, ())).items()
        }
        memory = memory_limit(sandbox, 128)
        for what, limit, asked in (
            ("forks", 64, ["200"]),
            ("memory", memory, ["400"]),
            ("hidden", memory, ["400"]),
            ("disk", 32, ["48", "/tmp/fill"]),
            ("descriptors", 1024, ["3000"]),
        ):
            over = excess(amount(sandbox, what, *asked), limit)
            if over is not None:
                found["breaches"][what] = over
    return found


if __name__ == "__main__":
    print(json.dumps(assault(sys.argv[1], sys.argv[2])))  # type: ignore[arg-type]
