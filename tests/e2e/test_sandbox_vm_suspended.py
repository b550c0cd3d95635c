"""Machines that stand still: snapshots of them come at once, and a client killed at any step loses nothing."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes import need, traces

from rorqual import Sandbox
from rorqual.sandbox.home import sandboxes_folder
from rorqual.sandbox.images.collect import collect
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.processes import below
from rorqual.sandbox.spec import Kind
from rorqual.sandbox.vm import saved, snapshot

pytestmark = pytest.mark.slow
SMALL: tuple[Kind, str] = ("microvm", "qemu-tcg")
COUNTER = "i=0; while :; do i=$((i+1)); echo $i > /tmp/next; mv /tmp/next /tmp/count; sleep 0.1; done"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One machine that the tests of this file share; each leaves it running."""
    with Sandbox.create(**need(SMALL), create_timeout=120, memory_mb=192) as made:
        yield made
    assert traces(made.id) == []


def count(sandbox: Sandbox) -> int:
    """What its counter, which only runs while the machine does, has come to."""
    return int(sandbox.commands.run("cat /tmp/count").stdout)


def grows(sandbox: Sandbox, before: int) -> bool:
    """Whether its counter goes on, however slow the machine is."""
    until = time.monotonic() + 60
    while count(sandbox) <= before:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that cannot answer is never asked: the first wait for one fails the test."""

    async def refuse(awaitable: object, timeout: float | None = None) -> object:
        task = asyncio.ensure_future(awaitable)  # type: ignore[arg-type]
        done, _ = await asyncio.wait({task}, timeout=min(timeout or 20.0, 20.0))
        assert done, "it waited for a machine that stands still"
        return task.result()

    monkeypatch.setattr("rorqual.sandbox.vm.control.asyncio.wait_for", refuse)


@pytest.mark.parametrize("keep_memory", [True, False], ids=["in-memory", "on-disk"])
def test_a_paused_machine_is_copied_where_it_stands(sandbox: Sandbox, keep_memory: bool, no_waiting: None) -> None:
    sandbox.files.write("/home/agent/note", f"kept {keep_memory}")
    handle = sandbox.commands.start(COUNTER, timeout=None)
    while not sandbox.files.exists("/tmp/count"):
        time.sleep(0.05)
    sandbox.pause(keep_memory=keep_memory)
    taken = sandbox.snapshot("disk")
    full = sandbox.snapshot("full")
    assert sandbox.info().state == "paused"
    assert b"home/agent/note" in {b"/".join(entry.path) for entry in Store().tree(taken.digest).entries()}
    at_pause = count(sandbox)  # wakes it
    assert sandbox.files.read("/home/agent/note") == f"kept {keep_memory}"
    with Sandbox.create(**need(SMALL), snapshot=full, memory_mb=192) as copy:
        assert copy.files.read("/home/agent/note") == f"kept {keep_memory}"
        first = count(copy)
        assert first <= at_pause + 600
        assert grows(copy, first), "what ran in the original does not run in its copy"
    handle.kill()
    sandbox.commands.run("rm -f /tmp/count")
    snapshot.remove(full.digest)
    Store().forget(full.id)
    assert not list(sandboxes_folder().glob(f"{sandbox.id}/copy-*"))


def test_a_suspended_machine_needs_neither_its_names_nor_its_snapshot(sandbox: Sandbox) -> None:
    """Collected to the last, all that a machine on disk stands on is still there."""
    taken = sandbox.snapshot("full", name="origin")
    sandbox.files.write("/home/agent/note", "later")
    with Sandbox.create(**need(SMALL), snapshot="origin", memory_mb=192) as copy:
        copy.files.write("/home/agent/own", "of the copy")
        copy.pause(keep_memory=False)
        assert taken.digest not in collect(Store(), grace_s=0).full, "named, and one stands on it"
        Store().forget("origin")
        assert taken.digest in collect(Store(), grace_s=0).full
        assert not (snapshot.folder() / taken.digest).exists()
        copy.resume()
        assert copy.files.read("/home/agent/own") == "of the copy"
    assert sandbox.files.read("/home/agent/note") == "later"


KILLED = """
import os, sys
from rorqual import Sandbox
from rorqual.sandbox.drivers import qemu, qemu_still
from rorqual.sandbox.home import Home
from rorqual.sandbox.vm import saved
import pathlib

