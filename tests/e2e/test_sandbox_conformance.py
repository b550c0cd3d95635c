"""The same program on every kind of sandbox: C1 to C15 of the specification, each over every driver that works here."""

import asyncio
import os
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes import CASES, is_full_machine, need, traces

from rorqual import AsyncSandbox, Sandbox
from rorqual.errors import SandboxError
from rorqual.sandbox.commands import CommandHandle
from rorqual.sandbox.errors import CommandError, FileError, Gone, Unsupported
from rorqual.sandbox.spec import Kind
from rorqual.sandbox.wire import Fields, Tag, Type

Case = tuple[Kind, str]
pytestmark = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def sandbox(case: Case) -> Iterator[Sandbox]:
    with Sandbox.create(**need(case)) as made:
        yield made
    assert traces(made.id) == []


def test_c1_create_run_kill_leaves_nothing(case: Case) -> None:
    sandbox = Sandbox.create(**need(case))
    try:
        assert sandbox.commands.run("true").exit_code == 0
        assert traces(sandbox.id) != [], "the search for traces finds nothing even while it runs"
    finally:
        sandbox.kill()
    assert traces(sandbox.id) == []
    sandbox.kill()
    with pytest.raises(Gone) as caught:
        sandbox.commands.run("true")
    assert caught.value.reason == "closed"
    with pytest.raises(Gone):
        Sandbox.connect(sandbox.id)


