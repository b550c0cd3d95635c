"""A client killed half-way through pausing, resuming or a snapshot: what stands still ends, what runs on stays."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from host_traces import settled, traces_of
from sandboxes import need

from rorqual import AsyncSandbox, Sandbox
from rorqual.sandbox.home import Home, sandboxes_folder
from rorqual.sandbox.sweep import sweep
from rorqual.sandbox.wire import Fields, Type

KILLED = """
import os, sys
from rorqual import Sandbox
from rorqual.sandbox import async_sandbox, snapshots
from rorqual.sandbox.home import Home
from rorqual.sandbox.link import Link
from rorqual.sandbox.wire import Type

identity, doing, kill_at = sys.argv[1:]
async_sandbox.PAUSING_S = snapshots.STILL_S = 0.2
sandbox = Sandbox.connect(identity)
if doing == "resume":
    sandbox.pause()

def dies_after(owner, name, *wanted):
    plain = getattr(owner, name)
    def call(self, *a, **k):
        done = plain(self, *a, **k)
        if a[:len(wanted)] == wanted:
            os.kill(os.getpid(), 9)
        return done
    async def called(self, *a, **k):
        done = await plain(self, *a, **k)
        if a[:len(wanted)] == wanted:
            os.kill(os.getpid(), 9)
        return done
    setattr(owner, name, call if name in ("_set_state", "set_deadlines") else called)

if kill_at == "stopped":            # everything inside stands still, and the record does not say so
    dies_after(Link, "request", Type.PAUSE)
elif kill_at == "recorded":         # the record says so, and the keeper was not told again
    dies_after(type(sandbox._sandbox), "_set_state")
elif kill_at == "runs":             # it runs, and the record does not say so
    dies_after(Link, "request", Type.RESUME)
elif kill_at == "begun":
    dies_after(Home, "set_deadlines")
{"pause": sandbox.pause, "resume": sandbox.resume, "snapshot": sandbox.snapshot}[doing]()
raise SystemExit("it was to be killed")
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def left_by(doing: str, kill_at: str, paused_ttl: float, kind: str = "container", driver: str = "bwrap") -> Home:
    """A sandbox without an end of its own but `paused_ttl`, and no client any more."""
    made = Sandbox.create(**need((kind, driver)), idle_ttl=3600, paused_ttl=paused_ttl)  # type: ignore[arg-type]
    made.detach()
    command = [sys.executable, "-c", KILLED, made.id, doing, kill_at]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -9, done.stderr[-2000:]
    return Home(sandboxes_folder() / made.id)


@pytest.mark.parametrize("doing, kill_at", [("pause", "stopped"), ("pause", "recorded"), ("snapshot", "stopped")])
def test_one_that_stands_still_without_a_client_ends_by_its_paused_ttl(doing: str, kill_at: str, home: Path) -> None:
    left = left_by(doing, kill_at, 0.5)
    removed: list[str] = []

    def living() -> list[str]:
        removed.extend(sweep())
        return [left.id] if left.path.exists() else []

    assert settled(living, 60) == [] and removed == [left.id]
    assert (sandboxes_folder() / ".gone" / left.id).read_text() == "paused"
    assert settled(lambda: traces_of(home)) == []


@pytest.mark.parametrize(
    "doing, kill_at",
    [("pause", "begun"), ("pause", "stopped"), ("resume", "recorded"), ("resume", "runs"), ("snapshot", "stopped")],
)
def test_who_comes_next_finds_it_as_one_that_runs_for_as_long_as_it_likes(doing: str, kill_at: str) -> None:
    left = left_by(doing, kill_at, 3600)
    with Sandbox.connect(left.id) as sandbox:
        assert sandbox.commands.run("echo on").stdout == "on\n" and sandbox.info().state == "ready"
        words = (left.path / "lifetime").read_text().split()
        assert words[1:] == ["lifetime"], "the keeper still takes it for a paused one"


@pytest.mark.parametrize("doing", ["pause", "resume", "snapshot"])
def test_a_step_that_is_cancelled_leaves_it_usable(doing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = need(("container", "bwrap"))

    async def scene() -> None:
        async with await AsyncSandbox.create(**arguments) as sandbox:  # type: ignore[arg-type]
            if doing == "resume":
                await sandbox.pause()
            asked, plain = asyncio.Event(), sandbox._link.request

            async def request(kind: Type, *rest: Any, **more: Any) -> Fields:
                done = await plain(kind, *rest, **more)
                if kind in (Type.PAUSE, Type.RESUME) and not asked.is_set():
                    asked.set()
                    await asyncio.Event().wait()
                return done

            monkeypatch.setattr(sandbox._link, "request", request)
            step: asyncio.Task[Any] = asyncio.create_task(getattr(sandbox, doing)())
            await asked.wait()
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            assert (await sandbox.commands.run("echo on", timeout=30)).stdout == "on\n"
            assert sandbox._clock.going.is_set() and (await sandbox.info()).state == "ready"
            assert (sandbox._home.path / "lifetime").read_text().split()[1:] == ["lifetime"]

    asyncio.run(scene())
