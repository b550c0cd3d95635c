"""S2 and S3: programs that take all there is, and programs that write without end, in every kind of sandbox.

Each limit is looked up before something is let loose against it. What the hostile program gets is compared with the
limit, and the same program on the bare host gets more, which shows that the comparison would notice.
"""

import functools
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from abuse import CASES, PLACE, all_descriptors, amount, arm, excess, memory_limit, on_host
from sandboxes import Shared, need, traces

from rorqual import Sandbox
from rorqual.errors import SandboxError
from rorqual.sandbox import cgroups
from rorqual.sandbox.drivers.bwrap import tree_of
from rorqual.sandbox.home import Home, sandboxes_folder
from rorqual.sandbox.processes import below
from rorqual.sandbox.spec import Kind, Limits

Case = tuple[Kind, str]
PIDS, MEMORY, DISK, INODES = 48, 128, 32, 2000
ASKED = {"forks": 120, "memory": 400, "hidden": 400, "disk": 48, "inodes": 3000, "descriptors": 2000}
BOMB = "b() { b | b & }; b"


def small(case: dict[str, str]) -> Sandbox:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rorqual.sandbox.async_sandbox.Limits", functools.partial(Limits, inodes=INODES))
        made = Sandbox.create(**case, pids=PIDS, memory_mb=MEMORY, disk_mb=DISK)
    assert {"memory", "pids", "cpu", "disk"} <= set(made.info().enforced)
    return arm(made)


@pytest.fixture(scope="module", params=CASES)
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """One small sandbox for all loads of a kind: each is told to give back what it took."""
    case = need(request.param)
    made = Shared(lambda: small(case))
    yield made
    last = made.close()
    assert last is None or traces(last) == []


