"""What runc adds to a container: users of its own in a private range of host ids, and control groups."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import Sandbox, cgroups, processes
from rorqual.sandbox.agent.build import FOLDER
from rorqual.sandbox.drivers import oci
from rorqual.sandbox.drivers.runc import Runc
from rorqual.sandbox.host_ids import FIRST_RANGE, LAST_RANGE, RANGE, fresh_range
from rorqual.sandbox.sweep import sweep

pytestmark = pytest.mark.slow
needs_runc = pytest.mark.skipif(Runc().missing() is not None, reason=f"runc: {Runc().missing()}")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def rooted(home: Path) -> Iterator[Sandbox]:
    with Sandbox.create("container", driver="runc", user="root", pids=60, memory_mb=256) as sandbox:
        name = sandbox.id
        yield sandbox
    assert leftovers([name]) == []


def uid_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))


def leftovers(paths: list[str]) -> list[str]:
    """Control groups of a sandbox that are still there, in any hierarchy."""
    names = {Path(path).name for path in paths}
    return [str(m.path / "rorqual" / n) for m in cgroups._mounts() for n in names if (m.path / "rorqual" / n).exists()]


def id_range(sandbox: Sandbox) -> tuple[int, int]:
    inside, outside, count = map(int, sandbox.commands.run("cat /proc/self/uid_map").stdout.split())
    assert inside == 0
    return outside, count


@needs_runc
def test_s13_root_inside_has_users_and_owns_nothing_outside(rooted: Sandbox, home: Path) -> None:
    first, count = id_range(rooted)
    assert count == 65536 and FIRST_RANGE <= first < LAST_RANGE
    script = (
        "echo 'ada:x:1500:1500::/home/ada:/bin/sh' >> /etc/passwd && mkdir /home/ada && chown 1500:1500 /home/ada && "
        "touch /home/ada/f && chown 1500:1500 /home/ada/f && chmod 600 /home/ada/f && stat -c '%u %g' /home/ada/f"
    )
    assert rooted.commands.run(script).stdout == "1500 1500\n"
    assert rooted.commands.run("id -u", user="ada").stdout == "1500\n"
    refused = rooted.commands.run("echo x > /home/agent/x; cat /home/ada/f; id -u", user="agent")
    assert refused.stdout == "1000\n" and "ada/f: Permission denied" in refused.stderr
    running = json.loads(next((home / "sandboxes").glob("container-*/spec.json")).read_text())["running"]
    uids = [uid_of(one.pid) for one in processes.below(running["processes"][1]["pid"])]
    inside = [uid for uid in uids if uid]  # runc itself is root
    assert inside and all(first <= uid < first + count for uid in inside)


@needs_runc
def test_s13_two_sandboxes_never_share_a_range(rooted: Sandbox) -> None:
    with Sandbox.create("container", driver="runc", user="root") as other:
        (a, size), (b, _) = id_range(rooted), id_range(other)
        assert abs(a - b) >= size
    ranges = [fresh_range() for _ in range(5)]
    assert len(set(ranges)) == 5 and all(one % RANGE == 0 for one in ranges) and a not in ranges and b not in ranges


@needs_runc
def test_s1_root_inside_is_refused_what_root_may(rooted: Sandbox) -> None:
    tries = {
        "mount -t tmpfs t /mnt": "denied|permitted|permission|superuser",
        "unshare -U true": "not permitted",
        "mknod /tmp/disk b 8 0": "not permitted",
        "cat /dev/vda /dev/sda /dev/kvm /dev/fuse": "No such file",
        "chroot / true": "not permitted",
        "echo 1 > /proc/sys/kernel/sysrq": "Read-only|denied|nonexistent",
        "hostname changed": "permi|must be root|not found",
        "kill -9 1": "",
    }
    for command, answer in tries.items():
        result = rooted.commands.run(command)
        assert command == "kill -9 1" or (result.exit_code != 0 and re.search(answer, result.stderr)), (command, result)
    for name in ("kcore", "kmsg", "kpagecgroup", "keys", "timer_list"):
        assert rooted.commands.run(f"head -c 1 /proc/{name} 2>/dev/null | wc -c").stdout.strip() == "0", name
    links = rooted.commands.run("cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' '").stdout.split()
    assert links == ["lo"]
    capabilities = rooted.commands.run("grep CapEff /proc/self/status").stdout.split()[1]
    assert int(capabilities, 16) == 0xFB, "chown, dac_override, fowner, fsetid, kill, setgid, setuid"
    assert rooted.commands.run("echo fine").stdout == "fine\n"


@needs_runc
def test_limits_are_held_and_told(rooted: Sandbox) -> None:
    enforced = rooted.info().enforced
    assert all(enforced[name].startswith("cgroup v") for name in ("memory", "pids", "cpu"))
    hog = rooted.commands.run(["python3", "-c", "x = bytearray(600 << 20)"])
    assert hog.exit_code == 137 and hog.oom_killed
    bomb = (
        "import os, time\nn = 0\ntry:\n  while n < 500:\n    n += 1\n    if not os.fork(): time.sleep(30)\n"
        "except OSError: print(n)"
    )
    result = rooted.commands.run(["timeout", "-s", "KILL", "5", "python3", "-c", bomb])
    assert 5 < int(result.stdout.split()[0]) < 60
    assert rooted.commands.run("echo alive").stdout == "alive\n"


@needs_runc
def test_a_snapshot_keeps_owners_and_deletions(rooted: Sandbox) -> None:
    rooted.commands.run("touch /opt/a && chown 1234:99 /opt/a && rm -rf /etc/shells && echo s > /srv/s", check=True)
    taken = rooted.snapshot()
    with Sandbox.create("container", driver="runc", user="root", snapshot=taken) as other:
        assert id_range(other) != id_range(rooted)
        shown = other.commands.run("stat -c '%u %g' /opt/a; cat /srv/s; ls /etc/shells")
        assert shown.stdout == "1234 99\ns\n" and "No such file" in shown.stderr


@needs_runc
@pytest.mark.parametrize("victim", ["keeper", "holder", "runc"])
def test_nothing_outlives_a_part_that_is_killed(home: Path, victim: str) -> None:
    sandbox = Sandbox.create("container", driver="runc")
    sandbox.commands.start("sleep 1000")
    record = next(iter((home / "sandboxes").glob("container-*/spec.json"))).read_text()
    running = json.loads(record)["running"]
    keeper, holder = (one["pid"] for one in running["processes"])
    tree = processes.below(keeper)
    below_holder = processes.below(holder)
    target = {"keeper": keeper, "holder": holder, "runc": below_holder[0].pid}[victim]
    os.kill(target, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(processes.alive(one) for one in tree) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(processes.alive(one) for one in tree)
    sandbox.close()
    sweep()
    assert leftovers(running["cgroups"]) == []
    assert list((home / "sandboxes").glob("container-*")) == []


def test_the_filter_names_what_the_agent_refuses() -> None:
    calls, source = oci.refused_calls(), (FOLDER / "confine.c").read_text()
    assert {"mount", "mount_setattr", "bpf", "ptrace", "unshare", "setns", "kexec_load", "io_uring_setup"} <= set(calls)
    table = source.partition(" REFUSED[] = {")[2].partition("};")[0]
    assert len(set(re.findall(r"\bSYS_(\w+)", re.sub(r"^#.*$", "", table, flags=re.MULTILINE))) - set(calls)) == 0
    assert len(oci.refused_ioctls()) == source.partition("REFUSED_IOCTLS[] = {")[2].partition("};")[0].count("0x")
    names = [rule["names"] for rule in oci.seccomp()["syscalls"]]
    assert ["clone3"] in names and names.count(["clone"]) == 7


def test_without_root_it_says_what_to_use() -> None:
    if os.geteuid() == 0:
        pytest.skip("runs as root")
    assert "bubblewrap isolates as well" in (Runc().missing() or "")