def test_c2_output_exit_code_and_signal(sandbox: Sandbox) -> None:
    result = sandbox.commands.run("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code, result.signal) == ("out\n", "err\n", 3, None)
    killed = sandbox.commands.run("kill -TERM $$")
    assert (killed.exit_code, killed.signal, killed.timed_out) == (128 + 15, 15, False)
    every_byte = sandbox.commands.run('i=0; while [ $i -lt 256 ]; do printf "\\\\$(printf %03o $i)"; i=$((i+1)); done')
    assert every_byte.stdout_bytes == bytes(range(256))
    empty = sandbox.commands.run(["true"])
    assert (empty.stdout_bytes, empty.stderr_bytes, empty.truncated_bytes) == (b"", b"", {"stdout": 0, "stderr": 0})
    heard: list[str] = []
    absent = sandbox.commands.run(["no-such-program"], on_stderr=heard.append)
    assert absent.exit_code == 127 and "No such file" in absent.stderr and "".join(heard) == absent.stderr
    with pytest.raises(CommandError, match="exit code 4") as caught:
        sandbox.commands.run("echo before; exit 4", check=True)
    assert caught.value.result.stdout == "before\n"


def test_c3_files_go_in_and_come_back(sandbox: Sandbox, tmp_path: Path, case: Case) -> None:
    largest = 4 << 20 if is_full_machine(case) else 32 << 20
    for size in (0, 1, 262_144, 262_145, largest):
        data = os.urandom(min(size, 65536)) * (size // 65536 + 1)
        sandbox.files.write("sub/data", data[:size])
        assert sandbox.files.read("sub/data", format="bytes") == data[:size]
    assert sandbox.files.read("sub/data", format="bytes", offset=5, limit=7) == data[5:12]
    for name in ("with space", "line\nbreak", "\udcff\udcfe", "-rf", "ünï"):
        sandbox.files.write(f"names/{name}", name.encode("utf-8", "surrogateescape"))
    listed = {info.path for info in sandbox.files.list("names")}
    assert listed == {"with space", "line\nbreak", "\udcff\udcfe", "-rf", "ünï"}
    sandbox.files.write("made/by/client", "x")  # belongs to whoever runs the commands
    assert sandbox.commands.run("echo y >> made/by/client && touch made/by/command made/other").exit_code == 0
    sandbox.files.write("sub/log", "a")
    sandbox.files.write("sub/log", "b", append=True)
    assert sandbox.files.read("sub/log") == "ab"
    sandbox.files.move("sub/log", "sub/moved")
    assert not sandbox.files.exists("sub/log") and sandbox.files.stat("sub/moved").size == 2
    (tmp_path / "tree" / "in").mkdir(parents=True)
    (tmp_path / "tree" / "in" / "x").write_bytes(b"\0x")
    (tmp_path / "tree" / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "tree" / "run.sh").chmod(0o755)
    (tmp_path / "tree" / "link").symlink_to("in/x")
    assert sandbox.files.upload(tmp_path / "tree", "tree") == 2
    assert sandbox.commands.run("tree/run.sh && readlink tree/link").stdout == "ran\nin/x\n"
    back = sandbox.files.download("tree", tmp_path / "back")
    assert sorted(path.relative_to(tmp_path / "back").as_posix() for path in back) == ["in/x", "run.sh"]
    assert (tmp_path / "back" / "link").readlink() == Path("in/x")
    assert (tmp_path / "back" / "run.sh").stat().st_mode & 0o777 == 0o600
    sandbox.files.remove("tree", recursive=True)
    with pytest.raises(FileError) as caught:
        sandbox.files.read("tree/run.sh")
    assert caught.value.errno == 2


def test_c4_terminal(sandbox: Sandbox) -> None:
    terminal = sandbox.pty.open(cols=100, rows=40, env={"PS1": "> "})
    terminal.write("stty size\n")
    text = _until(terminal, b"40 100")
    terminal.resize(120, 50)
    terminal.write("stty size\n")
    text += _until(terminal, b"50 120")
    terminal.write("sleep 1000\n")
    _until(terminal, b"sleep 1000")
    time.sleep(0.2)
    terminal.write(b"\x03")
    terminal.write("exit 7\n")
    assert terminal.wait(30).exit_code == 7
    assert terminal.read(5) is not None
    other = sandbox.pty.open(shell=["sleep", "1000"])
    other.kill()
    assert other.wait(30).signal == 9


def _until(terminal: object, wanted: bytes) -> bytes:
    text = b""
    while wanted not in text:
        text += terminal.read(30)  # type: ignore[attr-defined]
    return text


def test_c5_folder_environment_user_and_input(case: Case) -> None:
    os.environ["RORQUAL_CANARY"] = "of the host"
    try:
        with Sandbox.create(**need(case), env={"ONE": "1", "BOTH": "sandbox"}) as sandbox:
            run = sandbox.commands.run
            assert run("pwd", cwd="/tmp").stdout == "/tmp\n"
            assert run("pwd").stdout == "/home/agent\n"
            assert run("echo $ONE $BOTH $TWO", env={"BOTH": "call", "TWO": "2"}).stdout == "1 call 2\n"
            names = {line.partition("=")[0] for line in run(["env"]).stdout.splitlines()}
            assert names <= {"ONE", "BOTH", "PATH", "HOME", "LANG", "TERM", "PWD", "SHLVL", "_"}
            assert run("id -un; id -u").stdout == "agent\n1000\n"
            assert run("cat; echo end", stdin="line\n").stdout == "line\nend\n"
            large = os.urandom(1 << 20)
            assert run(["cat"], stdin=large, max_output=4 << 20).stdout_bytes == large
            assert run(["head", "-c", "3"], stdin=large).stdout_bytes == large[:3]
            assert run("cat").stdout == ""
            assert run("pwd", cwd="/no/such").exit_code != 0
    finally:
        del os.environ["RORQUAL_CANARY"]


def test_c6_a_handle_outlives_its_client(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    plain = CommandHandle._event

    def event(handle: CommandHandle, kind: int, fields: Fields) -> None:
        if kind == Type.OUTPUT:
            sent.append(fields.number(Tag.OFFSET))
        plain(handle, kind, fields)

    first = Sandbox.create(**need(case))
    try:
        handle = first.commands.start("echo one; while [ ! -e go ]; do sleep 0.05; done; echo two; exit 5")
        heard: list[str] = []
        while not any(entry["stdout_bytes"] for entry in first.commands.list()):
            time.sleep(0.02)
        first.detach()
        second = Sandbox.connect(first.id)
        monkeypatch.setattr(CommandHandle, "_event", event)
        again = second.commands.attach(handle.id, offset=2, on_stdout=heard.append)
        second.files.write("go", "")
        result = again.wait(30)
        assert (result.exit_code, result.stdout, "".join(heard)) == (5, "one\ntwo\n", "e\ntwo\n")
        assert sent[0] == 2, "what this client did not ask for was sent all the same"
        assert second.commands.read(handle.id, offset=4) == (4, b"two\n")
        with pytest.raises(SandboxError, match="no command"):
            second.commands.attach("nobody")
    finally:
        Sandbox.end(first.id)
    assert traces(first.id) == []


def test_c7_state_stays_between_calls(sandbox: Sandbox) -> None:
    sandbox.commands.run("echo kept > file; mkdir -p a/b")
    sandbox.commands.run("nohup sh -c 'while :; do date > beat; sleep 0.05; done' > /dev/null 2>&1 &")
    assert sandbox.commands.run("cat file").stdout == "kept\n"
    sandbox.commands.run("rm -f beat; while [ ! -e beat ]; do sleep 0.02; done", timeout=20, check=True)
    with sandbox.commands.session() as session:
        session.run("cd a/b; X=5; f() { echo f$X; }")
        assert session.run("pwd; f").stdout == "/home/agent/a/b\nf5\n"
        assert session.run("(exit 9)").exit_code == 9
        assert session.run("echo oops >&2; false").stderr == "oops\n"
    assert sandbox.commands.run("echo ${X:-unset}; pwd").stdout == "unset\n/home/agent\n"


def test_c8_a_timeout_ends_the_whole_tree(sandbox: Sandbox) -> None:
    program = """trap '' TERM HUP INT
echo before
sh -c 'trap "" TERM HUP; while :; do echo x >> beats; sleep 0.02; done' &
setsid sh -c 'trap "" TERM HUP; (while :; do echo y >> beats; sleep 0.02; done) &' &
sleep 1000"""
    start = time.monotonic()
    result = sandbox.commands.run(program, timeout=3)
    assert result.timed_out and result.stdout == "before\n" and result.exit_code == 137
    assert time.monotonic() - start < 3 + 5
    first = sandbox.files.stat("beats").size
    time.sleep(0.3)
    assert first > 0 and sandbox.files.stat("beats").size == first, "something of the tree still runs"
    with pytest.raises(CommandError, match="timeout of 2 s") as caught:
        sandbox.commands.run("echo part; sleep 100", timeout=2, check=True)
    assert caught.value.result.stdout == "part\n"


def test_c9_a_flood_is_bounded(sandbox: Sandbox, case: Case) -> None:
    amount = 1_000_000_000 if is_full_machine(case) else 10_000_000_000
    if os.environ.get("RORQUAL_TEST_FULL", "0") == "0":
        amount //= 20
    result = sandbox.commands.run(f"yes | head -c {amount}; echo; echo END", max_output=100_000, timeout=300)
    assert result.exit_code == 0 and len(result.stdout_bytes) == 100_000
    assert result.stdout.startswith("y\ny\n") and result.stdout.endswith("\nEND\n")
    assert result.truncated_bytes["stdout"] == amount + 5 - 100_000
    assert sandbox.metrics()["memory_bytes"] < 600 << 20
    one_line = sandbox.commands.run("head -c 3000000 /dev/zero", max_output=10_000)
    assert len(one_line.stdout_bytes) == 10_000 and one_line.truncated_bytes["stdout"] == 2_990_000


@pytest.mark.slow
def test_c10_idle_lifetime_and_paused_times(case: Case) -> None:
    def ends(reason: str, **times: float) -> None:
        sandbox = Sandbox.create(**need(case), **times)  # type: ignore[arg-type]
        try:
            if reason == "paused":
                try:
                    sandbox.pause()
                except Unsupported:
                    return
            end = time.monotonic() + 60
            while time.monotonic() < end:
                try:
                    sandbox.info()
                    sandbox.commands.list() if reason == "idle" else None  # looking is not use
                except Gone as gone:
                    assert gone.reason == reason
                    break
                time.sleep(0.1)
            else:
                raise AssertionError(f"the sandbox did not end by {reason}")
        finally:
            sandbox.close()
        assert traces(sandbox.id) == []

    ends("idle", idle_ttl=1.0)
    ends("lifetime", max_lifetime=1.5)
    ends("paused", paused_ttl=1.0)
    with Sandbox.create(**need(case), idle_ttl=6) as used:
        for _ in range(4):
            time.sleep(1.7)
            used.commands.run("true")
        used.set_ttl(idle=60)
        time.sleep(6.3)
        assert used.commands.run("echo here").stdout == "here\n"


@pytest.mark.slow
def test_c11_pause_stops_clocks_and_any_use_wakes(sandbox: Sandbox) -> None:
    handle = sandbox.commands.start("while :; do echo x >> beats; sleep 0.02; done", timeout=5)
    while not sandbox.files.exists("beats"):
        time.sleep(0.02)
    try:
        sandbox.pause()
    except Unsupported as refusal:
        assert refusal.capability == "pause_memory" and not sandbox.info().capabilities.pause_memory
        return
    assert sandbox.info().state == "paused"
    with pytest.raises(SandboxError, match="paused"):
        sandbox.commands.list()
    assert sandbox.info().state == "paused", "looking woke it"
    time.sleep(5.5)  # longer than its timeout
    sandbox.pause()
    before = sandbox.files.stat("beats").size
    assert sandbox.info().state == "ready"
    assert not sandbox.files.exists("nothing")
    grown = _grows(sandbox, before)
    result = handle.wait(60)
    assert grown and result.timed_out
    assert 4900 < result.duration_ms < 10_000, "the time it was paused counted"


def _grows(sandbox: Sandbox, before: int) -> bool:
    for _ in range(100):
        if sandbox.files.stat("beats").size > before:
            return True
        time.sleep(0.02)
    return False


def test_c12_snapshot_restore_fork_and_rollback(sandbox: Sandbox, case: Case) -> None:
    if not sandbox.info().capabilities.snapshot_disk:
        with pytest.raises(Unsupported) as caught:
            sandbox.snapshot()
        assert caught.value.capability == "snapshot_disk"
        return
    sandbox.commands.run("mkdir d; echo one > d/f; echo gone > d/g; ln -s f d/l; chmod 750 d")
    sandbox.commands.run("rm d/g")
    taken = sandbox.snapshot()
    sandbox.commands.run("echo two > d/f; rm d/l; touch later")
    with Sandbox.create(**need(case), snapshot=taken) as restored:
        assert restored.commands.run("cat d/f d/l; ls d; stat -c %a d").stdout == "one\none\nf\nl\n750\n"
        assert restored.commands.run("echo three >> d/f").exit_code == 0
        second = restored.snapshot()
    with Sandbox.create(**need(case), snapshot=second.id) as chained:
        assert chained.commands.run("cat d/f").stdout == "one\nthree\n"
    copies = sandbox.fork(2 if is_full_machine(case) else 8)
    try:
        assert {copy.files.read("d/f") for copy in copies} == {"two\n"}, "a fork has the files as they are now"
        for index, copy in enumerate(copies):
            copy.files.write("d/f", f"{index}")
        assert [copy.files.read("d/f") for copy in copies] == [str(index) for index in range(len(copies))]
        assert len({copy.commands.run("cat /etc/machine-id; hostname").stdout for copy in copies}) == len(copies)
    finally:
        for copy in copies:
            copy.close()
    assert sandbox.files.read("d/f") == "two\n"
    sandbox.rollback(taken)
    assert sandbox.commands.run("cat d/f; ls later").stdout == "one\n"
    assert sandbox.info().incarnation == 2


def test_c13_full_snapshot(sandbox: Sandbox, case: Case) -> None:
    if not sandbox.info().capabilities.snapshot_memory:
        with pytest.raises(Unsupported) as caught:
            sandbox.snapshot("full")
        assert caught.value.capability == "snapshot_memory"
        return
    handle = sandbox.commands.start("i=0; while :; do i=$((i+1)); echo $i > count; sleep 0.05; done")
    while not sandbox.files.exists("count"):
        time.sleep(0.02)
    taken = sandbox.snapshot("full")
    with Sandbox.create(**need(case), snapshot=taken) as restored:
        assert handle.id in {entry["id"] for entry in restored.commands.list()}
        before = int(restored.files.read("count") or 0)
        time.sleep(0.5)
        assert int(restored.files.read("count") or 0) > before


def test_c14_what_cannot_be_kept_is_refused(case: Case) -> None:
    arguments = need(case)
    with pytest.raises(SandboxError, match="too little"):
        Sandbox.create(**arguments, memory_mb=1)
    with pytest.raises(SandboxError, match="there is no image"):
        Sandbox.create(**arguments, image="no-such-image")
    with Sandbox.create(**arguments) as sandbox:
        info = sandbox.info()
        assert info.network == "none" and info.driver == arguments["driver"]
        assert {"memory", "pids", "cpu", "disk"} <= set(info.enforced), "a limit without a mechanism"
        with pytest.raises(SandboxError, match="no port"):
            sandbox.ports.forward(0)
    if info.isolation != "vm-hw":
        with pytest.raises(Unsupported, match="isolates by"):
            Sandbox.create(**arguments, min_isolation="vm-hw")


def test_c15_async_is_the_same_and_many_calls_run_at_once(case: Case) -> None:
    arguments = need(case)
    calls = 24 if is_full_machine(case) else 200

    async def many() -> list[str]:
        async with await AsyncSandbox.create(**arguments) as sandbox:  # type: ignore[arg-type]
            with pytest.raises(SandboxError, match="inside a running event loop"):
                Sandbox.connect(sandbox.id)
            gate = asyncio.Semaphore(16)

            async def one(number: int) -> str:
                async with gate:
                    return (await sandbox.commands.run(f"echo {number}")).stdout

            return list(await asyncio.gather(*(one(number) for number in range(calls))))

    assert asyncio.run(many()) == [f"{number}\n" for number in range(calls)]
    methods = {name for name in dir(AsyncSandbox) if not name.startswith("_")}
    assert methods <= set(dir(Sandbox)), "the synchronous client lacks some"
    for part in ("commands", "files", "pty", "ports"):
        assert part not in methods
    with Sandbox.create(**arguments) as sandbox:
        results: list[str] = []
        threads = [
            threading.Thread(target=lambda n=n: results.append(sandbox.commands.run(f"echo {n}").stdout))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [f"{n}\n" for n in range(8)]


def test_a_port_inside_is_reached_from_loopback(sandbox: Sandbox) -> None:
    if sandbox.commands.run("command -v python3").exit_code:
        pytest.skip("no Python inside to listen with")
    sandbox.files.write("index.html", "from inside " * 50_000)
    sandbox.commands.start(["python3", "-m", "http.server", "8000"])
    forward = sandbox.ports.forward(8000)
    assert forward.host == "127.0.0.1"
    for _ in range(100):
        try:
            with urllib.request.urlopen(f"http://{forward.address}/", timeout=5) as answer:
                assert answer.read() == b"from inside " * 50_000
                break
        except OSError:
            time.sleep(0.1)
    else:
        raise AssertionError("nothing answered")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", forward.address)
    forward.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{forward.address}/", timeout=5)