@pytest.fixture
def sandbox(shared: Shared, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with shared.lent(request) as made:
        yield made


@pytest.mark.parametrize("what", ["forks", "memory", "hidden", "disk", "inodes", "descriptors"])
def test_s2_what_is_had_stays_within_the_limit(sandbox: Sandbox, what: str) -> None:
    memory = memory_limit(sandbox, MEMORY)
    if what == "inodes" and what not in sandbox.info().enforced:
        pytest.skip("nothing counts files here; they take memory of the sandbox's own, which is bounded")
    limit = {"forks": PIDS, "memory": memory, "hidden": memory, "disk": DISK, "inodes": INODES, "descriptors": 1024}[
        what
    ]
    place = {"disk": ["/tmp/fill"], "inodes": ["/tmp/many"]}.get(what, [])
    got = amount(sandbox, what, str(ASKED[what]), *place)
    assert excess(got, limit) is None
    assert what in ("memory", "hidden") or got > limit // 4, "it was refused what it may have"
    sandbox.files.write("/tmp/after", "the agent works on")
    assert sandbox.commands.run(["cat", "/tmp/after"]).stdout == "the agent works on"


@pytest.mark.parametrize("what", ["forks", "memory", "hidden", "disk", "inodes", "descriptors"])
def test_s2_control_on_the_bare_host_more_is_had(tmp_path: Path, what: str) -> None:
    place = {"disk": [str(tmp_path / "fill")], "inodes": [str(tmp_path / "many")]}.get(what, [])
    [row] = on_host(what, str(ASKED[what]), *place, cwd=tmp_path, preexec_fn=all_descriptors)
    most = MEMORY + 32 + 192
    limit = {"forks": PIDS, "memory": most, "hidden": most, "disk": DISK, "inodes": INODES, "descriptors": 1024}[what]
    assert excess(int(row.verdict), limit) is not None


def test_s2_shared_memory_folder_is_bounded(sandbox: Sandbox) -> None:
    assert excess(amount(sandbox, "disk", "100", "/dev/shm/fill"), 64) is None


def test_s2_full_disk_is_an_error_and_nothing_else(sandbox: Sandbox) -> None:
    filled = sandbox.commands.run("head -c 60000000 /dev/zero >/tmp/fill", timeout=60)
    assert filled.exit_code != 0 and "No space left" in filled.stderr
    with pytest.raises(SandboxError, match="No space left"):
        sandbox.files.write("/tmp/more", b"x" * 1_000_000)
    assert sandbox.commands.run("rm /tmp/fill; echo gone").stdout == "gone\n"
    sandbox.files.write("/tmp/more", b"x" * 1_000_000)


def test_s2_fork_bomb_is_contained_and_ended(sandbox: Sandbox) -> None:
    assert sandbox.info().limits.pids == PIDS and sandbox.info().enforced["pids"], "no bomb without a limit"
    assert amount(sandbox, "forks", "120") <= PIDS
    bomb = sandbox.commands.run(BOMB + "; sleep 5", timeout=1.0)
    assert bomb.timed_out or bomb.exit_code != 0
    sandbox.files.write("/tmp/during", "the agent needs no process of its own for this")
    for _ in range(20):  # what the bomb left in the background falls at the next kill
        for entry in sandbox.commands.list():
            if entry["running"]:
                sandbox.commands.attach(str(entry["id"])).kill()
        if sandbox.commands.run("true", timeout=60).exit_code == 0:
            break
    assert sandbox.commands.run("echo alive").stdout == "alive\n"


def test_s2_memory_hog_is_told_apart_from_a_failing_program(sandbox: Sandbox) -> None:
    if "machine" in sandbox.info().enforced["memory"] or "gVisor" in sandbox.info().enforced["memory"]:
        pytest.skip("memory is a machine's own there, or gVisor's; what is had of it is measured above")
    hog = sandbox.commands.run("head -c 200000000 /dev/zero | tail >/dev/null", timeout=60)
    assert hog.exit_code != 0 and not hog.timed_out
    assert sandbox.commands.run("exit 3").oom_killed is False


def strangers(sandbox: Sandbox) -> set[int]:
    """Processes of a sandbox outside of its control group, where it has one."""
    running = Home.find(sandbox.id).read().running
    assert running is not None
    if not running.cgroups:
        return set()
    return {process.pid for process in below(running.processes[1].pid)} - set(cgroups.adopt(running.cgroups).pids())


@pytest.mark.slow
def test_s2_a_spinning_sandbox_leaves_its_neighbour_time() -> None:
    """Half a processor each: a crowd spins next door, and the count goes on at a good part of its pace."""
    arguments = need(("container", "bwrap"))
    with Sandbox.create(**arguments, cpu=0.5) as quiet, Sandbox.create(**arguments, cpu=0.5) as loud:
        alone = amount(arm(quiet), "count", "400", "1")
        spinning = arm(loud).commands.start([PLACE, "count", "30000", "8"])
        while len(tree_of(loud._sandbox._link.running)) < 8:
            time.sleep(0.02)
        assert strangers(loud) == set(), "processes that no limit on the processor holds"
        shared = max(amount(quiet, "count", "400", "1") for _ in range(3))
        assert shared > alone / 5, "the neighbour starves"
        assert loud.commands.run("echo reachable", timeout=20).stdout == "reachable\n"
        spinning.kill()


@contextmanager
def allocation() -> Iterator[list[int]]:
    """The most bytes that Python objects took at once in the block; what C code beside it does is not counted."""
    most = [0]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield most
        most[0] = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def size_of(folder: Path) -> int:
    """Bytes in a tree."""
    return sum(path.lstat().st_size for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "line", ["yes", "head -c 200000000 /dev/zero; sleep 9", "while :; do printf '\\033[2J\\033]0;x\\007'; done"]
)
def test_s3_endless_output_is_cut_at_the_source(sandbox: Sandbox, line: str) -> None:
    home = sandboxes_folder() / sandbox.id
    deadline = time.monotonic() + 60
    while sandbox.commands.run("true & wait").exit_code and time.monotonic() < deadline:
        time.sleep(0.1)  # what an earlier bomb left is still being counted by the kernel
    disk = size_of(home)
    with allocation() as taken:
        result = sandbox.commands.run(line, timeout=3, max_output=100_000)
    assert len(result.stdout_bytes) == 100_000 and result.truncated_bytes["stdout"] > 0
    assert taken[0] < 48 << 20 and size_of(home) - disk < 8 << 20


def test_s3_a_stream_that_nobody_reads_takes_no_memory_here(sandbox: Sandbox) -> None:
    """The program cannot run ahead of the host: what is not taken stays inside and is cut there."""
    taken = [0]

    def slowly(text: str) -> None:
        while not taken[0] and not sandbox.files.exists("/tmp/written"):
            time.sleep(0.02)  # all of it is written before the first piece is taken
        taken[0] += len(text)

    with allocation() as most:
        flood = "rm -f /tmp/written; head -c 20000000 /dev/zero; touch /tmp/written; sleep 0.2"
        assert sandbox.commands.run(flood, timeout=60, on_stdout=slowly).exit_code == 0
    assert 0 < taken[0] < 5 << 20, "4 MiB wait for a callback, and one piece is on its way"
    assert most[0] < 64 << 20


def test_s3_control_a_plain_pipe_takes_all_of_it() -> None:
    out = subprocess.run("yes | head -c 30000000", shell=True, capture_output=True, check=True).stdout
    assert excess(len(out), 100_000) is not None


def test_s3_a_flood_that_is_no_text_comes_back_as_it_was(sandbox: Sandbox) -> None:
    sent = b"\x1b]0;title\x07\x1b[31m\xff\xfe\x00\r\n" * 100
    sandbox.files.write("/tmp/raw", sent)
    assert sandbox.commands.run(["cat", "/tmp/raw"]).stdout_bytes == sent
