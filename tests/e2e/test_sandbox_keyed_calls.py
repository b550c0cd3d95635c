"""Keyed Python calls whose client is killed at any step: whoever comes next gets the result, and nothing ran twice."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from sandboxes import need, traces

from rorqual import Sandbox
from rorqual.sandbox.errors import OutcomeUnknown, ReplayDivergence
from rorqual.sandbox.function_runner import KEPT, Reports

SOURCE = """
import os, time
def f(number):
    with open("runs", "a") as file:
        file.write("x")  # how often it ran
    while not os.path.exists("go"):
        time.sleep(0.01)
    return number
"""

CLIENT = """
import os, sys
from rorqual import Sandbox
from rorqual.sandbox.commands import CommandHandle
from rorqual.sandbox.history import History

identity, kill_at, source = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), 9)

plain = CommandHandle.write
async def write(handle, data):
    if b"def f" not in (data if isinstance(data, bytes) else b""):
        return await plain(handle, data)
    kill_at == "unsent" and die()
    await plain(handle, data[: {"half": len(data) // 2, "but for its end": len(data) - 1}.get(kill_at, len(data))])
    while kill_at == "running" and not await handle._sandbox.files.exists("runs"):
        pass
    die()

if kill_at == "unrecorded":
    History.finish = die
else:
    CommandHandle.write = write
with Sandbox.connect(identity) as sandbox:
    sandbox.call(source, "f", [1], call="first", timeout=None)
"""


@pytest.fixture
def identity() -> Iterator[str]:
    """A sandbox that nobody drives."""
    with Sandbox.create(**need(("function", "zygote"))) as made:  # type: ignore[arg-type]
        made.detach()
    yield made.id
    Sandbox.end(made.id)
    assert traces(made.id) == []


def killed(identity: str, kill_at: str) -> None:
    """A client made the call and was killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", CLIENT, identity, kill_at, SOURCE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr[-2000:]


@pytest.mark.parametrize("kill_at", ["unsent", "half", "but for its end", "unrecorded"])
def test_a_call_whose_client_was_killed_runs_once(kill_at: str, identity: str) -> None:
    with Sandbox.connect(identity) as before:
        before.files.write("go", "")
        before.detach()
    killed(identity, kill_at)
    with Sandbox.connect(identity) as found:
        assert found.call(SOURCE, "f", [1], call="first").value == 1
        assert found.call(SOURCE, "f", [1], call="first").replayed
        with pytest.raises(ReplayDivergence):
            found.call(SOURCE, "f", [2], call="first")
        assert found.call(SOURCE, "f", [2], call="second").value == 2
        assert found.files.read("runs") == "xx"


def test_a_call_that_outlived_its_client_is_joined(identity: str) -> None:
    killed(identity, "running")
    with Sandbox.connect(identity) as found:
        values: list[object] = []
        asking = threading.Thread(target=lambda: values.append(found.call(SOURCE, "f", [1], call="first").value))
        asking.start()
        found.files.write("go", "")
        asking.join()
        assert values == [1] and found.files.read("runs") == "x"


def test_where_the_interpreter_is_no_more_nobody_knows(identity: str) -> None:
    killed(identity, "running")
    with Sandbox.connect(identity) as found:
        [interpreter] = [one for one in found.commands.list() if one["running"]]
        found.commands.attach(str(interpreter["id"])).kill()
        with pytest.raises(OutcomeUnknown, match="interpreter that ran it is no more"):
            found.call(SOURCE, "f", [1], call="first")
        assert found.files.read("runs") == "x"


def test_of_reports_that_take_too_much_the_oldest_are_dropped_and_forgotten_ones_run_anew() -> None:
    reports = Reports()
    assert reports.find("a") is None
    reports.keep("a", b"1" * (KEPT // 2))
    reports.keep("b", b"2" * (KEPT // 2))
    assert reports.find("a") == b"1" * (KEPT // 2)
    reports.keep("c", b"3")
    assert json.loads(reports.find("a") or b"") == {"id": "a", "dropped": True}
    assert reports.find("b") == b"2" * (KEPT // 2) and reports.find("c") == b"3"
    reports.forget(["a", "c", "unknown"])
    assert reports.find("a") is None and reports.find("c") is None and reports.find("b") is not None
