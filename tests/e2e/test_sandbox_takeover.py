"""One client in another's place: who holds the lock then, and what becomes of what the first one had begun."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sandboxes import need

from rorqual import Sandbox
from rorqual.errors import SandboxError
from rorqual.sandbox.commands import INLINE_STDIN, STDIN_PIECE
from rorqual.sandbox.errors import OutcomeUnknown, StaleEpoch
from rorqual.sandbox.home import Home
from rorqual.sandbox.sweep import sweep
from rorqual.sandbox.wire import Fields, Type

HOLDER = """
import sys, time
from rorqual import Sandbox
sandbox = Sandbox.connect(sys.argv[1], takeover=len(sys.argv) > 2)
print("driving", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def identity() -> Iterator[str]:
    """A sandbox that nobody drives."""
    with Sandbox.create(**need(("container", "bwrap"))) as made:  # type: ignore[arg-type]
        made.detach()
    yield made.id
    Sandbox.end(made.id)


@pytest.fixture
def holder(identity: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that drives it."""
    process = client(HOLDER, identity)
    assert process.stdout is not None and process.stdout.readline() == b"driving\n"
    yield process
    process.kill()
    process.wait()


def client(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def refused(identity: str) -> bool:
    """Whether a third one is kept out, and the sandbox lives."""
    sweep()
    with pytest.raises(SandboxError, match=f"process {os.getpid()} drives sandbox"):
        Sandbox.connect(identity)
    return not Home.find(identity).lock()


def test_who_takes_over_holds_the_lock_also_once_the_old_holder_is_gone(
    identity: str, holder: subprocess.Popen[bytes]
) -> None:
    taker = Sandbox.connect(identity, takeover=True)
    assert refused(identity)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert refused(identity)
    assert taker.commands.run("echo on").stdout == "on\n"
    taker.detach()
    with Sandbox.connect(identity) as next_one:
        assert next_one.info().attach_epoch == 4 and next_one.commands.run("true").exit_code == 0


def test_a_fenced_holder_that_lives_on_keeps_nobody_out(identity: str, holder: subprocess.Popen[bytes]) -> None:
    Sandbox.connect(identity, takeover=True).detach()
    with Sandbox.connect(identity) as next_one:
        assert holder.poll() is None and next_one.commands.run("true").exit_code == 0


def test_of_several_takers_the_one_with_the_highest_epoch_holds_the_lock(identity: str) -> None:
    takers: list[Sandbox] = []
    failed: list[BaseException] = []

    def take() -> None:
        try:
            takers.append(Sandbox.connect(identity, takeover=True))
        except StaleEpoch as error:  # a later one was quicker
            failed.append(error)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(takers) + len(failed) == 6
    newest = max(takers, key=lambda one: one._sandbox._record.attach_epoch)
    assert newest._sandbox._record.attach_epoch == 7 and refused(identity)
    for other in takers:
        if other is not newest:
            with pytest.raises(StaleEpoch):
                other.commands.run("true")
            with pytest.raises(StaleEpoch):
                other.close()
    assert newest.commands.run("echo mine").stdout == "mine\n" and refused(identity)
    newest.close()


def test_a_lock_that_was_replaced_while_it_was_waited_for_is_not_had(
    identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, taker = Home.find(identity), Home.find(identity)
    real = os.open

    def opened(path: object, *arguments: object) -> int:
        descriptor = real(path, *arguments)  # type: ignore[arg-type]
        if str(path).endswith("/lock") and taker._lock is None:
            with taker.editing():
                taker.take_lock()
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        assert not late.lock()
    taker.unlock()
    assert late.lock()
    late.unlock()


KEYED = """
import sys
from rorqual import Sandbox
from rorqual.sandbox.commands import CommandHandle
sandbox = Sandbox.connect(sys.argv[1])
written = 0
write = CommandHandle._write_piece
async def count(self, piece):
    global written
    if written == int(sys.argv[2]):
        print("half-way", flush=True)
        sys.stdin.read()
    written += 1
    await write(self, piece)
CommandHandle._write_piece = count
sandbox.commands.run(["sha256sum"], stdin=sys.stdin.buffer.read(int(sys.argv[3])), call="k", timeout=None)
"""


@pytest.mark.parametrize("pieces", [0, 3])
def test_a_joined_call_gets_the_input_that_its_first_client_could_not_give(identity: str, pieces: int) -> None:
    data = secrets.token_bytes(INLINE_STDIN + 3 * STDIN_PIECE + 17)
    first = client(KEYED, identity, str(pieces), str(len(data)))
    assert first.stdin is not None and first.stdout is not None
    first.stdin.write(data)
    first.stdin.flush()
    assert first.stdout.readline() == b"half-way\n"
    first.kill()
    first.wait()
    with Sandbox.connect(identity) as second:
        joined = second.commands.run(["sha256sum"], stdin=data, call="k", timeout=60)
        alone = second.commands.run(["sha256sum"], stdin=data)
        assert joined.stdout == alone.stdout and not joined.replayed and not joined.timed_out
        again = second.commands.run(["sha256sum"], stdin=data, call="k")
        assert again.replayed and again.stdout == joined.stdout


def test_a_keyed_call_that_was_accepted_and_never_started_gets_all_its_input(identity: str) -> None:
    data = secrets.token_bytes(INLINE_STDIN + STDIN_PIECE)
    with Sandbox.connect(identity) as sandbox:
        ask = sandbox._sandbox._link.request

        async def dies(kind: int, *arguments: object, **keywords: object) -> Fields:
            if kind == Type.START:
                raise ConnectionAbortedError("before it was sent")
            return await ask(kind, *arguments, **keywords)  # type: ignore[arg-type]

        sandbox._sandbox._link.request = dies  # type: ignore[assignment,method-assign]
        with pytest.raises(ConnectionAbortedError):
            sandbox.commands.run(["sha256sum"], stdin=data, call="k", timeout=60)
        sandbox._sandbox._link.request = ask  # type: ignore[method-assign]
        joined = sandbox.commands.run(["sha256sum"], stdin=data, call="k", timeout=60)
        assert joined.stdout == sandbox.commands.run(["sha256sum"], stdin=data).stdout


def test_an_agent_that_does_not_say_what_it_has_is_not_guessed_at(identity: str) -> None:
    """As one of an earlier version, which lives in a sandbox that was made then."""
    data = secrets.token_bytes(INLINE_STDIN + STDIN_PIECE)
    with Sandbox.connect(identity) as sandbox:
        ask = sandbox._sandbox._link.request

        async def earlier(kind: int, *arguments: object, **keywords: object) -> Fields:
            answer = await ask(kind, *arguments, **keywords)  # type: ignore[arg-type]
            return Fields(b"") if kind == Type.START else answer

        sandbox._sandbox._link.request = earlier  # type: ignore[assignment,method-assign]
        with pytest.raises(OutcomeUnknown, match="waits for its input"):
            sandbox.commands.run(["cat"], stdin=data, call="k", timeout=60)


def test_a_started_command_that_is_joined_is_not_given_its_first_input_twice(identity: str) -> None:
    wait_for: Callable[[Sandbox], bool] = lambda sandbox: sandbox.files.exists("got")  # noqa: E731
    for _ in range(2):
        with_input = Sandbox.connect(identity)
        with_input.commands.start("read a; read b; echo $a $b > got", stdin="first\n", call="k")
        with_input.detach()
    sandbox = Sandbox.connect(identity)
    handle = sandbox.commands.attach(next(str(one["id"]) for one in sandbox.commands.list()))
    handle.write("second\n")
    while not wait_for(sandbox):
        time.sleep(0.01)
    assert sandbox.files.read("got") == "first second\n"
    sandbox.close()