kill_at, identity, doing = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), 9)

async def die_later(*_, **__):
    die()

sandbox = Sandbox.connect(identity)
if kill_at == "loaded":          # the new QEMU has the state and stands still; nothing is on record
    Home.editing = die
elif kill_at in ("recorded", "given up"):  # it is on record, and the saved memory is there, or not any more
    plain = pathlib.Path.unlink
    def unlink(path, *a, **k):
        kill_at == "recorded" and path.name == "suspended" and die()
        plain(path, *a, **k)
        path.name == "suspended" and die()
    pathlib.Path.unlink = unlink
elif kill_at == "runs":          # before the record says so
    qemu_still.Control.ask = die_later
elif kill_at == "saving":        # the machine stands still, its memory is half written
    saved._done = die_later
elif kill_at == "saved":         # it is written, and QEMU lives
    qemu.Qemu.stop = die_later
elif kill_at == "ended":         # and lives no more
    qemu_still._forget_end = die
elif kill_at == "stopped":       # paused in memory, and the record does not say so
    type(sandbox._sandbox)._set_state = die
{"resume": sandbox.resume, "suspend": lambda: sandbox.pause(keep_memory=False), "pause": sandbox.pause,
 "full": lambda: sandbox.snapshot("full")}[doing]()
raise SystemExit("it was to be killed")
"""


def killed(kill_at: str, identity: str, doing: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, kill_at, identity, doing], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr[-2000:]


def test_whatever_step_a_client_dies_at_the_machine_comes_back() -> None:
    made = Sandbox.create(**need(SMALL), create_timeout=120, memory_mb=192)
    made.files.write("/home/agent/note", "")
    made.commands.start(COUNTER, timeout=None)
    while not made.files.exists("/tmp/count"):
        time.sleep(0.05)
    made.detach()
    expected = ""
    for kill_at, doing in (
        ("stopped", "pause"), ("saving", "suspend"), ("saving", "full"), ("saved", "suspend"), ("loaded", "resume"),
        ("recorded", "resume"), ("given up", "resume"), ("runs", "resume"), ("ended", "suspend"), ("loaded", "resume"),
    ):  # fmt: skip
        if doing == "resume":
            before = Sandbox.connect(made.id)
            before.pause(keep_memory=False)
            before.detach()
        killed(kill_at, made.id, doing)
        assert made.id in [info.id for info in Sandbox.list()]
        sandbox = Sandbox.connect(made.id)
        assert sandbox.info().state == ("paused" if doing == "resume" or kill_at in ("saved", "ended") else "ready")
        assert sandbox.files.read("/home/agent/note") == expected, kill_at
        expected += f"{kill_at} "
        sandbox.files.write("/home/agent/note", expected)
        first = count(sandbox)
        assert grows(sandbox, first), f"killed when {kill_at}: what ran inside does not go on"
        machines = [one for one in Path("/proc").glob("[0-9]*/cmdline") if made.id.encode() in _read(one)]
        record = json.loads((sandboxes_folder() / made.id / "spec.json").read_text())
        keeper = record["running"]["processes"][0]["pid"]
        known = {keeper, *(process.pid for process in below(keeper))}
        assert {int(path.parent.name) for path in machines} <= known, f"killed when {kill_at}: another machine runs"
        sandbox.detach()
    Sandbox.end(made.id)
    assert traces(made.id) == []
    assert list(snapshot.folder().glob(".new-*")), "the client killed in the middle of a snapshot left a half"
    assert collect(Store(), grace_s=0).temporary >= 1 and not list(snapshot.folder().glob(".new-*"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_save_that_fails_leaves_the_machine_running(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full_disk(qmp: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(saved, "_done", full_disk)
    with pytest.raises(Exception, match="could not be saved"):
        sandbox.pause(keep_memory=False)
    monkeypatch.undo()
    assert sandbox.commands.run("echo on", timeout=20).stdout == "on\n"
    assert not list(sandboxes_folder().glob(f"{sandbox.id}/suspended*"))
