"""S1, S11 and S13: the kernel's interfaces from inside, tried in every kind of sandbox, and with walls taken away."""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from abuse import (
    ALLOWED,
    CASES,
    PLACE,
    ROOT_CAPABILITIES,
    Row,
    Weakened,
    arm,
    attack,
    breaches,
    on_host,
    rows,
    weakened,
)
from sandboxes import need

from rorqual import Sandbox
from rorqual.sandbox.drivers import bwrap
from rorqual.sandbox.home import Home
from rorqual.sandbox.processes import below
from rorqual.sandbox.spec import Kind

Case = tuple[Kind, str]
SUPPORT = Path(__file__).parents[1] / "support"
UID = 64_321
S11 = {"TIOCSTI", "TIOCLINUX", "XFS_IOC_SWAPEXT", "XFS_IOC_EXCHANGE_RANGE", "EXT4_IOC_MOVE_EXT", "FIDEDUPERANGE"}
OF_ROOT_ALONE = {"mount", "fsopen", "setns", "kpagecgroup", "sysctl core_pattern", "mknod", "AF_PACKET", "reboot"}
OF_ANYBODY = {"capabilities", "filter", "no_new_privs", "clone user", "ptrace child", "device nodes", "memory of init"}
OF_THE_FILTER = {
    "ptrace child",
    "add_key",
    "keyctl",
    "perf_event_open",
    "XFS_IOC_SWAPEXT",
    "EXT4_IOC_MOVE_EXT",
    "AF_VSOCK",
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    need(found)
    return found


@pytest.fixture(scope="module")
def sandbox(case: Case) -> Iterator[Sandbox]:
    with Sandbox.create(**need(case)) as made:
        yield arm(made)


@pytest.fixture(scope="module")
def tried(sandbox: Sandbox) -> list[Row]:
    return attack(sandbox, "kernel")


def test_s1_kernel_interfaces_are_refused(case: Case, tried: list[Row]) -> None:
    assert len(tried) > 70
    assert breaches(tried, ALLOWED.get(case[1], ())) == {}


def test_s11_extent_swaps_and_terminal_injection_are_denied(tried: list[Row]) -> None:
    assert {row.name: row.verdict for row in tried if row.name in S11} == dict.fromkeys(S11, "shut")


def test_s1_s11_control_without_a_sandbox_the_same_attempts_work(tmp_path: Path) -> None:
    """Every attempt that is refused inside must succeed somewhere, or it would prove nothing."""
    found = on_host("kernel", cwd=tmp_path, privileged=True)
    worked = set(breaches(found))
    assert worked >= OF_ANYBODY
    if os.geteuid() != 0:
        return
    assert worked >= OF_ROOT_ALONE | S11
    refused = {row.name for row in found if row.verdict == "shut"}
    assert refused <= {"/dev/vda", "/dev/sda", "iopl", "kcore", "/dev/mem"}, (
        "attempts that no setting here lets through"
    )


def test_s1_s11_control_without_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    with weakened(monkeypatch, Weakened(filter=False)) as sandbox:
        worked = set(breaches(attack(sandbox, "kernel")))
    assert worked >= OF_THE_FILTER and "mount" not in worked


def test_s1_control_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bwrap, "_MASKED_FILES", ())
    with weakened(monkeypatch, Weakened()) as sandbox:
        assert "kallsyms" in breaches(attack(sandbox, "kernel"))


def test_s1_control_with_devices_and_processes_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--dev-bind", "/dev", "/dev", "--bind", "/proc", "/proc"]
    with weakened(monkeypatch, Weakened(more=more)) as sandbox:
        assert "device nodes" in breaches(attack(sandbox, "kernel"))


def test_s1_reading_everything_in_proc_and_sys_harms_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    """A recursive grep that read /proc/kpagecgroup once crashed a kernel."""
    found = attack(sandbox, "walk", "1", "/proc", "/sys")
    assert breaches(found) == {} and int(found[-1].seen.split()[0]) > 0
    assert sandbox.commands.run("true").exit_code == 0
    (tmp_path / "kpagecgroup").write_text("x")
    assert breaches(on_host("walk", "2", str(tmp_path), cwd=tmp_path)) != {}, "the walk would not notice"


def test_s1_host_processes_are_invisible(sandbox: Sandbox) -> None:
    marker = f"marker-{os.getpid()}-{sandbox.id}"
    look = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
    with subprocess.Popen([marker, "60"], executable="sleep") as stranger:
        try:
            seen = sandbox.commands.run(look).stdout
            assert "cmdline" in seen and marker not in seen
            assert marker in Path(f"/proc/{stranger.pid}/cmdline").read_text(), "there is nothing to see"
        finally:
            stranger.kill()


