"""Control groups hold what they promise; where there are none, the reason is said."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from another_user import as_ordinary_user

from rorqual.errors import SandboxError
from rorqual.sandbox import cgroups
from rorqual.sandbox.cgroups import Group
from rorqual.sandbox.spec import Limits

REASON = cgroups.why_not()
needs_groups = pytest.mark.skipif(REASON is not None, reason=f"no control groups here: {REASON}")


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    limits = getattr(request, "param", Limits(cpu=0.5, memory_mb=64, pids=20))
    made = cgroups.create(f"test-{uuid.uuid4().hex[:12]}", limits, devices=cgroups.PLAIN_DEVICES)
    assert made is not None
    yield made
    assert made.kill() == []
    assert made.remove() == []
    assert not any(Path(path).exists() for path in made.paths)


def start(group: Group, code: str) -> subprocess.Popen[str]:
    """A Python program that is in the group before its first line."""

    def enter() -> None:
        for path in group.procs:
            path.write_text("0")

    return subprocess.Popen(
        [sys.executable, "-S", "-c", code], preexec_fn=enter, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@needs_groups
def test_memory_hog_is_killed_and_counted(group: Group) -> None:
    assert group.oom_kills() == 0
    hog = start(group, "x = bytearray(300 << 20)")
    assert hog.communicate()[0] == ""
    assert hog.returncode == -signal.SIGKILL
    assert group.oom_kills() == 1
    assert group.describe()["memory"].startswith("cgroup v")
    small = start(group, "x = bytearray(10 << 20); print(len(x))")
    assert small.communicate()[0].strip() == str(10 << 20)
    assert group.peak_memory_bytes() >= 10 << 20


@needs_groups
def test_fork_bomb_stops_at_the_limit_and_can_be_ended(group: Group) -> None:
    bomb = start(
        group,
        "import os, time\n"
        "while True:\n"
        "    try:\n"
        "        if os.fork() == 0: os.setsid()\n"
        "    except OSError:\n"
        "        os.write(1, b'full\\n'); time.sleep(0.01)\n",
    )
    assert bomb.stdout is not None
    assert bomb.stdout.readline() == "full\n"
    assert 2 <= len(group.pids()) <= 20
    assert group.kill() == []
    assert group.pids() == []
    bomb.stdout.close()
    assert bomb.wait() == -signal.SIGKILL


@needs_groups
@pytest.mark.parametrize("group", [Limits(cpu=0.03, memory_mb=64, pids=20)], indirect=True)
def test_a_spinning_process_is_throttled(group: Group) -> None:
    spin = start(group, "while True: pass")
    stats = [path for name in group.paths if (path := Path(name, "cpu.stat")).exists()]
    held, deadline = 0, time.monotonic() + 30  # on a full machine it takes a while until it gets its share at all
    while held < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        lines = [line.split() for path in stats for line in path.read_text().splitlines()]
        held = max(int(line[1]) for line in lines if line[0] == "nr_throttled")
    used = group.cpu_seconds()
    assert group.kill() == []
    spin.communicate()
    assert held >= 2 and used > 0


@needs_groups
def test_devices_are_refused(group: Group) -> None:
    if "devices" not in group.describe():
        pytest.skip("control groups of version 2 have no devices controller")
    node = Path("/dev/kmsg")
    if not node.exists():
        pytest.skip("no /dev/kmsg to try")
    code = f"try: open({str(node)!r}, 'rb')\nexcept OSError as e: print(e.errno)\nopen('/dev/urandom', 'rb').read(1)"
    assert start(group, code).communicate()[0] == "1\n"


@needs_groups
def test_another_process_can_take_it_over(group: Group) -> None:
    child = start(group, "input()")
    taken = cgroups.adopt(group.paths)
    assert taken.paths == group.paths
    assert taken.pids() == [child.pid]
    taken.freeze()
    assert Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] in "DS"
    taken.thaw()
    assert child.communicate("\n") == ("", None)
    assert child.returncode == 0
    assert taken.memory_bytes() >= 0
    sleeper = subprocess.Popen(["sleep", "100"])
    taken.attach(sleeper.pid)
    assert sleeper.pid in group.pids()
    assert taken.kill() == []
    assert sleeper.wait() == -signal.SIGKILL
    with pytest.raises(SandboxError, match=f"process {sleeper.pid} cannot be put"):
        taken.attach(sleeper.pid)


@needs_groups
def test_a_name_is_taken_once_and_nothing_is_left_of_the_second(group: Group) -> None:
    name = Path(group.paths[0]).name
    with pytest.raises(SandboxError, match="already"):
        cgroups.create(name, Limits())
    assert all(Path(path).exists() for path in group.paths)
    fresh = f"test-{uuid.uuid4().hex[:12]}"
    with pytest.raises(SandboxError, match="limit could not be set"):
        cgroups.create(fresh, Limits(pids=-5))
    assert not any((Path(path).parent / fresh).exists() for path in group.paths)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".", "-x", "a" * 200])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(SandboxError, match="no name for a control group"):
        cgroups.create(name, Limits())


def test_only_our_own_groups_are_adopted(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="no control group of ours"):
        cgroups.adopt([tmp_path / "rorqual" / "x"])
    with pytest.raises(SandboxError, match="no control group of ours"):
        cgroups.adopt(["/sys/fs/cgroup/memory/other/x"])


def test_version_2_freezes_and_kills(tmp_path: Path) -> None:
    tree = next((m.path for m in cgroups._mounts() if m.version == 2 and os.access(m.path, os.W_OK)), None)
    if tree is None:
        pytest.skip("no version 2 tree that this user may write")
    folder = tree / f"rorqual-test-{uuid.uuid4().hex[:12]}" / "inner"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no group can be made in {tree}: {error}")
    group = Group({"": folder}, version=2)
    try:
        children = [subprocess.Popen(["sleep", "100"]) for _ in range(3)]
        for child in children:
            group.attach(child.pid)
        assert group.pids() == sorted(child.pid for child in children)
        group.freeze()
        assert "frozen 1" in (folder / "cgroup.events").read_text()
        group.thaw()
        assert group.kill() == []
        assert [child.wait() for child in children] == [-signal.SIGKILL] * 3
    finally:
        group.kill()
        assert group.remove() == []
    assert not folder.parent.exists()


@pytest.fixture
def delegated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree as systemd hands one on: the user's service, and this process in a scope below it."""
    top = tmp_path / "user@1000.service"
    own = top / "app.slice" / "run.scope"
    own.mkdir(parents=True)
    for folder in (top, top / "app.slice", own):
        for name in ("cgroup.procs", "cgroup.subtree_control"):
            (folder / name).write_text("")
        (folder / "cgroup.controllers").write_text("cpu memory pids")
    mount = cgroups._Mount(2, tmp_path, "/", frozenset())
    monkeypatch.setattr(cgroups, "_mounts", lambda: [mount])
    monkeypatch.setattr(cgroups, "_own", lambda mount: own)
    return top


