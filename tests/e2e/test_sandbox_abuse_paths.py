"""S4, S8, S10 and S12: paths that lead astray, replaced programs, what is left for the grader, clones."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from abuse import CASES, PLACE, arm
from full import often
from sandboxes import Shared, is_full_machine, need

from rorqual import Sandbox
from rorqual.errors import SandboxError
from rorqual.sandbox.drivers import driver as driver_named
from rorqual.sandbox.errors import FileError, PolicyRejected
from rorqual.sandbox.home import Home
from rorqual.sandbox.spec import Kind

Case = tuple[Kind, str]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    if found in (("vm", "qemu-tcg"), ("function", "zygote")) and not often(0, 1):
        pytest.skip("another kind through the same driver has this; RORQUAL_TEST_FULL=1 runs it here too")
    need(found)
    return found


@pytest.fixture(scope="module")
def shared(case: Case) -> Iterator[Shared]:
    made = Shared(lambda: arm(Sandbox.create(**need(case))))
    yield made
    made.close()


@pytest.fixture
def sandbox(shared: Shared, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with shared.lent(request) as made:
        yield made


def leads_out(folder: Path) -> list[str]:
    """What in a folder of the host is, or leads to, something outside of it."""
    top = folder.resolve()
    return [str(path) for path in folder.rglob("*") if not path.resolve().is_relative_to(top)]


HOSTILE_LINKS = {
    "absolute": ["ln -s /etc/passwd t/x"],
    "upward": ["ln -s ../../../../etc/passwd t/x"],
    "through a link to itself": ["ln -s . t/d", "ln -s d/d/d/d/d/d/../../../../../../etc/passwd t/x"],
    "through a folder's link": ["mkdir -p t/a/b", "ln -s a/b t/l", "ln -s l/../../../x t/x"],
    "upward below": ["mkdir -p t/a", "ln -s ../../x t/a/x"],
}


@pytest.mark.parametrize("how", HOSTILE_LINKS)
def test_s4_links_that_lead_out_are_not_downloaded(sandbox: Sandbox, how: str, tmp_path: Path) -> None:
    made = sandbox.commands.run("cd /tmp; rm -rf t; mkdir t; echo 1 >t/honest; " + "; ".join(HOSTILE_LINKS[how]))
    assert made.exit_code == 0, made.stderr
    with pytest.raises(PolicyRejected, match="out of the tree"):
        sandbox.files.download("/tmp/t", tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_s4_control_a_plain_copy_of_such_links_leads_out(tmp_path: Path) -> None:
    os.symlink(".", tmp_path / "d")
    os.symlink("d/d/d/d/d/d/d/d/../../../../../../../../etc/passwd", tmp_path / "x")
    assert leads_out(tmp_path) == [str(tmp_path / "x")]


def test_s4_an_honest_tree_with_links_comes_back(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.commands.run(
        "cd /tmp; rm -rf t; mkdir -p t/a/b; echo 1 >t/a/f; ln -s ../f t/a/b/up; ln -s a/f t/down; ln -s a t/dir"
    )
    sandbox.files.download("/tmp/t", tmp_path / "here")
    assert leads_out(tmp_path / "here") == []
    for name in ("a/b/up", "down", "dir/f"):
        assert (tmp_path / "here" / name).read_text() == "1\n"


@pytest.mark.parametrize("what", ["mkfifo t/x", "mkfifo t/deep/x"])
def test_s4_pipes_and_devices_are_not_downloaded(sandbox: Sandbox, what: str, tmp_path: Path) -> None:
    sandbox.commands.run(f"cd /tmp; rm -rf t; mkdir -p t/deep; echo 1 >t/honest; {what}")
    with pytest.raises(PolicyRejected, match="fifo"):
        sandbox.files.download("/tmp/t", tmp_path / "here")
    with pytest.raises(FileError):
        sandbox.files.read("/tmp/t/x" if "deep" not in what else "/tmp/t/deep/x")
    assert not (tmp_path / "here").exists()


def test_s4_set_id_bits_and_hard_links_do_not_come_back(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.commands.run("cd /tmp; rm -rf t; mkdir t; cp /bin/true t/s; chmod 6755 t/s; ln t/s t/hard")
    sandbox.files.download("/tmp/t", tmp_path / "here")
    found = [path.stat() for path in (tmp_path / "here").iterdir()]
    assert len(found) == 2 and all(s.st_mode & 0o7777 == 0o600 and s.st_nlink == 1 for s in found)


def test_s4_deep_and_long_trees_are_refused_not_followed(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.commands.run("cd /tmp; rm -rf t; mkdir -p " + "t/" + "d/" * 90)
    with pytest.raises(SandboxError):
        sandbox.files.download("/tmp/t", tmp_path / "here")
    assert not (tmp_path / "here").exists()
    sandbox.files.list("/tmp/t", depth=100_000)
    sandbox.files.remove("/tmp/t", recursive=True)


def test_s4_symlink_races_never_reach_a_path_of_the_host(sandbox: Sandbox, case: Case, tmp_path: Path) -> None:
    """1,000 tries: inside, a name is now a file, now a folder, now a link to where the host keeps a canary."""
    canary = tmp_path / "canary"
    canary.write_text("of the host")
    target = f"{tmp_path}/canary"
    sandbox.commands.run(f"mkdir -p /tmp/r {tmp_path}; echo of the sandbox >{target}")
    flip = (
        f"cd /tmp/r; while :; do echo a >n; ln -sf {target} m; mv -T m n 2>/dev/null; rm -rf n; "
        f"ln -s {tmp_path} n; rm -f n; mkdir n; echo b >n/canary; rm -rf n; done"
    )
    racing = sandbox.commands.start(flip)
    seen = set()
    tries = 40 if is_full_machine(case) else often(150, 1000)
    for number in range(tries):
        for act in (
            lambda: seen.add(sandbox.files.read("/tmp/r/n")),
            lambda: seen.add(sandbox.files.read("/tmp/r/n/canary")),
            lambda: sandbox.files.write("/tmp/r/n", "overwritten", mkdirs=False),
            lambda: sandbox.files.download("/tmp/r", tmp_path / "got"),
        )[number % 4 : number % 4 + 1]:
            try:
                act()
            except (SandboxError, OSError):
                continue
    racing.kill()
    assert canary.read_text() == "of the host" and "of the host" not in seen
    assert leads_out(tmp_path / "got") == [] if (tmp_path / "got").exists() else True


def test_s4_control_a_host_that_joins_paths_loses_the_race(tmp_path: Path) -> None:
    """The same change of names, in the moment between the look and the opening of code that does both by path."""
    name, spare, canary = tmp_path / "n", tmp_path / "spare", tmp_path / "canary"
    canary.write_text("of the host")
    name.write_text("of the sandbox")
    assert not name.is_symlink()
    spare.symlink_to(canary)
    spare.replace(name)
    seen = {name.read_text()}
    name.write_text("overwritten")
    assert "of the host" in seen and canary.read_text() != "of the host"


REPLACE = r"""
fake() {
    rm -f "$1" 2>/dev/null
    printf '#!%s loop\necho FOOLED\nexit 0\n' /usr/bin/env >"$1" 2>/dev/null && chmod 755 "$1"
}
rm -f /bin 2>/dev/null && mkdir /bin 2>/dev/null
for name in sh bash ls cat stat id; do fake /bin/$name; fake /usr/bin/$name; fake /usr/local/bin/$name; done
echo /tmp/evil.so >/etc/ld.so.preload
echo 'agent:x:0:0::/nowhere:/bin/false' >/etc/passwd
echo 'LD_PRELOAD=/tmp/evil.so' >/etc/environment
exit 0
"""


def test_s8_replaced_programs_fool_neither_the_agent_nor_another_sandbox(case: Case, sandbox: Sandbox) -> None:
    """Root inside replaces all it can; what the host asks of the agent needs none of it, no other sandbox has any."""
    neighbour, before = sandbox, Path("/bin/bash").stat()
    with Sandbox.create(**need(case), user="root") as sandbox:
        arm(sandbox)
        sandbox.files.write("/tmp/truth", "yes")
        sandbox.commands.run(["/bin/sh", "-c", REPLACE])
        fooled = sandbox.commands.run(["ls", "/tmp"], env={"PATH": "/bin:/usr/local/bin:/usr/bin"})
        assert "truth" not in fooled.stdout, "the attack failed, so that nothing is shown"
        assert "truth" in {info.path for info in sandbox.files.list("/tmp")}
        assert sandbox.files.read("/tmp/truth") == "yes" and sandbox.files.stat("/tmp/truth").size == 3
        sandbox.files.write("/tmp/made/after", "x")
        assert sandbox.files.exists("/tmp/made/after")
        static = sandbox.commands.run([PLACE, "descriptors", "10"])
        assert static.stdout == "descriptors\t10\n"
    assert neighbour.commands.run(["bash", "-c", "echo mine"]).stdout == "mine\n"
    with Sandbox.create(**need(case)) as fresh:
        assert fresh.commands.run("ls /tmp /etc/ld.so.preload; id -un").stdout.split()[-1] in ("agent", "root")
        assert not fresh.files.exists("/etc/ld.so.preload")
        assert "FOOLED" not in fresh.commands.run("bash -c 'echo real'; cat /bin/sh | head -c 30").stdout
    after = Path("/bin/bash").stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)


LURK = """
while :; do
    for f in /grade/* /tmp/grade/*; do [ -e $f ] && cp $f /tmp/stolen && echo pass >/tmp/verdict; done
    sleep 0.02
done
"""


def graded(sandbox: Sandbox) -> tuple[str, int, bool]:
    """What a grader that puts its test into the sandbox sees: verdict, other processes, whether the test was taken."""
    sandbox.files.write("/tmp/grade/test.sh", "sleep 0.3; cat /tmp/verdict 2>/dev/null || echo fail")
    verdict = sandbox.commands.run("sh /tmp/grade/test.sh", timeout=20).stdout.strip()
    count = sandbox.commands.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '[f] in /grade'").stdout.strip()
    return verdict, int(count or 0), sandbox.files.exists("/tmp/stolen")


def test_s10_a_process_left_behind_cannot_touch_the_verification(sandbox: Sandbox, case: Case) -> None:
    if not driver_named(*case).capabilities().snapshot_disk:
        pytest.skip(f"{case[1]} takes no snapshots, so that there is no fresh fork to verify in")
    sandbox.commands.run("rm -rf /tmp/verdict /tmp/stolen /tmp/grade")
    lurking = sandbox.commands.start(["sh", "-c", LURK])
    [fork] = sandbox.fork()
    with fork:
        assert graded(fork) == ("fail", 0, False)
        assert not sandbox.files.exists("/tmp/grade/test.sh") and not sandbox.files.exists("/tmp/stolen")
    verdict, others, taken = graded(sandbox)  # the control: in the agent's own sandbox the same grader is betrayed
    lurking.kill()
    assert (verdict, taken) == ("pass", True) and others > 0
    sandbox.commands.run("rm -rf /tmp/verdict /tmp/stolen /tmp/grade")


def identity(sandbox: Sandbox) -> dict[str, str]:
    """What two clones must not share."""
    look = "head -c 16 /dev/urandom | od -An -tx1; cat /etc/machine-id /proc/sys/kernel/random/uuid; uname -n"
    lines = sandbox.commands.run(look).stdout.split("\n")
    running = Home.find(sandbox.id).read().running
    assert running is not None
    return dict(zip(("random", "machine-id", "uuid", "host name"), lines, strict=False)) | {"secret": running.secret}


def test_s12_clones_share_neither_chance_nor_names_nor_keys(sandbox: Sandbox, case: Case) -> None:
    if not driver_named(*case).capabilities().snapshot_disk:
        pytest.skip(f"{case[1]} takes no snapshots")
    sandbox.files.write("/tmp/common", "copied")
    clones = sandbox.fork(2)
    try:
        seen = [identity(one) for one in (sandbox, *clones)]
        assert all(len({one[name] for one in seen}) == 3 and all(one[name].strip() for one in seen) for name in seen[0])
        assert len({one.files.read("/tmp/common") for one in clones}) == 1, "they are no clones"
    finally:
        for one in clones:
            one.close()
