"""Small Python calls: a warm interpreter inside that is forked for each, with a structured result."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from sandboxes import Shared, need, traces

from rorqual import AsyncSandbox, Sandbox
from rorqual.errors import SandboxError
from rorqual.sandbox.commands import CommandHandle
from rorqual.sandbox.errors import ReplayDivergence


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    case = need(("function", "zygote"))
    made = Shared(lambda: Sandbox.create(**case))  # type: ignore[arg-type]
    yield made
    last = made.close()
    assert last is None or traces(last) == []


@pytest.fixture
def sandbox(shared: Shared, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with shared.lent(request) as made:
        yield made


def test_a_call_returns_a_value_and_what_was_printed(sandbox: Sandbox) -> None:
    result = sandbox.call(
        "import sys\ndef add(a, b):\n    print('out')\n    print('err', file=sys.stderr)\n    return {'sum': a + b}",
        "add",
        [2],
        {"b": 3},
    )
    assert result.ok and result.value == {"sum": 5} and (result.stdout, result.stderr) == ("out\n", "err\n")
    assert sandbox.call("x = 1").value is None
    assert sandbox.call("def f(s): return s[::-1]", "f", ["\u00fc\u4e2d\n"]).value == "\n\u4e2d\u00fc"


def test_each_call_begins_clean_but_files_stay(sandbox: Sandbox) -> None:
    sandbox.call("import builtins, math\nbuiltins.left = 1\nmath.pi = 3\nopen('kept', 'w').write('here')")
    result = sandbox.call(
        "import builtins, math\ndef f(): return [hasattr(builtins, 'left'), math.pi, open('kept').read()]", "f"
    )
    assert result.value == [False, 3.141592653589793, "here"]
    assert sandbox.files.read("kept") == "here"
    draw = "import random\nx = random.random()\ndef f(): return x"
    assert sandbox.call(draw, "f").value != sandbox.call(draw, "f").value


@pytest.mark.parametrize(
    ("source", "name", "trace"),
    [
        ("def f():\n    raise KeyError('no')", "KeyError", 'File "<call>", line 2, in f'),
        ("def f(:", "SyntaxError", "<call>"),
        ("def f(): return object()", "TypeError", "not JSON serializable"),
        ("def f(): exit(3)", "SystemExit", ""),
        ("def g(): pass", "AttributeError", ""),
        ("def f():\n    import os\n    os._exit(3)", "WorkerEnded", ""),
        ("def f():\n    import os\n    os.kill(os.getpid(), 11)", "WorkerEnded", ""),
        ("def f():\n    import os, time\n    os.kill(os.getppid(), 9)\n    time.sleep(1000)", "WorkerEnded", ""),
        ("def f(): return 'x' * (5 << 20)", "ValueError", "at most"),
    ],
)
def test_what_goes_wrong_is_told(sandbox: Sandbox, source: str, name: str, trace: str) -> None:
    result = sandbox.call(source, "f")
    assert not result.ok and result.error == name and result.value is None
    assert trace in result.traceback or trace in result.message
    assert "function_runner" not in result.traceback and "work(" not in result.traceback
    assert sandbox.call("def f(): return 1", "f").value == 1


@pytest.mark.slow
def test_a_timeout_ends_all_that_the_call_started(sandbox: Sandbox) -> None:
    program = """import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("on", flush=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            open("beats", "a").write("x")
            time.sleep(0.01)
while True: pass
"""
    result = sandbox.call(program, timeout=3)
    assert result.timed_out and not result.ok and result.stdout == "on\n"
    first = sandbox.files.stat("beats").size
    time.sleep(0.2)
    assert first > 0 and sandbox.files.stat("beats").size == first


def test_a_process_left_behind_is_ended_with_its_call(sandbox: Sandbox) -> None:
    result = sandbox.call(
        "import subprocess\ndef f(): return subprocess.Popen(['sleep', '1000'], start_new_session=True).pid", "f"
    )
    assert result.ok
    assert sandbox.commands.run(f"kill -0 {result.value}").exit_code != 0


def test_output_is_capped(sandbox: Sandbox) -> None:
    result = sandbox.call("print('a' * 50_000 + 'b' * 1_000_000 + 'c' * 50_000)", max_output=10_000)
    assert len(result.stdout) == 10_000 and result.truncated_bytes["stdout"] == 1_090_001
    assert result.stdout.startswith("aaa") and result.stdout.endswith("ccc\n")


def test_a_keyed_call_runs_once(sandbox: Sandbox) -> None:
    source = "def f(n):\n    open('runs', 'a').write('x')\n    return n"
    first, again = (sandbox.call(source, "f", [4], call="key") for _ in range(2))
    assert (first.value, first.replayed, again.value, again.replayed) == (4, False, 4, True)
    assert sandbox.files.read("runs") == "x"
    with pytest.raises(ReplayDivergence):
        sandbox.call(source, "f", [5], call="key")
    with pytest.raises(SandboxError, match="JSON"):
        sandbox.call(source, "f", [object()])


@pytest.mark.slow
def test_many_calls_run_side_by_side(sandbox: Sandbox) -> None:
    values: list[int] = []

    def one(number: int) -> None:
        source = "import time\ndef f(n):\n    time.sleep(0.3)\n    return n"
        values.append(sandbox.call(source, "f", [number]).value)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(values) == list(range(8))


def test_an_interpreter_that_ends_while_it_is_written_to_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = need(("function", "zygote"))
    plain = CommandHandle.write

    async def write(handle: CommandHandle, data: str | bytes) -> None:
        await plain(handle, data)
        await handle.kill()
        while handle._sandbox._functions._handle is not None:
            await asyncio.sleep(0.01)

    async def scene() -> None:
        async with await AsyncSandbox.create(**arguments) as sandbox:  # type: ignore[arg-type]
            with monkeypatch.context() as patch, pytest.raises(SandboxError, match="interpreter ended"):
                patch.setattr(CommandHandle, "write", write)
                await sandbox.call("import time; time.sleep(100)")  # it takes the call
            with monkeypatch.context() as patch, pytest.raises(SandboxError, match="interpreter (came up|ended)"):
                patch.setattr(CommandHandle, "write", write)
                await sandbox.call("x = 1")  # and the next one its own program, which it may have begun
            assert (await sandbox.call("def f(): return 5", "f")).value == 5

    asyncio.run(scene())


@pytest.mark.slow
def test_an_interpreter_that_was_killed_is_started_again(sandbox: Sandbox) -> None:
    sandbox.commands.run("pkill -9 -f base64 || kill -9 $(grep -l base64 /proc/[0-9]*/cmdline | cut -d/ -f3)")
    for _ in range(20):
        try:
            if sandbox.call("def f(): return 5", "f").value == 5:
                break
        except SandboxError:
            time.sleep(0.1)
    else:
        raise AssertionError("no new interpreter came up")