def test_the_shared_folder_stays_while_a_runtime_is_about_to_use_it(delegated: Path) -> None:
    """runc makes `rorqual`, reads in it and makes its group, while the last sandbox of somebody else goes."""
    parent = delegated.parent / cgroups.PARENT
    parent.mkdir()
    with cgroups.parent_held() as handles:
        child = subprocess.Popen(["sleep", "100"], pass_fds=handles)
    try:
        assert cgroups.remove_everywhere("gone") == []
        assert parent.exists()
    finally:
        child.kill()
        child.wait()
    assert cgroups.remove_everywhere("gone") == []
    assert not parent.exists()


def test_a_delegated_tree_is_used_from_its_top(delegated: Path) -> None:
    assert cgroups.why_not() is None
    assert cgroups._place_v2() == (delegated, "")
    assert (delegated / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_a_tree_without_controllers_says_how_to_get_them(delegated: Path) -> None:
    (delegated / "cgroup.controllers").write_text("pids")
    reason = cgroups.why_not()
    assert reason is not None
    assert "has no controller memory, cpu" in reason and "Delegate=cpu memory pids" in reason
    assert cgroups.create("x", Limits()) is None


def test_an_ordinary_user_is_told_what_is_missing() -> None:
    def body(folder: Path) -> str | None:
        assert cgroups._place_v1()[0] == {}
        return cgroups.why_not()

    reason = as_ordinary_user(body)
    assert reason is None or "cgroup" in reason
