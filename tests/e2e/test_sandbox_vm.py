"""Virtual machines by QEMU: templates, copies of a running machine, and what stands around QEMU.

What every kind of sandbox must do is in test_sandbox_conformance.py; here is what only machines can.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from sandboxes import need, traces

from rorqual import Sandbox
from rorqual.errors import SandboxError
from rorqual.sandbox.errors import Gone, Unsupported
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.processes import below
from rorqual.sandbox.spec import Kind, Snapshot
from rorqual.sandbox.vm import share, snapshot, template
from rorqual.sandbox.vm.machine import BINARY, qemu_version

pytestmark = pytest.mark.slow
SMALL: tuple[Kind, str] = ("microvm", "qemu-tcg")
COUNTER = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.1; done"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One machine that the tests of this file share; each leaves it running."""
    with Sandbox.create(**need(SMALL), create_timeout=120) as made:
        yield made
    assert traces(made.id) == []


@pytest.fixture(scope="module")
def counting(sandbox: Sandbox) -> Iterator[Snapshot]:
    """A full snapshot of it while a process counts in memory."""
    sandbox.files.write("/tmp/kept", "before")
    handle = sandbox.commands.start(COUNTER, timeout=None)
    _wait_for(sandbox, 3)
    taken = sandbox.snapshot("full")
    handle.kill()
    yield taken
    reference = Store().reference(taken.id)
    assert reference is not None
    snapshot.remove(reference.note["full"])


def _wait_for(sandbox: Sandbox, count: int) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        text = sandbox.commands.run("cat /tmp/count 2>/dev/null").stdout.strip()
        if text and int(text) >= count:
            return int(text)
        time.sleep(0.05)
    raise AssertionError(f"the counter did not reach {count}")


def _qemu(sandbox: Sandbox) -> int:
    record = json.loads((Path(os.environ["RORQUAL_HOME"]) / "sandboxes" / sandbox.id / "spec.json").read_text())
    for process in below(record["running"]["processes"][0]["pid"]):
        name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        if name.startswith("qemu-system"):
            return process.pid
    raise AssertionError("no QEMU below the keeper")


def test_the_guest_has_a_kernel_of_its_own_and_nothing_that_leads_out(sandbox: Sandbox) -> None:
    assert sandbox.commands.run("uname -r").stdout.strip() != os.uname().release
    assert sandbox.commands.run("ls /sys; ls /sys/fs 2>&1").stdout.count("\n") <= 1
    devices = set(sandbox.commands.run("ls /dev").stdout.split())
    assert devices <= {
        "null",
        "zero",
        "full",
        "random",
        "urandom",
        "tty",
        "pts",
        "ptmx",
        "shm",
        "fd",
        "stdin",
        "stdout",
        "stderr",
    }
    interfaces = sandbox.commands.run("cat /proc/net/dev").stdout
    assert re.findall(r"^\s*(\w+):", interfaces, re.MULTILINE) == ["lo"]
    assert sandbox.commands.run("mknod /tmp/vda b 254 0 || echo refused").stdout == "refused\n"


def test_qemu_stands_within_walls(sandbox: Sandbox) -> None:
    status = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{_qemu(sandbox)}/status").read_text(), re.MULTILINE))
    assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapInh"], 16) == 0
    if os.geteuid() == 0:
        assert int(status["Uid"].split()[0]) >= 200_000 and int(status["CapBnd"], 16) == 0
    for space in ("net", "mnt", "pid", "ipc"):
        assert os.readlink(f"/proc/{_qemu(sandbox)}/ns/{space}") != os.readlink(f"/proc/self/ns/{space}")
    assert "without capabilities" in sandbox.info().enforced["vmm"] or os.geteuid() != 0


def test_a_second_machine_starts_from_the_template(sandbox: Sandbox) -> None:
    before = {path: path.stat().st_mtime_ns for path in template.folder().glob("*/manifest.json")}
    assert before
    with Sandbox.create(**need(SMALL)) as other:
        assert {path: path.stat().st_mtime_ns for path in template.folder().glob("*/manifest.json")} == before
        uptimes = [float(one.commands.run("cut -d' ' -f1 /proc/uptime").stdout) for one in (sandbox, other)]
        ids = [one.commands.run("cat /etc/machine-id /proc/sys/kernel/hostname").stdout for one in (sandbox, other)]
        assert uptimes[1] < 60 and ids[0] != ids[1]


