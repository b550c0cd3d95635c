"""What a sandbox can do to its host over the channel, once somebody inside speaks in the agent's place.

Whatever comes, a caller gets a result of the right shape or an error of the tree, in bounded time and memory.
"""

import asyncio
import resource
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from full import often
from hostile_agent import Answer, Rows, hostile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rorqual import AsyncSandbox
from rorqual.errors import SandboxError
from rorqual.sandbox.channel import AgentRefusal
from rorqual.sandbox.spec import CommandResult
from rorqual.sandbox.wire import AGENT, MAGIC, Fields, Forged, Frame, Parser, Tag, Type, frame, pack

KEY, SESSION = b"k" * 32, b"s" * 32
PIECES = st.one_of(
    st.binary(max_size=80),
    st.just(MAGIC),
    st.integers(0, 15).map(lambda size: MAGIC[:size]),
    st.integers(0, 2**32 - 1).map(lambda size: MAGIC + b"\x40\0\0\0" + size.to_bytes(4, "little") + bytes(8)),
    st.binary(max_size=60).map(lambda payload: frame(b"x" * 32, 0, AGENT, Type.WELCOME, 0, payload)),
)
STREAMS = st.lists(PIECES, max_size=12).map(b"".join)


def drain(parser: Parser, data: bytes, step: int) -> list[Frame]:
    """Every frame in a stream that arrives in pieces."""
    found = []
    for start in range(0, len(data), step):
        parser.feed(data[start : start + step])
        while one := parser.next():
            found.append(one)
    return found


@given(STREAMS, STREAMS, st.integers(1, 200))
def test_the_welcome_is_found_in_any_stream(before: bytes, payload: bytes, step: int) -> None:
    parser = Parser(KEY)
    payload = payload[:900]
    welcome = frame(KEY, 0, AGENT, Type.WELCOME, 0, payload)
    assert drain(parser, before, step) == []
    found = drain(parser, welcome + MAGIC * 70, step)  # more bytes, for a header just before may have promised them
    assert [one.payload for one in found] == [payload]
    assert len(parser._buffer) < 2048


@given(STREAMS, st.integers(1, 200))
def test_after_the_welcome_nothing_but_right_frames_passes(data: bytes, step: int) -> None:
    parser = Parser(KEY)
    parser.expect(SESSION)
    whole = frame(SESSION, 0, AGENT, Type.OK, 1, MAGIC * 3) + frame(SESSION, 1, AGENT, Type.OK, 2, b"")
    assert [one.request for one in drain(parser, whole, step)] == [1, 2]
    try:
        assert drain(parser, data + bytes(64), step) == []
    except Forged:
        return
    assert len(parser._buffer) <= (1 << 20) + 48


@given(st.integers(0, 2), st.sampled_from(["repeat", "other", "flip", "swap"]))
def test_a_frame_repeated_left_out_or_changed_is_an_attack(at: int, how: str) -> None:
    frames = [frame(SESSION, number, AGENT, Type.OK, number + 1, bytes([number]) * 9) for number in range(4)]
    if how == "repeat":
        frames.insert(at, frames[at])
    elif how == "other":
        del frames[at]
    elif how == "swap":
        frames[at], frames[at + 1] = frames[at + 1], frames[at]
    else:
        frames[at] = frames[at][:34] + bytes([frames[at][34] ^ 1]) + frames[at][35:]
    parser = Parser(KEY)
    parser.expect(SESSION)
    with pytest.raises(Forged):
        drain(parser, b"".join(frames), 7)


@given(st.binary(max_size=300))
def test_fields_of_any_bytes_can_be_asked_for(payload: bytes) -> None:
    fields = Fields(payload)
    for tag in Tag:
        assert 0 <= fields.number(tag) < 2**63
        assert isinstance(fields.text(tag), str) and len(fields.all(tag)) <= len(payload)
    AgentRefusal(fields.number(Tag.ERRNO), fields.text(Tag.TEXT))


@pytest.mark.parametrize("number", [0, 5000, 2**31, 2**62])
def test_error_numbers_that_no_kernel_has_are_one_that_it_has(number: int) -> None:
    assert AgentRefusal(number, "x").number == 5
    assert AgentRefusal(2, "x").number == 2


