"""Whatever dies, nothing runs twice and nothing is left: clients, keepers and agents are killed at random moments."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sandbox_client
from full import often
from sandboxes import need, traces

from rorqual import AsyncSandbox, Sandbox
from rorqual.errors import SandboxError
from rorqual.sandbox import processes
from rorqual.sandbox.drivers import bwrap
from rorqual.sandbox.errors import Gone, OutcomeUnknown, ReplayDivergence, StaleEpoch
from rorqual.sandbox.history import History, read
from rorqual.sandbox.home import Home, all_homes, sandboxes_folder
from rorqual.sandbox.sweep import sweep

CASE = ("container", "bwrap")


@pytest.fixture
def arguments() -> dict[str, str]:
    return need(CASE)  # type: ignore[arg-type]


@pytest.fixture
def sandbox(arguments: dict[str, str]) -> Iterator[Sandbox]:
    made = Sandbox.create(**arguments)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        Sandbox.end(made.id)
        with contextlib.suppress(SandboxError):
            made.close()
    assert traces(made.id) == []


def _client(folder: Path, calls: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, sandbox_client.__file__, *CASE, str(folder), str(calls)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})


def _count(file: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_k1_no_call_runs_twice_however_often_the_client_is_killed(arguments: dict[str, str], tmp_path: Path) -> None:
    calls, kills = often(25, 200), 0
    chance = random.Random(7)
    identifier: list[str] = []
    try:
        for _ in range(200):
            client = _client(tmp_path, calls)
            more = chance.randrange(
                6
            )  # answers in this life, so that it is cut short on a fast machine as on a slow one
            goal = _count(tmp_path / "answers") + more
            while more and client.poll() is None and _count(tmp_path / "answers") < goal:
                time.sleep(0.002)
            try:
                assert client.wait(timeout=chance.uniform(0, 0.05 if more else 1)) == 0
                break
            except subprocess.TimeoutExpired:
                client.kill()
                client.wait()
                kills += 1
        if (tmp_path / "id").exists():
            identifier.append((tmp_path / "id").read_text())
        answers = [line.split() for line in (tmp_path / "answers").read_text().splitlines()]
        by_number = {int(number): (code, count) for number, code, count in answers}
        assert by_number == {number: ("0", str(number + 1)) for number in range(calls)}
        assert len(answers) == len(by_number), "an answer came twice although it was on record"
        assert kills > 0, "nothing was killed, so nothing was shown"
        with Sandbox.connect(identifier[0]) as found:
            assert found.commands.run("wc -l < log").stdout.strip() == str(calls)
            kinds = [entry["kind"] for entry in found.history()]
            assert kinds.count("call_finished") == calls + 1
    finally:
        for home in all_homes():
            Sandbox.end(home.id)
    assert [trace for home in identifier for trace in traces(home)] == []


@pytest.mark.slow
def test_k2_a_client_killed_while_creating_leaves_nothing(arguments: dict[str, str], tmp_path: Path) -> None:
    chance = random.Random(11)
    seen: set[str] = set()
    for number in range(often(6, 60)):
        folder = tmp_path / str(number)
        folder.mkdir()
        client = _client(folder, 0)
        end = time.monotonic() + 20
        fresh: set[str] = set()
        while not fresh and time.monotonic() < end:
            fresh = {home.id for home in all_homes()} - seen
        time.sleep(chance.uniform(0, 0.06))
        client.kill()
        client.wait()
        seen |= fresh
        for home in all_homes():
            try:
                Sandbox.connect(home.id).close()
            except SandboxError:
                sweep()
    end = time.monotonic() + 5
    while all_homes() and time.monotonic() < end:
        sweep()
    assert seen and [trace for name in seen for trace in traces(name)] == []


def test_k6_a_client_that_slept_through_a_takeover_can_do_nothing(sandbox: Sandbox) -> None:
    sandbox.commands.run("echo mine > owner")
    with pytest.raises(SandboxError, match="takeover=True"):
        Sandbox.connect(sandbox.id)
    other = Sandbox.connect(sandbox.id, takeover=True)
    other.commands.run("echo other > owner", call="a")
    for attempt in (
        lambda: sandbox.commands.run("echo stale > owner"),
        lambda: sandbox.files.write("owner", "stale"),
        lambda: sandbox.pause(),
        lambda: sandbox.close(),
    ):
        with pytest.raises(StaleEpoch):
            attempt()
    assert other.files.read("owner") == "other\n"
    assert other.info().attach_epoch == 2
    assert other.commands.run("echo other > owner", call="a").replayed
    other.close()


def test_the_agent_itself_refuses_an_older_epoch(sandbox: Sandbox) -> None:
    older = Sandbox.connect(sandbox.id, takeover=True)
    newer = Sandbox.connect(sandbox.id, takeover=True)
    older._sandbox._home.read = lambda: older._sandbox._record  # type: ignore[method-assign]
    with pytest.raises(StaleEpoch):
        older.files.write("stale", "")
    with pytest.raises(StaleEpoch):
        older.files.remove("kept")
    assert not newer.files.exists("stale")
    newer.close()


def test_a_call_is_answered_from_the_record_or_joined(sandbox: Sandbox) -> None:
    first = sandbox.commands.run("echo $RANDOM_ENOUGH; cat /proc/sys/kernel/random/uuid; exit 3", call="one")
    again = sandbox.commands.run("echo $RANDOM_ENOUGH; cat /proc/sys/kernel/random/uuid; exit 3", call="one")
    assert again.replayed and not first.replayed
    assert (again.stdout_bytes, again.exit_code, again.duration_ms) == (first.stdout_bytes, 3, first.duration_ms)
    assert (again.call_index, again.journal_seq) == (first.call_index, first.journal_seq)
    with pytest.raises(ReplayDivergence, match="'one'"):
        sandbox.commands.run("echo something else", call="one")
    with pytest.raises(ReplayDivergence):
        sandbox.commands.run("echo $RANDOM_ENOUGH; cat /proc/sys/kernel/random/uuid; exit 3", call="one", cwd="/tmp")


def test_a_call_whose_client_died_goes_on_and_is_joined(sandbox: Sandbox) -> None:
    program = "echo x >> ran; while [ ! -e go ]; do sleep 0.02; done; wc -l < ran"
    child = os.fork()
    if child == 0:
        try:
            os.environ["RORQUAL_FORKED"] = "1"
            mine = Sandbox.connect(sandbox.id, takeover=True)
            mine.commands.run(program, call="long")
        finally:
            os._exit(0)
    end = time.monotonic() + 60
    while time.monotonic() < end and not any(Path("/proc", str(child)).glob("task")):
        time.sleep(0.01)
    folder = sandboxes_folder() / sandbox.id / "history"
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            if any(entry["kind"] == "call_accepted" and entry["key"] == "long" for entry in read(folder)):
                break
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    second = Sandbox.connect(sandbox.id, takeover=True)
    second.files.write("go", "")
    result = second.commands.run(program, call="long")
    assert (result.stdout, result.exit_code, result.replayed) == ("1\n", 0, False)
    assert second.commands.run(program, call="long").replayed
    second.close()


def test_an_outcome_that_nobody_knows_is_not_guessed(sandbox: Sandbox) -> None:
    taken = sandbox.snapshot()
    sandbox.commands.run("echo a >> log", call="before")
    history = sandbox._sandbox._history()
    sandbox.rollback(taken)
    assert "before" not in history.calls, "after the rollback it did not happen"
    assert not sandbox.commands.run("echo a >> log", call="before").replayed
    call = history.calls["before"]
    call.result, call.incarnation = None, 1  # as if the record ended here and the processes were built anew
    with pytest.raises(OutcomeUnknown, match="Roll back"):
        sandbox.commands.run("echo a >> log", call="before")
    assert sandbox.files.read("log") == "a\n"


def test_the_log_knows_accepted_before_started_and_survives_reopening(tmp_path: Path) -> None:
    from rorqual.sandbox.spec import CommandResult

    async def fill() -> None:
        history = History(tmp_path / "h")
        call = await history.accept("k", "handle", "print", 1, {"argv": ["x", "\udcff"]})
        history.close()
        reopened = History(tmp_path / "h")
        assert reopened.find("k", "print", 1) == call
        with pytest.raises(OutcomeUnknown):
            reopened.find("k", "print", 2)
        await reopened.finish(call, CommandResult(5, b"\xff\0out", b"err", truncated_bytes={"stdout": 7, "stderr": 0}))
        reopened.close()
        third = History(tmp_path / "h")
        found = third.find("k", "print", 2)
        assert isinstance(found, CommandResult) and found.replayed
        assert (found.exit_code, found.stdout_bytes, found.truncated_bytes["stdout"]) == (5, b"\xff\0out", 7)
        third.close()

    asyncio.run(fill())


@pytest.mark.parametrize("victim", ["keeper", "holder", "agent"])
def test_when_a_part_dies_all_of_it_is_gone(arguments: dict[str, str], victim: str) -> None:
    sandbox = Sandbox.create(**arguments)  # type: ignore[arg-type]
    try:
        sandbox.commands.run("setsid sleep 1000 > /dev/null 2>&1 &")
        parts = bwrap.tree_of(sandbox._sandbox._link.running)
        chosen = {"keeper": parts[0], "holder": parts[1], "agent": parts[3]}[victim]
        assert len(parts) >= 5
        processes.send(chosen, signal.SIGKILL)
        end = time.monotonic() + 60
        while any(map(processes.alive, parts)) and time.monotonic() < end:
            time.sleep(0.02)
        assert [part for part in parts if processes.alive(part)] == []
        with pytest.raises(Gone) as caught:
            sandbox.commands.run("true", timeout=5)
        assert caught.value.reason == "crashed"
    finally:
        sandbox.close()
    assert traces(sandbox.id) == []
    with pytest.raises(Gone):
        sandbox.commands.run("true")


def test_a_failed_creation_leaves_nothing(arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {home.id for home in all_homes()}
    made: list[str] = []
    write = Home.write

    def breaks(self: Home, record: object) -> None:
        made.append(self.id)
        if len(made) == 2:
            raise OSError(28, "No space left on device")
        write(self, record)  # type: ignore[arg-type]

    monkeypatch.setattr(Home, "write", breaks)
    with pytest.raises(OSError, match="No space"):
        Sandbox.create(**arguments)  # type: ignore[arg-type]
    assert {home.id for home in all_homes()} == before
    assert traces(made[0]) == []


def test_a_sweep_removes_the_dead_and_leaves_the_living(arguments: dict[str, str]) -> None:
    dead = Sandbox.create(**arguments)  # type: ignore[arg-type]
    living = Sandbox.create(**arguments)  # type: ignore[arg-type]
    try:
        dead.detach()
        living.detach()
        processes.send(Home.find(dead.id).read().running.processes[0], signal.SIGKILL)  # type: ignore[union-attr]
        end = time.monotonic() + 5
        while dead.id not in sweep() and time.monotonic() < end:
            time.sleep(0.05)
        assert traces(dead.id) == [] and traces(living.id) != []
        assert [info.id for info in Sandbox.list()] == [living.id]
        with Sandbox.connect(living.id) as again:
            assert again.commands.run("echo here").stdout == "here\n"
    finally:
        Sandbox.end(dead.id)
        Sandbox.end(living.id)


def test_a_cancelled_run_leaves_no_command_behind(arguments: dict[str, str]) -> None:
    async def main() -> None:
        async with await AsyncSandbox.create(**arguments) as sandbox:  # type: ignore[arg-type]
            running = asyncio.ensure_future(sandbox.commands.run("while :; do echo x >> beats; sleep 0.01; done"))
            while not await sandbox.files.exists("beats"):
                await asyncio.sleep(0.01)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            first = (await sandbox.files.stat("beats")).size
            await asyncio.sleep(0.2)
            assert (await sandbox.files.stat("beats")).size <= first + 2
            keyed = asyncio.ensure_future(sandbox.commands.run("sleep 0.3; echo done", call="k"))
            await asyncio.sleep(0.1)
            keyed.cancel()
            await asyncio.gather(keyed, return_exceptions=True)
            assert (await sandbox.commands.run("sleep 0.3; echo done", call="k")).stdout == "done\n"

    asyncio.run(main())


def test_the_log_names_no_values_of_the_environment(sandbox: Sandbox) -> None:
    sandbox.commands.run("true", env={"TOKEN": "canary-7f3a"})
    entries = sandbox.history()
    assert any("TOKEN" in str(entry) for entry in entries)
    assert "canary-7f3a" not in str(entries)