def test_machines_share_their_templates_memory_and_none_can_write_to_it(sandbox: Sandbox) -> None:
    if share.sharing(BINARY, qemu_version()) is None:
        pytest.skip("this QEMU cannot map a file that it may only read")
    fill = "head -c 8M /dev/urandom > /dev/shm/own; sha256sum < /dev/shm/own"
    with Sandbox.create(**need(SMALL)) as other:
        made = [
            path for path in template.folder().glob(f"*/{share.NAME}") if path.stat().st_ino == _memory(other).inode
        ]
        assert len(made) == 1 and _memory(sandbox).inode == _memory(other).inode
        before = snapshot.digest_of(made[0])
        digests = [one.commands.run(fill, check=True).stdout for one in (sandbox, other)]
        assert digests[0] != digests[1]
        again = [one.commands.run("sha256sum < /dev/shm/own; rm /dev/shm/own").stdout for one in (sandbox, other)]
        assert again == digests and snapshot.digest_of(made[0]) == before
        for one in (sandbox, other):
            found = _memory(one)
            assert found.shared_kb > 16_000, "most pages of the template are not shared"
            assert "p" in found.flags and found.opened & os.O_ACCMODE == os.O_RDONLY
        if os.geteuid() == 0:
            with pytest.raises(PermissionError):  # by QEMU's own user, past every library
                _open_as(int(Path(f"/proc/{_qemu(other)}/status").read_text().split("Uid:")[1].split()[0]), made[0])


class _Memory(NamedTuple):
    """The mapping of a template's memory in a QEMU. opened: flags of its descriptor."""

    inode: int
    flags: str
    shared_kb: int
    opened: int


def _memory(sandbox: Sandbox) -> _Memory:
    process = Path(f"/proc/{_qemu(sandbox)}")
    lines = (process / "smaps").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith(share.NAME))
    words = lines[at].split()
    sizes = dict(line.split(":", 1) for line in lines[at + 1 : at + 20])
    shared = sum(int(sizes[name].split()[0]) for name in ("Shared_Clean", "Shared_Dirty"))
    descriptor = next(one for one in (process / "fd").iterdir() if os.readlink(one).endswith(share.NAME))
    opened = re.search(r"flags:\s*(\d+)", (process / "fdinfo" / descriptor.name).read_text())
    assert opened is not None
    return _Memory(int(words[4]), words[1], shared, int(opened[1], 8))


def _open_as(uid: int, path: Path) -> None:
    code = "import os, sys; os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1])); os.open(sys.argv[2], os.O_RDWR)"
    # through a descriptor, since its folders are shut to that user
    with open(path, "rb") as file:
        words = [sys.executable, "-c", code, str(uid), f"/proc/self/fd/{file.fileno()}"]
        done = subprocess.run(words, capture_output=True, text=True, pass_fds=[file.fileno()])
    if "PermissionError" in done.stderr:
        raise PermissionError(done.stderr.splitlines()[-1])
    raise AssertionError(f"it could be opened for writing: {done.stderr}")


def test_copies_go_on_where_the_original_was_and_share_no_secret(sandbox: Sandbox, counting: Snapshot) -> None:
    seen = []
    for _ in range(2):
        with Sandbox.create(**need(SMALL), snapshot=counting) as copy:
            assert copy.files.read("/tmp/kept") == "before"
            first = _wait_for(copy, 3)
            assert _wait_for(copy, first + 2) > first, "its process did not go on counting"
            drift = abs(float(copy.commands.run("date +%s.%N").stdout) - time.time())
            assert drift < 5, "the clock stands at the time of the snapshot"
            random = "head -c 16 /dev/urandom | od -An -tx1; cat /etc/machine-id /proc/sys/kernel/hostname"
            seen += copy.commands.run(random).stdout.splitlines()
            copy.files.write("/tmp/kept", "changed in a copy")
    assert len(seen) == 6 and len(set(seen)) == 6
    assert sandbox.files.read("/tmp/kept") == "before"


