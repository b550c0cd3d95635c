"""Agents killed everywhere: K1 to K7 of the sandbox specification, as far as they are about agents.

Processes are killed with SIGKILL at chosen places by a fuse in their journal and sandbox (`agent_process.py`), over a
stand-in sandbox that remembers calls as a real one does; and at random moments over real containers.
"""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agent_kills
import pytest
from agent_process import Ended, Lab, call, end_started, script
from full import often
from mail_server import MailServer, mail_server

from rorqual.agents import RunSettings
from rorqual.errors import SandboxError
from rorqual.journal.records import Attach, EnvSnapshot, Event, Preempt, Resume, ToolCall, ToolResult
from rorqual.sandbox import Sandbox

STEP = "echo {0} >> log; wc -l < log"
REPLIES = [
    {
        "reasoning": "Two steps.",
        "calls": [call("shell", command=STEP.format("a")), call("shell", command=STEP.format("b"))],
    },
    {
        "calls": [
            call("write_file", path="out/x.txt", content="x"),
            call("send_mail", subject="Done", body="See there.", attachments=["out/x.txt"]),
        ]
    },
    {"calls": [call("shell", command=STEP.format("c") + "; cp log out/log")]},
    {"content": "All three."},
]


@pytest.fixture
def server() -> Iterator[MailServer]:
    with mail_server() as found:
        yield found


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RORQUAL_HOME", os.environ["RORQUAL_HOME"])  # put back what labs change
    yield
    end_started()


def new_lab(folder: Path, server: MailServer, replies: list[dict[str, Any]] = REPLIES, **more: Any) -> Lab:
    folder.mkdir(parents=True)
    lab = Lab(folder)
    settings = RunSettings(
        "Three steps.", script=script(folder / "replies.json", replies), smtp=server.address,
        mail_to=("ada@example.org",), out=str(folder / "out"), **more,
    )  # fmt: skip
    lab.create(settings)
    server.inbox.clear()
    return lab


def check(lab: Lab, ended: Ended, server: MailServer, whole: list[int]) -> None:
    """What holds of every finished run."""
    assert ended.code == 0, ended.error
    assert ended.ids == whole
    assert (lab.home / "out" / "log").read_text() == "a\nb\nc\n"
    assert (lab.home / "out" / "x.txt").read_text() == "x"
    assert len(server.inbox) == 1
    records = lab.records()
    for kind in (ToolCall, ToolResult):
        assert [one.call_index for one in records if isinstance(one, kind)] == [0, 1, 2, 3, 4]
    start = next(len(line["ids"]) for line in lab.acknowledged() if line["event"] == "prompt")
    for line in lab.acknowledged():
        if line["event"] == "tokens":
            at = line["position"] - start
            assert whole[at : at + len(line["ids"])] == line["ids"], "an acknowledged token was lost"


@pytest.mark.slow
def test_k3_killed_before_and_after_every_write_and_every_act(tmp_path: Path, server: MailServer) -> None:
    peace = new_lab(tmp_path / "peace", server)
    ended = peace.run()
    check(peace, ended, server, ended.ids)
    places = ended.passed
    assert {f"{when} {what} of {record}" for when in ("before", "after") for what in ("append", "commit")
            for record in ("ToolCall", "ToolResult", "Request", "Close", "sandbox")} <= set(places)  # fmt: skip
    assert {"before run", "after run", "before create", "before download", "before kill"} <= set(places)
    chosen = sorted(random.Random(3).sample(range(len(places)), often(16, len(places))))
    for at in chosen:
        lab = new_lab(tmp_path / str(at), server)
        killed = lab.run(at=at)
        assert killed.was_killed, f"{places[at]}: {killed.error}"
        check(lab, lab.run(), server, ended.ids)
        assert lab.sandboxes.exists() and not list(lab.sandboxes.glob("*/metadata")), f"{places[at]}: a sandbox is left"


@pytest.mark.parametrize("place", ["after create", "after commit of ToolCall", "before commit of ToolResult"])
def test_k3_the_moments_that_matter_most(place: str, tmp_path: Path, server: MailServer) -> None:
    """A sandbox nobody recorded, a call nobody made, a result nobody wrote down."""
    replies = [{"calls": [call("shell", command=STEP.format("a") + "; cp log out/log")]}, {"content": "."}]
    peace = new_lab(tmp_path / "peace", server, replies)
    whole = peace.run()
    lab = new_lab(tmp_path / "killed", server, replies)
    assert lab.run(at=whole.passed.index(place)).was_killed
    ended = lab.run()
    assert (ended.code, ended.ids) == (0, whole.ids)
    assert (lab.home / "out" / "log").read_text() == "a\n"
    assert not list(lab.sandboxes.glob("*/metadata")), "a sandbox is left"