VALUES = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(0, 300), st.binary(max_size=40), st.sampled_from(["../x", "file", ""])
)
PAYLOADS = st.lists(st.tuples(st.sampled_from(list(Tag)), VALUES), max_size=8).map(pack)
SHAPED = st.fixed_dictionaries(
    dict.fromkeys((Tag.OUT_TOTAL, Tag.OUT_LOST, Tag.STATUS, Tag.SIZE, Tag.DATA, Tag.KIND), VALUES)
)
KINDS = st.sampled_from([Type.OK, Type.ERROR, Type.EXITED, Type.OUTPUT, Type.PORT_BYTES, Type.STALE, 1, 200])
REPLIES = st.lists(
    st.tuples(KINDS, st.booleans(), st.one_of(PAYLOADS, SHAPED.map(lambda found: pack(list(found.items()))))),
    max_size=3,
)
Operation = Callable[[AsyncSandbox, Path], Awaitable[object]]
OPERATIONS: dict[str, Operation] = {
    "run": lambda sandbox, _: sandbox.commands.run("true", timeout=0.05),
    "stream": lambda sandbox, _: sandbox.commands.run("true", timeout=0.05, on_stdout=lambda text: None),
    "list commands": lambda sandbox, _: sandbox.commands.list(),
    "read": lambda sandbox, _: sandbox.files.read("/x"),
    "write": lambda sandbox, _: sandbox.files.write("/x", "y"),
    "list": lambda sandbox, _: sandbox.files.list("/"),
    "stat": lambda sandbox, _: sandbox.files.stat("/"),
    "download": lambda sandbox, folder: sandbox.files.download("/", folder / "here"),
    "call": lambda sandbox, _: sandbox.call("def f(): return 1", "f", timeout=0.05),
    "metrics": lambda sandbox, _: sandbox.metrics(),
}


async def outcome(sandbox: AsyncSandbox, name: str, folder: Path) -> object:
    """What an operation came to; anything but a result or an error of the tree passes through and fails the test."""
    try:
        return await asyncio.wait_for(OPERATIONS[name](sandbox, folder), 20)
    except SandboxError as error:
        return error


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become hundredths."""
    monkeypatch.setattr("rorqual.sandbox.link.PATIENCE_S", 0.1)
    monkeypatch.setattr("rorqual.sandbox.commands.GRACE_S", 0.1)
    monkeypatch.setattr("rorqual.sandbox.functions.GRACE_S", 0.1)
    monkeypatch.setattr("rorqual.sandbox.functions.READY_S", 0.1)


@pytest.mark.usefixtures("impatient")
@settings(max_examples=often(12, 300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(REPLIES, min_size=1, max_size=4), st.sampled_from(sorted(OPERATIONS)))
def test_any_answers_end_in_a_result_or_an_error_of_the_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replies: list[list[tuple[int, bool, bytes]]], name: str
) -> None:
    asked = 0

    def answer(request: Frame) -> Rows:
        nonlocal asked
        asked += 1
        return [
            (kind, request.request if mine else 0, payload)
            for kind, mine, payload in replies[(asked - 1) % len(replies)]
        ]

    async def go() -> None:
        async with hostile(monkeypatch, answer, tmp_path / "home") as sandbox:
            result = await outcome(sandbox, name, tmp_path)
            assert not isinstance(result, CommandResult) or len(result.stdout_bytes) <= 16 << 20

    asyncio.run(go())
    assert not (tmp_path / "x").exists() and {path.name for path in tmp_path.iterdir()} <= {"home", "here"}


def one_outcome(monkeypatch: pytest.MonkeyPatch, folder: Path, answer: Answer, name: str) -> object:
    """One operation against one hostile agent."""

    async def go() -> object:
        async with hostile(monkeypatch, answer, folder / "home") as sandbox:
            return await outcome(sandbox, name, folder)

    return asyncio.run(go())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_an_agent_that_says_nothing_hangs_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    assert isinstance(one_outcome(monkeypatch, tmp_path, lambda request: [], name), SandboxError)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "rows",
    [
        [(Type.OUTPUT, 0, pack([(Tag.HANDLE, "call"), (Tag.STREAM, 99)]))],
        [(Type.ERROR, 1, pack([(Tag.ERRNO, 2**63), (Tag.TEXT, "x")]))],
        [(Type.EXITED, 1, pack([(Tag.STATUS, 2**62)]))],
        [("raw", 0, b"between frames")],
        [("raw", 0, MAGIC * 40)],
        [(1, 1, b"")],
    ],
)
@pytest.mark.parametrize("name", ["run", "stream", "read"])
def test_known_attacks_on_the_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Rows, name: str) -> None:
    def answer(request: Frame) -> Rows:
        handle = request.fields.bytes(Tag.HANDLE)
        return [
            (
                kind,
                request.request if at else 0,
                payload.replace(b"\4\4\0\0\0call", b"\4" + len(handle).to_bytes(4, "little") + handle),
            )
            for kind, at, payload in rows
        ]

    result = one_outcome(monkeypatch, tmp_path, answer, name)
    assert isinstance(result, SandboxError | CommandResult | str)
    if rows[0][0] in ("raw", 1):
        assert "sent what no agent sends" in str(result)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ["run", "read", "download"])
def test_promises_without_end_take_bounded_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """The agent says that there is ever more, and sends it."""
    piece = pack([(Tag.DATA, b"z" * (256 << 10)), (Tag.OUT_TOTAL, 2**60), (Tag.SIZE, 1), (Tag.KIND, "file")])

    def answer(request: Frame) -> Rows:
        return [(Type.EXITED if request.kind == Type.WAIT else Type.OK, request.request, piece)]

    monkeypatch.setattr("rorqual.sandbox.commands.GRACE_S", 30.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = one_outcome(monkeypatch, tmp_path, answer, name)
    assert isinstance(result, SandboxError | CommandResult | str)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
