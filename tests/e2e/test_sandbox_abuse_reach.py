"""S6, S7 and S9: no way out to a network, no way to the agent's channel, and no secret of the host lies inside."""

import asyncio
import os
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from abuse import CASES, PLACE, Weakened, arm, attack, breaches, on_host, weakened
from sandboxes import Shared, need

from rorqual import Sandbox
from rorqual.errors import SandboxError
from rorqual.sandbox.channel import Channel
from rorqual.sandbox.drivers import driver as driver_named
from rorqual.sandbox.errors import TransportError
from rorqual.sandbox.home import Home
from rorqual.sandbox.spec import Kind
from rorqual.sandbox.wire import CLIENT, MAGIC, Tag, Type, frame, pack

Case = tuple[Kind, str]
OUTSIDE = [
    "tcp:169.254.169.254:80",
    "tcp:100.100.100.200:80",
    "udp:8.8.8.8:53",
    "udp:169.254.169.253:53",
    "tcp:10.0.2.2:22",
]


@pytest.fixture(scope="module")
def services() -> Iterator[list[str]]:
    """What really listens on the host: on loopback, on its other addresses, on an abstract name and on a path."""
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="abuse-sockets-") as folder:
        found = []
        addresses = {"127.0.0.1", "127.0.0.2"}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing; only asks which address would be ours
                addresses.add(probe.getsockname()[0])
            except OSError:
                pass
        for address in sorted(addresses):
            listener = stack.enter_context(socket.create_server((address, 0)))
            found.append(f"tcp:{address}:{listener.getsockname()[1]}")
        name = f"abuse-{secrets.token_hex(6)}"
        for kind, place in (("abstract", f"\0{name}"), ("unix", f"{folder}/s")):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(place)
            listener.listen(64)
            found.append(f"{kind}:{place.strip(chr(0))}")
        os.chmod(folder, 0o755)
        os.chmod(f"{folder}/s", 0o777)
        yield found


@pytest.fixture(scope="module", params=CASES)
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    case = need(request.param)
    made = Shared(lambda: arm(Sandbox.create(**case)))
    yield made
    made.close()


@pytest.fixture
def sandbox(shared: Shared, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with shared.lent(request) as made:
        yield made


def test_s6_nothing_outside_is_reached(sandbox: Sandbox, services: list[str]) -> None:
    found = attack(sandbox, "network", *OUTSIDE, *services)
    assert len(found) == 1 + len(OUTSIDE) + len(services)
    assert breaches(found) == {}


def test_s6_names_are_not_resolved_and_loopback_is_its_own(sandbox: Sandbox, services: list[str]) -> None:
    looked = sandbox.commands.run("getent hosts example.com || echo none", timeout=20)
    assert looked.stdout.strip() in ("none", "")
    port = services[0].rpartition(":")[2]
    assert breaches(attack(sandbox, "network", f"tcp:127.0.0.1:{port}", f"tcp:0.0.0.0:{port}")) == {}


def test_s6_control_on_the_host_every_service_answers(services: list[str], tmp_path: Path) -> None:
    assert set(breaches(on_host("network", *services, cwd=tmp_path))) >= set(services)


def test_s6_control_with_the_host_network(monkeypatch: pytest.MonkeyPatch, services: list[str]) -> None:
    folder = str(Path(services[-1].partition(":")[2]).parent)
    with weakened(monkeypatch, Weakened(more=["--share-net", "--bind", folder, folder])) as sandbox:
        worked = set(breaches(attack(sandbox, "network", *services)))
    assert worked >= {name for name in services if not name.startswith("unix:")}


def test_s7_the_channel_is_out_of_reach(sandbox: Sandbox) -> None:
    for _ in range(2):  # the second time after what it sent to process 1
        found = attack(sandbox, "channel")
        assert len(found) == 5 and breaches(found) == {}
    sandbox.files.write("/tmp/still", "here")
    assert sandbox.files.read("/tmp/still") == "here"


def test_s7_control_on_the_host_sockets_are_found(services: list[str], tmp_path: Path) -> None:
    assert services
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        worked = breaches(on_host("channel", cwd=tmp_path, pass_fds=[inherited.fileno()]))
    assert set(worked) >= {"own descriptors", "others' descriptors", "named sockets"}


def test_s7_signals_to_everything_do_not_stop_the_agent(sandbox: Sandbox) -> None:
    """A command stops its own supervisor, then all there is, over and over; calls still end in time."""
    stopped = sandbox.commands.run("kill -STOP $PPID; echo done", timeout=60)
    assert (stopped.exit_code, stopped.stdout) == (0, "done\n")
    held = sandbox.commands.run("while :; do kill -STOP $PPID; done", timeout=0.5)
    assert held.timed_out
    storm = sandbox.commands.start("trap '' TERM; while :; do kill -STOP -1; done")
    sandbox.commands.run("true", timeout=1)
    sandbox.files.write("/tmp/storm", "over")
    storm.kill()
    storm.wait(timeout=60)
    assert sandbox.commands.run("cat /tmp/storm", timeout=60).stdout == "over"


@pytest.mark.slow
def test_a_command_that_is_kept_from_beginning_holds_nobody_up(sandbox: Sandbox) -> None:
    """Its own time runs all the same, and the agent serves others while it waits for it."""
    sandbox.files.write("/tmp/said", "")
    storm = sandbox.commands.start(f"exec {PLACE} storm >/tmp/said")
    until = time.monotonic() + 60
    while not sandbox.files.read("/tmp/said"):
        assert time.monotonic() < until
        time.sleep(0.02)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sandbox.commands.run, "echo ran", timeout=8)
        sandbox.files.write("/tmp/storm", "over")
        was_held = not running.done()
        result = running.result()
    assert was_held or not result.timed_out, "the agent served nobody until the command was given up"
    assert result.timed_out or result.stdout == "ran\n"
    storm.kill()
    storm.wait(timeout=60)
    assert sandbox.commands.run("cat /tmp/storm", timeout=60).stdout == "over"