@pytest.mark.slow
def test_k4_killed_while_it_resumes(tmp_path: Path, server: MailServer) -> None:
    peace = new_lab(tmp_path / "peace", server)
    whole = peace.run()
    lab = new_lab(tmp_path / "killed", server)
    assert lab.run(at=len(whole.passed) // 2).was_killed
    kills = 0
    for at in (0, 1, 2, 3, 5, 8, 12):
        kills += lab.run(at=at).was_killed
    check(lab, lab.run(), server, whole.ids)
    assert kills >= 5
    attached = [record.epoch for record in lab.records() if isinstance(record, Attach)]
    assert attached == list(range(1, len(attached) + 1)) and len(attached) >= 4
    assert sum(isinstance(record, Resume) for record in lab.records()) == len(attached) - 1


def test_k4_a_command_that_outlived_its_agent_is_joined(tmp_path: Path, server: MailServer) -> None:
    slow = [
        {"calls": [call("shell", command="echo a >> log; sleep 1; wc -l < log; cp log out/log")]},
        {"content": "Ok."},
    ]
    lab = new_lab(tmp_path / "run", server, slow)
    process = lab.start()
    wait_for(lambda: any(lab.sandboxes.glob("*/calls/*/pid")))
    process.kill()
    process.join()
    ended = lab.run()
    assert ended.code == 0, ended.error
    assert (lab.home / "out" / "log").read_text() == "a\n"
    assert not [record for record in lab.records() if isinstance(record, Event) and record.kind == "generation"]


@pytest.mark.slow
def test_k5_an_unknown_outcome_rolls_back_and_runs_once(tmp_path: Path, server: MailServer) -> None:
    """The command dies with the agent, half done: nobody knows its outcome, so its traces must go before it runs."""
    half = "echo c >> log; test -e /dev/shm || true; sleep 0.6; wc -l < log; cp log out/log"
    replies = [REPLIES[0], {"calls": [call("shell", command=half)]}, {"content": "Ok."}]
    peace = new_lab(tmp_path / "peace", server, replies)
    whole = peace.run()
    for at in (None, *restore_places(tmp_path, server, replies)):
        lab = new_lab(tmp_path / f"at-{at}", server, replies)
        lose_third_call(lab)
        if at is not None:
            assert lab.run(at=at).was_killed
        ended = lab.run()
        assert ended.code == 0, ended.error
        assert ended.ids == whole.ids
        assert (lab.home / "out" / "log").read_text() == "a\nb\nc\n"


def restore_places(folder: Path, server: MailServer, replies: list[dict[str, Any]]) -> list[int]:
    """Where a process that restores can be killed: around the rollback, and at some places after it."""
    lab = new_lab(folder / "scout", server, replies)
    lose_third_call(lab)
    passed = lab.run().passed
    first = passed.index("before rollback")
    return sorted(random.Random(5).sample(range(first - 1, len(passed) - 1), often(2, len(passed) - first)))


def lose_third_call(lab: Lab) -> None:
    """Kill the agent, and its third command in the middle."""
    process = lab.start()
    wait_for(lambda: any("sleep 0.6" in path.read_text() for path in lab.sandboxes.glob("*/calls/*/spec")))
    wait_for(lambda: any((lab.sandboxes).glob("*/work/log")) and count_lines(lab) == 3)
    process.kill()
    process.join()
    for path in lab.sandboxes.glob("*/calls/*/pid"):
        if not (path.parent / "exit").exists():
            os.killpg(int(path.read_text()), signal.SIGKILL)


def count_lines(lab: Lab) -> int:
    return sum(len(path.read_text().splitlines()) for path in lab.sandboxes.glob("*/work/log"))


def test_k5_a_sandbox_that_is_gone_is_built_again(tmp_path: Path, server: MailServer) -> None:
    peace = new_lab(tmp_path / "peace", server)
    whole = peace.run()
    lab = new_lab(tmp_path / "gone", server)
    last = max(i for i, place in enumerate(whole.passed) if place == "before run")
    assert lab.run(at=last).was_killed
    [sandbox] = [path.parent for path in lab.sandboxes.glob("*/metadata")]
    for path in sandbox.glob("work/*"):
        path.rename(tmp_path / f"lost-{path.name}")
    os.rename(sandbox, tmp_path / "lost")
    ended = lab.run()
    check(lab, ended, server, whole.ids)  # one mail still: what reached outside is not made again
    assert sum(isinstance(record, EnvSnapshot) for record in lab.records()) >= 1
    notes = [line["text"] for line in lab.acknowledged() if line["event"] == "note"]
    assert any("is gone" in note for note in notes) and any("was run again" in note for note in notes)


def test_k5_files_that_do_not_come_back_end_the_run(tmp_path: Path, server: MailServer) -> None:
    replies = [
        {"calls": [call("shell", command="date +%N")]},
        {"calls": [call("shell", command="echo")]},
        {"content": "."},
    ]
    lab = new_lab(tmp_path / "run", server, replies)
    scout = new_lab(tmp_path / "scout", server, replies)
    places = scout.run().passed
    assert lab.run(at=max(i for i, place in enumerate(places) if place == "before run")).was_killed
    [sandbox] = [path.parent for path in lab.sandboxes.glob("*/metadata")]
    os.rename(sandbox, tmp_path / "lost")
    ended = lab.run()
    assert ended.code == 3 and "gave another result than the one on record" in ended.error
    again = lab.run()
    assert again.code == 3 and "ended as INFRA_FAILED" in again.error


@pytest.mark.slow
def test_k6_a_stopped_process_is_fenced(tmp_path: Path, server: MailServer) -> None:
    peace = new_lab(tmp_path / "peace", server, pace_s=0.001)
    whole = peace.run()
    lab = new_lab(tmp_path / "run", server, pace_s=0.001)
    first = lab.start()
    wait_for(lambda: len(lab.acknowledged()) > 20)
    os.kill(first.pid, signal.SIGSTOP)
    refused = lab.run()
    assert refused.code == 3 and "is being written by process" in refused.error
    second = lab.run(take_over=True)
    check(lab, second, server, whole.ids)
    records = len(lab.records())
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 3 and "was taken over by another writer" in (lab.home / "run.error").read_text()
    assert len(lab.records()) == records and len(server.inbox) == 1


@pytest.mark.slow
@pytest.mark.parametrize("grace_s", [0.0, 0.1, 1.0])
def test_k7_a_notice_with_a_grace_period(grace_s: float, tmp_path: Path, server: MailServer) -> None:
    """The call in flight lasts longer than any grace. Of 10 s nothing is tested: the process is gone long before."""
    go = tmp_path / "go"  # outside of the sandbox's files, which may be taken back meanwhile
    waits = f"until [ -e {go} ]; do sleep 0.01; done; {STEP.format('c')}; cp log out/log"
    replies = [*REPLIES[:2], {"calls": [call("shell", command=waits)]}, REPLIES[3]]
    peace = new_lab(tmp_path / "peace", server, replies)
    go.touch()
    whole = peace.run()
    go.unlink()
    lab = new_lab(tmp_path / "run", server, replies)
    process = lab.start()
    wait_for(lambda: any("until" in path.read_text() for path in lab.sandboxes.glob("*/calls/*/spec")))
    os.kill(process.pid, signal.SIGTERM)
    process.join(grace_s if grace_s < 1.0 else 30)  # enough on a loaded machine, and less than the call's own timeout
    process.kill()
    process.join()
    if grace_s >= 1.0:
        assert process.exitcode == 3, "it waited for its call"
        assert "asked to stop" in (lab.home / "run.error").read_text()
        assert any(isinstance(record, Preempt) and record.cause == "notice" for record in lab.records())
    go.touch()
    check(lab, lab.run(), server, whole.ids)


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


@pytest.mark.slow
def test_k1_killed_at_random_moments_over_real_containers(tmp_path: Path) -> None:
    try:
        Sandbox.create("container", create_timeout=60, home=tmp_path / "probe").close()
    except SandboxError as error:
        pytest.skip(f"no container sandbox here: {error}")
    result = agent_kills.study(often(3, 200), "container", seed=7, folder=tmp_path, pace_s=0.001)
    assert result["wrong"] == [], json.dumps(result)
    assert result["kills"] >= often(3, 200)
    for home in tmp_path.glob("*-*"):
        assert Sandbox.list(home=home) == []


@pytest.mark.slow
def test_k2_killed_together_with_the_sandbox(tmp_path: Path) -> None:
    """Then the files are gone too, and come back from a snapshot and the calls since."""
    try:
        Sandbox.create("container", create_timeout=60, home=tmp_path / "probe").close()
    except SandboxError as error:
        pytest.skip(f"no container sandbox here: {error}")
    result = agent_kills.study(often(2, 60), "container", 5, tmp_path, 0.001, sandbox_share=0.7)
    assert result["wrong"] == [], json.dumps(result)
    assert result["restores"] > 0