def test_s13_root_inside_has_no_more_of_the_kernel(case: Case) -> None:
    """user="root": at most the seven capabilities that installing packages takes; everything else stays refused."""
    with Sandbox.create(**need(case), user="root") as sandbox:
        found = attack(arm(sandbox), "kernel")
    own_agent = {"opening descriptors of init"} if case[1] == "gvisor" else set()  # it asks for no more than the id
    worked = breaches(found, ALLOWED.get(case[1], set()) | own_agent)
    capabilities = int(worked.pop("capabilities", "CapEff:\t0").split()[-1], 16)
    assert worked == {}
    assert capabilities & ~ROOT_CAPABILITIES == 0


def uid_ranges(sandbox: Sandbox) -> set[tuple[int, int]]:
    """The host ids that processes of a sandbox may have: (first, how many)."""
    running = Home.find(sandbox.id).read().running
    assert running is not None
    found = set()
    for process in below(running.processes[0].pid):
        for line in Path(f"/proc/{process.pid}/uid_map").read_text().splitlines():
            _, first, size = map(int, line.split())
            if first or size < 2**32 - 1:
                found.add((first, size))
    return found


def overlap(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> bool:
    """Whether two sets of ranges share an id."""
    return any(one < other + size and other < one + many for one, many in a for other, size in b)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give sandboxes ids of their own")
@pytest.mark.parametrize("driver", ["bwrap", "runc"])
def test_s13_two_sandboxes_share_no_host_id(driver: str) -> None:
    arguments = need(("container", driver))
    with Sandbox.create(**arguments, user="root") as one, Sandbox.create(**arguments, user="root") as two:
        first, second = uid_ranges(one), uid_ranges(two)
        assert first and second and not overlap(first, second)
        assert not overlap(first, {(0, 100_000)}), "ids of the host's own users"
        assert overlap(first, uid_ranges(one)), "the comparison would not notice"
    with Sandbox.create(**arguments, user="root") as three:
        assert not overlap(uid_ranges(three), first | second), "ids are used again"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give sandboxes ids of their own")
def test_s13_root_of_runc_can_make_users() -> None:
    with Sandbox.create(**need(("container", "runc")), user="root") as sandbox:
        made = sandbox.commands.run(
            "echo 'new:x:1234:1234::/home/new:/bin/sh' >>/etc/passwd; mkdir -p /home/new /opt/pkg"
        )
        made = sandbox.commands.run("chown 1234:1234 /home/new && chmod 700 /home/new && stat -c %u /home/new")
        assert made.stdout == "1234\n"
        assert sandbox.commands.run("id -u; cat /proc/1/mem", user="new").stdout == "1234\n"
        host = sandbox.commands.run("cat /proc/self/uid_map").stdout.split()
        assert host[0] == "0" and int(host[1]) > 100_000 and host[2] == "65536"


def python_for_all() -> str:
    """An interpreter of this version that any user may start; root's own may lie in a closed folder."""
    for path in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        if subprocess.run(["test", "-x", path], user=UID, extra_groups=[], check=False).returncode == 0:
            return path
    pytest.skip(f"an ordinary user can start neither {sys.executable} nor a Python of its version in /usr/bin")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="this is an ordinary user's run already")
@pytest.mark.parametrize(("kind", "driver"), [("container", "bwrap"), ("container", "runc"), ("function", "zygote")])
def test_s1_s2_s6_s7_as_an_ordinary_user(kind: str, driver: str) -> None:
    """The whole assault again by a user without rights, whose own id the sandbox shares on the host."""
    with tempfile.TemporaryDirectory(prefix="abuse-user-") as folder:
        os.chown(folder, UID, UID)
        path = os.pathsep.join([*map(str, (Path(__file__).parents[2], SUPPORT)), sysconfig.get_paths()["purelib"]])
        environment = {"HOME": folder, "RORQUAL_HOME": f"{folder}/data", "TMPDIR": folder, "PYTHONPATH": path}
        environment |= {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": f"{folder}/cache", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [python_for_all(), str(SUPPORT / "abuse.py"), kind, driver]
        rights: dict[str, Any] = {"user": UID, "group": UID, "extra_groups": []}
        ran = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=False, **rights
        )
    if ran.returncode and "sandbox can be made here" in ran.stderr:
        pytest.skip(ran.stderr.strip().splitlines()[-2])
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["attempts"] > 80 and report["breaches"] == {}, report


def test_the_suite_reads_its_own_rows() -> None:
    text = "a\topen\tx\nb\tshut\t\nc\tbroken\tcould not fork\nd\tabsent\t"
    assert breaches(rows(text)) == {"a": "x", "c": "could not fork"}
    assert breaches(rows(text), {"a"}) == {"c": "could not fork"}
    assert PLACE.startswith("/tmp/")


@pytest.fixture(autouse=True, scope="module")
def host_unharmed() -> Iterator[None]:
    """What the attempts aim at is as it was."""
    before = {
        path: Path(path).read_bytes()
        for path in ("/etc/passwd", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname")
    }
    yield
    assert {path: Path(path).read_bytes() for path in before} == before