def test_s7_a_pipe_in_place_of_the_list_of_users_does_not_stop_the_agent(sandbox: Sandbox) -> None:
    tried = sandbox.commands.run("cp /etc/passwd /etc/kept", timeout=60)
    assert not tried.timed_out
    able = tried.exit_code == 0
    user = None if able else "0"  # whoever may do it in this kind of sandbox
    sandbox.commands.run("cp /etc/passwd /etc/kept; rm -f /etc/passwd; mkfifo /etc/passwd", timeout=60, user=user)
    try:
        assert sandbox.files.stat("/etc/passwd").kind == "fifo"
        sandbox.files.write("/tmp/piped", "written")
        assert sandbox.commands.run("cat /tmp/piped", timeout=60).stdout == "written"
        with pytest.raises(
            SandboxError, match="could not start.*changing to its user"
        ):  # and not for want of an answer
            sandbox.commands.run("true", user="stranger", timeout=50)
    finally:
        sandbox.commands.run(["mv", "-f", "/etc/kept", "/etc/passwd"], timeout=60, user=user)


async def _hello(sandbox_id: str, secret: bytes, noise: bytes = b"") -> bool:
    """Whether an agent answers a hello with this secret."""
    home = Home.find(sandbox_id)
    record = home.read()
    assert record.running is not None
    reader, writer = await driver_named(record.spec.kind, record.driver).connect(record.running, home.path)
    writer.write(noise)
    opening = Channel.open(reader, writer, secret, record.attach_epoch, lambda kind, fields: None)
    try:
        channel = await asyncio.wait_for(opening, 1.0)
    except (TimeoutError, TransportError):
        writer.close()
        return False
    await channel.close()
    return True


def test_s7_frames_with_a_wrong_code_are_not_obeyed() -> None:
    """From the host, where the socket can be opened at all: the code decides, not the place."""
    with Sandbox.create(**need(("container", "bwrap"))) as sandbox:
        running = Home.find(sandbox.id).read().running
        assert running is not None
        secret = bytes.fromhex(running.secret)
        forged = frame(secret, 7, CLIENT, Type.POWER_OFF, 1, b"")  # sealed with the secret, but in no session
        claim = frame(b"\1" * 32, 0, CLIENT, Type.HELLO, 0, pack([(Tag.NONCE, b"n" * 16), (Tag.SECRET, b"\1" * 32)]))
        junk = MAGIC * 50 + os.urandom(5000) + MAGIC[:7]
        channel = sandbox._sandbox._link._channel
        assert not asyncio.run(_hello(sandbox.id, b"\0" * 32, forged + claim + junk))
        assert sandbox._sandbox._link._channel is channel and channel is not None and channel.open_now, "it was put out"
        assert sandbox.commands.run("echo obeys").stdout == "obeys\n"
        assert asyncio.run(_hello(sandbox.id, secret, forged + claim + junk)), "nothing would be obeyed, right or wrong"


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A secret in this process's environment, in files where hosts keep secrets, and in a command line."""
    value = f"canary-{secrets.token_hex(12)}"
    monkeypatch.setenv("RORQUAL_CANARY", value)
    places = [
        Path(tempfile.gettempdir()),
        Path(os.environ["RORQUAL_HOME"]),
        Path.home(),
        Path("/var/tmp"),
        Path("/run"),
    ]
    made = []
    with subprocess.Popen([value, "100"], executable="sleep") as process:
        for folder in places:
            if os.access(folder, os.W_OK):
                made.append(folder / f".{value[:12]}")
                made[-1].write_text(value)
                made[-1].chmod(0o644)
        assert made
        yield value
        process.kill()
    for path in made:
        path.unlink()


def masked(text: str) -> str:
    """As the program takes it, so that it does not find its own argument."""
    return bytes(byte ^ 0x5A for byte in text.encode()).hex()


@pytest.mark.parametrize("case", CASES)
def test_s9_no_secret_of_the_host_is_inside(case: Case, canary: str) -> None:
    with Sandbox.create(**need(case), metadata={"note": "m"}) as sandbox:
        found = attack(arm(sandbox), "secret", masked(canary))
        assert breaches(found) == {}
        assert int(found[-1].seen.split()[0]) > 5 and "out of time" not in found[-1].seen
        running = Home.find(sandbox.id).read().running
        assert running is not None and breaches(attack(sandbox, "secret", masked(running.secret))) == {}
        assert "RORQUAL" not in sandbox.commands.run("env; cat /proc/*/environ").stdout


def test_s9_control_the_search_finds_it_in_each_place(canary: str) -> None:
    with Sandbox.create(**need(("container", "bwrap")), env={"LEAK": canary}) as sandbox:
        sandbox.files.write("/var/tmp/deep/below/leak", "x" * 70_000 + canary)
        sandbox.commands.start(["sh", "-c", "sleep 100; true", canary])
        worked = breaches(attack(arm(sandbox), "secret", masked(canary)))
    assert set(worked) == {"environment", "file", "command line"}


def test_s9_control_with_a_folder_of_the_host(monkeypatch: pytest.MonkeyPatch, canary: str) -> None:
    with tempfile.TemporaryDirectory(prefix="abuse-shown-") as folder:
        os.chmod(folder, 0o755)
        Path(folder, "leak").write_text(canary)
        with weakened(monkeypatch, Weakened(more=["--ro-bind", folder, "/opt"])) as sandbox:
            assert breaches(attack(sandbox, "secret", masked(canary))) == {"file": "/opt/leak"}
