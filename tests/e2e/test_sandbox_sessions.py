"""Pauses and broken connections: neither counts against what runs, nor loses or repeats anything of it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sandboxes import need

from rorqual import AsyncSandbox
from rorqual.sandbox.errors import Gone
from rorqual.sandbox.spec import CommandResult


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))


@contextlib.asynccontextmanager
async def made(kind: str = "container", driver: str = "bwrap") -> AsyncIterator[AsyncSandbox]:
    """A sandbox of the loop that runs now."""
    arguments = await asyncio.to_thread(need, (kind, driver))  # type: ignore[arg-type]
    async with await AsyncSandbox.create(**arguments) as sandbox:  # type: ignore[arg-type]
        yield sandbox


async def exists(sandbox: AsyncSandbox, path: str) -> None:
    """Waits for it."""
    while not await sandbox.files.exists(path):
        await asyncio.sleep(0.01)


class Leap:
    """The client's clock, which leaps by an hour."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        monkeypatch.setattr("rorqual.sandbox.clock.monotonic", lambda: time.monotonic() + self.ahead)

    def __call__(self) -> None:
        self.ahead += 3600


async def pause_meanwhile(sandbox: AsyncSandbox, leap: Leap | None = None, seconds: float = 0.1) -> None:
    """Once `began` is there, a pause; for `leap` it is an hour long."""
    await exists(sandbox, "began")
    await sandbox.pause()
    if leap is not None:
        leap()
    await asyncio.sleep(seconds)
    await sandbox.resume()
    await sandbox.files.write("go", "")


UNTIL_GO = "touch began; while [ ! -e go ]; do sleep 0.01; done; echo done"


def test_a_pause_counts_neither_in_a_session_nor_in_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    leap = Leap(monkeypatch)

    async def main() -> None:
        async with made() as sandbox:
            session = await sandbox.commands.session()
            in_session, _ = await asyncio.gather(session.run(UNTIL_GO, timeout=60), pause_meanwhile(sandbox, leap))
            assert (await session.run("rm go began; echo on", timeout=60)).stdout == "on\n", "the shell was ended"
            command = sandbox.commands.run(UNTIL_GO, timeout=60, call="a")
            alone, _ = await asyncio.gather(command, pause_meanwhile(sandbox, leap))
            for result in (in_session, alone):
                assert (result.stdout, result.exit_code, result.timed_out) == ("done\n", 0, False)
            assert in_session.duration_ms < 60_000 < 3600_000 <= in_session.paused_ms
            assert alone.paused_ms >= 100, "the agent's clock knows no leap"
            again = await sandbox.commands.run(UNTIL_GO, timeout=60, call="a")
            assert (again.replayed, again.duration_ms, again.paused_ms) == (True, alone.duration_ms, alone.paused_ms)

    asyncio.run(main())


def test_time_that_runs_still_counts_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    leap = Leap(monkeypatch)

    async def main() -> CommandResult:
        async with made() as sandbox:
            session = await sandbox.commands.session()
            running = asyncio.ensure_future(session.run("touch began; while :; do echo; sleep 0.05; done", timeout=60))
            await pause_meanwhile(sandbox, leap)
            assert not (await asyncio.wait({running}, timeout=0.2))[0]
            leap()
            return await running

    result = asyncio.run(main())
    assert result.timed_out and result.exit_code == 137 and result.duration_ms >= 60_000


def test_a_snapshot_stops_the_clock_too(monkeypatch: pytest.MonkeyPatch) -> None:
    leap = Leap(monkeypatch)

    async def main() -> CommandResult:
        async with made() as sandbox:
            pack = sandbox._driver.snapshot_disk

            async def slow(*arguments: Any) -> str:
                leap()
                await asyncio.sleep(0.1)
                return await pack(*arguments)

            monkeypatch.setattr(sandbox._driver, "snapshot_disk", slow)
            session = await sandbox.commands.session()
            running = asyncio.ensure_future(session.run(UNTIL_GO, timeout=60))
            await exists(sandbox, "began")
            await sandbox.snapshot()
            await sandbox.files.write("go", "")
            return await running

    result = asyncio.run(main())
    assert result.stdout == "done\n" and result.paused_ms >= 3600_000


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "driver"), [("function", "zygote"), ("container", "bwrap")])
def test_a_pause_does_not_count_in_a_call(kind: str, driver: str) -> None:
    """Here the pause is longer than the timeout, for there is a clock inside too."""
    source = (
        "import os, time\n"
        "def work(until):\n"
        "    open('/home/agent/began', 'w').close()\n"
        "    while not os.path.exists(until): time.sleep(0.01)\n"
        "    return 'done'\n"
    )

    async def main() -> None:
        async with made(kind, driver) as sandbox:
            await sandbox.call("", None)
            call = sandbox.call(source, "work", ["/home/agent/go"], timeout=3)
            result, _ = await asyncio.gather(call, pause_meanwhile(sandbox, seconds=4))
            assert (result.value, result.timed_out) == ("done", False), result
            assert result.paused_ms >= 3900 and result.duration_ms < 3000
            await sandbox.files.remove("began")
            call = sandbox.call(source, "work", ["/none"], timeout=0.5)
            result, _ = await asyncio.gather(call, pause_meanwhile(sandbox, seconds=1))
            assert result.timed_out and result.duration_ms >= 500, "time that ran did not count"

    asyncio.run(main())