def test_a_copy_of_another_shape_is_refused(counting: Snapshot) -> None:
    with pytest.raises(SandboxError, match="memory_mb: 512 then, 768 now"):
        Sandbox.create(**need(SMALL), snapshot=counting, memory_mb=768)


def test_paused_to_the_disk_it_has_no_process_and_comes_back(sandbox: Sandbox) -> None:
    handle = sandbox.commands.start(COUNTER, timeout=None)
    _wait_for(sandbox, 2)
    qemu = _qemu(sandbox)
    sandbox.pause(keep_memory=False)
    assert not Path(f"/proc/{qemu}").exists()
    sandbox.resume()
    first = _wait_for(sandbox, 2)
    assert _wait_for(sandbox, first + 2) > first
    handle.kill()
    assert _qemu(sandbox) != qemu


def test_a_disk_snapshot_keeps_deletions_links_and_owners(sandbox: Sandbox) -> None:
    sandbox.commands.run(
        "cd ~ && mkdir -p d && echo one > d/a && ln d/a d/hard && ln -s a d/soft && mkfifo d/fifo && chmod 640 d/a && "
        "printf x > \"$(printf 'odd\\nname')\" && truncate -s 8M d/sparse",
        check=True,
    )
    taken = sandbox.snapshot("disk")
    store = Store()
    names = {b"/".join(entry.path): entry for entry in store.tree(taken.digest).entries()}
    assert names[b"home/agent/d/a"].attributes.uid == 1000 and names[b"home/agent/d/a"].attributes.mode == 0o640
    assert names[b"home/agent/d/a"].links == 2 and b"home/agent/odd\nname" in names
    assert {b"home/agent/d/soft", b"home/agent/d/fifo", b"home/agent/d/sparse"} <= set(names)
    with Sandbox.create(**need(SMALL), snapshot=taken, create_timeout=120) as other:
        told = other.commands.run("cd ~/d && cat hard soft && stat -c '%U %a %h' a && stat -c %s sparse").stdout
        assert told == "one\none\nagent 640 2\n8388608\n"
        other.commands.run("rm -r ~/d && mkdir ~/d && echo new > ~/d/new", check=True)
        again = other.snapshot("disk")
    seen = {b"/".join(entry.path): entry for entry in store.tree(again.digest).entries()}
    assert seen[b"home/agent/d"].is_opaque and b"home/agent/d/new" in seen


def test_limits_hold_inside() -> None:
    with Sandbox.create(**need(SMALL), disk_mb=48, memory_mb=192, pids=24, create_timeout=120) as sandbox:
        full = sandbox.commands.run("head -c 100M /dev/zero > /tmp/fill", timeout=60)
        assert "No space left" in full.stderr
        sandbox.commands.run("rm -f /tmp/fill")
        bomb = sandbox.commands.run("i=0; while [ $i -lt 60 ]; do sleep 3 & i=$((i+1)); done; wait", timeout=60)
        assert "fork" in bomb.stderr.lower() and not bomb.timed_out
        hog = sandbox.commands.run("dd if=/dev/zero of=/dev/null bs=1G count=1", timeout=60)
        assert hog.exit_code != 0
        assert sandbox.commands.run("echo alive").stdout == "alive\n"


def test_a_dead_qemu_is_told_as_such() -> None:
    made = Sandbox.create(**need(SMALL))
    try:
        os.kill(_qemu(made), 9)
        with pytest.raises(Gone) as caught:
            for _ in range(50):
                made.commands.run("true", timeout=5)
                time.sleep(0.1)
        assert caught.value.reason == "crashed"
    finally:
        made.close()
    assert traces(made.id) == []


def test_network_is_not_promised() -> None:
    with pytest.raises(Unsupported, match="no network"):
        Sandbox.create(**need(SMALL), network=["pypi"])
