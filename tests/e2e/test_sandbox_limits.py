"""Limits of a container, by whatever holds them here: control groups, or the keeper and the user namespace."""

from collections.abc import Iterator

import pytest
from sandboxes import need, traces

from rorqual import Sandbox
from rorqual.sandbox import cgroups

pytestmark = pytest.mark.slow
PYTHON = "command -v python3 > /dev/null || { echo no python3 inside >&2; exit 99; }\n"


@pytest.fixture(params=["as it is", "without control groups"])
def sandbox(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    if request.param == "without control groups":
        monkeypatch.setattr(cgroups, "create", lambda *_, **__: None)
    arguments = need(("container", "bwrap"))
    with Sandbox.create(**arguments, memory_mb=100, pids=40, disk_mb=20, cpu=1) as made:  # type: ignore[arg-type]
        if request.param == "without control groups":
            assert "keeper" in made.info().enforced["memory"]
        yield made
    assert traces(made.id) == []


def test_memory_in_one_process(sandbox: Sandbox) -> None:
    hog = 'exec python3 -c "x = []\nwhile True: x.append(bytearray(4 << 20))"'
    result = sandbox.commands.run(PYTHON + hog, timeout=60)
    assert result.exit_code == 137 and result.oom_killed or "MemoryError" in result.stderr
    assert not result.timed_out
    assert sandbox.commands.run("echo alive").stdout == "alive\n"


def test_memory_over_many_processes_and_from_other_threads(sandbox: Sandbox) -> None:
    program = """import os, threading, time
def fork():
    if os.fork() == 0:
        x = bytearray(20 << 20)
        for i in range(0, len(x), 4096): x[i] = 1
        time.sleep(30)
        os._exit(0)
for _ in range(12):
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
ended = 0
for _ in range(12):
    ended += os.WIFSIGNALED(os.wait()[1])
    if ended: break
print(ended)
"""
    result = sandbox.commands.run(PYTHON + "exec python3 -c '" + program + "'", timeout=40)
    assert result.stdout == "1\n" or result.signal == 9, "twelve processes of 20 MiB fit in 100 MiB"
    assert not result.timed_out
    assert sandbox.commands.run("true").exit_code == 0


def test_processes(sandbox: Sandbox) -> None:
    bomb = "i=0; while [ $i -lt 200 ]; do sleep 100 & i=$((i+1)); done 2>&1; wait"
    result = sandbox.commands.run(bomb, timeout=20)
    assert "fork" in result.stdout.lower()
    assert sandbox.commands.run("echo alive").stdout == "alive\n", "a full sandbox cannot be helped any more"
    sandbox.commands.run("kill -9 -1", timeout=20)
    assert sandbox.commands.run("ls /proc | grep -c '^[0-9]'", timeout=20).stdout.strip().isdigit()
    endless = sandbox.commands.run("f() { f | f & }; f; sleep 0.5", timeout=3)
    assert endless.exit_code in (0, 2, 137)
    assert sandbox.commands.run("echo alive", timeout=20).stdout == "alive\n"


def test_disk_and_size_of_a_file(sandbox: Sandbox) -> None:
    result = sandbox.commands.run("head -c 50000000 /dev/zero > big; echo $?; ls -l big | cut -d' ' -f5; rm big")
    assert "No space left" in result.stderr
    assert sandbox.commands.run("head -c 10000000 /dev/zero > small && ls -l small | cut -d' ' -f5").exit_code == 0
    shared = sandbox.commands.run("head -c 100000000 /dev/zero > /dev/shm/big; rm -f /dev/shm/big")
    assert shared.exit_code == 0 and ("No space left" in shared.stderr or "Killed" in shared.stderr)
    assert sandbox.commands.run("touch /dev/x /proc/x /sys/x").exit_code != 0


def test_open_files(sandbox: Sandbox) -> None:
    assert sandbox.commands.run("ulimit -n; ulimit -c; ulimit -Hn").stdout.split() == ["1024", "0", "1024"]


def test_processor(sandbox: Sandbox) -> None:
    spin = "for i in 1 2 3; do (timeout 2 sh -c 'while :; do :; done') & done; wait; times | tail -1"
    result = sandbox.commands.run(spin, timeout=30)
    user = result.stdout.split()[0]
    minutes, _, seconds = user.partition("m")
    assert int(minutes) * 60 + float(seconds.rstrip("s")) < 2 * 1.5, "three loops had more than one processor"