async def cut(sandbox: AsyncSandbox) -> None:
    """The connection breaks; the sandbox lives."""
    channel = sandbox._link._channel
    assert channel is not None
    channel._writer.transport.abort()
    while channel.open_now:
        await asyncio.sleep(0.001)


def test_a_session_goes_on_after_a_break_and_nothing_is_lost_or_doubled() -> None:
    async def main() -> None:
        async with made() as sandbox:
            session = await sandbox.commands.session()
            await session.run("cd /tmp; count=0; say() { count=$((count + 1)); echo $count; echo e$count >&2; }")
            running = asyncio.ensure_future(
                session.run(
                    "say; touch began; while [ ! -e more ]; do sleep 0.01; done; say; touch midway; sleep 0.3; say"
                )
            )
            await exists(sandbox, "/tmp/began")
            await cut(sandbox)
            await sandbox.files.write("/tmp/more", "")
            await exists(sandbox, "/tmp/midway")
            await cut(sandbox)
            result = await running
            assert (result.stdout, result.stderr, result.exit_code) == ("1\n2\n3\n", "e1\ne2\ne3\n", 0)
            assert result.truncated_bytes == {"stdout": 0, "stderr": 0}
            await cut(sandbox)
            assert (await session.run("say; pwd; exit 3")).stdout == "4\n/tmp\n"

    asyncio.run(main())


def test_a_shell_that_ended_during_a_break_is_told_as_ended() -> None:
    async def main() -> CommandResult:
        async with made() as sandbox:
            session = await sandbox.commands.session()
            running = asyncio.ensure_future(
                session.run("touch began; while [ ! -e go ]; do sleep 0.01; done; kill -9 $$")
            )
            await exists(sandbox, "began")
            await cut(sandbox)
            await sandbox.files.write("go", "")
            return await running

    result = asyncio.run(main())
    assert (result.exit_code, result.signal, result.timed_out) == (137, 9, False)


def test_a_call_goes_on_after_a_break() -> None:
    source = (
        "import os, time\n"
        "def work(name):\n"
        "    open('/home/agent/began' + name, 'w').close()\n"
        "    while not os.path.exists('/home/agent/go'): time.sleep(0.01)\n"
        "    return name * 3\n"
    )

    async def main() -> None:
        async with made("function", "zygote") as sandbox:
            calls = [asyncio.ensure_future(sandbox.call(source, "work", [name])) for name in "ab"]
            for name in "ab":
                await exists(sandbox, f"began{name}")
            await cut(sandbox)
            await sandbox.files.write("go", "")
            assert [(await call).value for call in calls] == ["aaa", "bbb"]
            assert (await sandbox.call(source, "work", ["c"])).value == "ccc"

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["command", "session"])
def test_an_agent_that_root_inside_killed_is_told_as_a_lost_sandbox(how: str) -> None:
    """gVisor lets process 1 be killed; the caller neither waits for its timeout nor takes it for the program's end."""

    async def main() -> None:
        arguments = await asyncio.to_thread(need, ("microvm", "gvisor"))
        sandbox = await AsyncSandbox.create(**arguments, user="root")  # type: ignore[arg-type]
        try:
            runs = sandbox.commands.run if how == "command" else (await sandbox.commands.session()).run
            with pytest.raises(Gone) as caught:
                await runs("kill -9 1; sleep 1000", timeout=900)
            assert caught.value.reason == "crashed"
        finally:
            await AsyncSandbox.end(sandbox.id)

    asyncio.run(main())


def test_a_terminal_is_read_on_after_a_break() -> None:
    async def main() -> None:
        async with made() as sandbox:
            terminal = await sandbox.pty.open(shell=["/bin/sh", "-c", "echo one; read line; echo two"])
            seen = b""
            while b"one" not in seen:
                seen += await terminal.read(10)
            reading = asyncio.ensure_future(terminal.read(10))
            await asyncio.sleep(0.05)
            await cut(sandbox)
            await terminal.write("x\n")
            while b"two" not in seen:
                piece = await reading
                assert piece, "the break was taken for its end"
                seen += piece
                reading = asyncio.ensure_future(terminal.read(10))
            reading.cancel()
            assert seen.count(b"two") == 1 and (await terminal.wait(10)).exit_code == 0

    asyncio.run(main())


def test_input_arrives_once_where_the_connection_breaks_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join(b"%07d\n" % number for number in range(150_000))

    async def main() -> None:
        async with made() as sandbox:
            ask = sandbox._link.request
            written = 0

            async def broken(kind: int, *args: object, **keywords: object) -> object:
                nonlocal written
                written += kind == 4  # WRITE
                if kind == 4 and written in (3, 7):
                    asking = asyncio.ensure_future(ask(kind, *args, **keywords))  # type: ignore[arg-type]
                    if written == 3:  # it arrives, and its answer does not
                        await asyncio.sleep(0.1 if asking.done() else 0)
                    await cut(sandbox)
                    return await asking
                return await ask(kind, *args, **keywords)  # type: ignore[arg-type]

            monkeypatch.setattr(sandbox._link, "request", broken)
            result = await sandbox.commands.run(["cat"], stdin=data, max_output=4 << 20, timeout=30)
            assert written > 7 and result.stdout_bytes == data

    asyncio.run(main())
