"""Frames between client and agent: forged, cut, repeated and foreign bytes, against the real agent program."""

import contextlib
import random
import re
import secrets
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.errors import SandboxError
from rorqual.sandbox.agent.build import FOLDER, agent_binary
from rorqual.sandbox.wire import (
    AGENT,
    CLIENT,
    HEADER,
    MAGIC,
    MAX_PAYLOAD,
    Fields,
    Frame,
    Parser,
    Start,
    Tag,
    Type,
    Value,
    code,
    frame,
    pack,
    session_key,
)

SECRET = bytes(range(32))


class Peer:
    """A client by hand: every byte of what it sends can be chosen."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.link.settimeout(10)
        self.sent = 0
        self.key = b""
        self.parser = Parser(SECRET)

    def hello(self, *, epoch: int = 1, secret: bytes = SECRET, first: bool = True, before: bytes = b"") -> Frame:
        nonce = secrets.token_bytes(16)
        fields: list[tuple[Tag, Value]] = [(Tag.NONCE, nonce), (Tag.EPOCH, epoch)]
        if first:
            fields += [(Tag.SECRET, secret), (Tag.FILTER, 0)]
        self.parser = Parser(secret)
        self.link.sendall(before + frame(secret, 0, CLIENT, Type.HELLO, 0, pack(fields)))
        found = self.receive()
        while found.fields.bytes(Tag.NONCE) != nonce:
            self.parser.number = 0
            found = self.receive()
        if found.kind == Type.WELCOME:
            self.key = session_key(secret, nonce, found.fields.bytes(Tag.TOKEN))
            self.parser.expect(self.key)
            self.sent = 0
        return found

    def bytes_of(self, kind: Type, *fields: tuple[Tag, Value], request: int = 7) -> bytes:
        sealed = frame(self.key, self.sent, CLIENT, kind, request, pack(list(fields)))
        self.sent += 1
        return sealed

    def receive(self) -> Frame:
        while True:
            found = self.parser.next()
            if found is not None:
                return found
            data = self.link.recv(65536)
            if not data:
                raise ConnectionError("the agent closed the connection")
            self.parser.feed(data)

    def ask(self, kind: Type, *fields: tuple[Tag, Value]) -> Fields:
        self.link.sendall(self.bytes_of(kind, *fields))
        found = self.receive()
        assert found.kind in (Type.OK, Type.EXITED), found.fields.text(Tag.TEXT)
        return found.fields

    def works(self) -> bool:
        fields = self.ask(
            *(Type.START, (Tag.HANDLE, secrets.token_hex(8)), (Tag.ARG, "echo"), (Tag.ARG, "hi")),
            (Tag.FLAGS, int(Start.WAIT)),
        )
        return fields.bytes(Tag.OUT_DATA) == b"hi\n"

    def is_silent(self) -> bool:
        self.link.settimeout(0.15)
        try:
            return self.link.recv(1) == b""
        except TimeoutError:
            return True
        finally:
            self.link.settimeout(10)


@pytest.fixture(scope="module")
def program() -> str:
    try:
        return str(agent_binary())
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def listening(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = str(tmp_path_factory.mktemp("s") / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(8)
        command = [program, "serve", "--listen", str(server.fileno())]
        agent = subprocess.Popen(command, pass_fds=[server.fileno()])
    try:
        yield path
    finally:
        agent.kill()
        agent.wait()


@pytest.fixture
def serial(program: str) -> Iterator[Peer]:
    """The agent on a lasting device that no client's end closes, as in a virtual machine."""
    ours, theirs = socket.socketpair()
    agent = subprocess.Popen([program, "serve", "--stdio"], stdin=theirs, stdout=theirs)
    theirs.close()
    try:
        yield Peer(ours)
    finally:
        agent.kill()
        agent.wait()
        ours.close()


@contextlib.contextmanager
def connected(path: str) -> Iterator[Peer]:
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        yield Peer(link)


def test_both_sides_number_types_and_fields_alike() -> None:
    header = (FOLDER / "agent.h").read_text()
    types = dict(re.findall(r"\b([A-Z_]+) = (\d+)", header[header.index("enum Type") : header.index("enum Field")]))
    fields = dict(re.findall(r"\bF_([A-Z_]+) = (\d+)", header))
    flags = dict(re.findall(r"\bFLAG_([A-Z_]+) = (\d+)", header))
    assert types == {one.name: str(one.value) for one in Type}
    assert fields == {one.name: str(one.value) for one in Tag}
    assert flags == {one.name: str(one.value) for one in Start}


def test_fields_come_back_in_order_and_a_torn_one_is_none() -> None:
    payload = pack([(Tag.ARG, "a"), (Tag.SIZE, 2**62), (Tag.ARG, b"\0\xff"), (Tag.PATH, "\udcff")])
    fields = Fields(payload)
    assert fields.all(Tag.ARG) == [b"a", b"\0\xff"]
    assert (fields.number(Tag.SIZE), fields.text(Tag.PATH)) == (2**62, "\udcff")
    assert (fields.bytes(Tag.DATA), fields.number(Tag.MODE), fields.has(Tag.MODE)) == (b"", 0, False)
    for cut in range(len(payload)):
        assert len(Fields(payload[:cut]).all(Tag.ARG)) <= 2


def test_the_parser_finds_frames_among_garbage_and_drops_forged_ones() -> None:
    chance = random.Random(3)
    key = secrets.token_bytes(32)
    frames = [frame(key, number, AGENT, Type.OK, number, chance.randbytes(number * 37)) for number in range(20)]
    stream = bytearray()
    for sealed in frames:
        stream += chance.randbytes(chance.randrange(60)) + MAGIC[: chance.randrange(16)]
        forged = bytearray(sealed)
        forged[chance.randrange(len(MAGIC), 20)] ^= 1 << chance.randrange(8)
        stream += forged[: chance.choice([len(forged), 40])] if chance.random() < 0.5 else b""
        stream += sealed
    parser = Parser(key)
    found: list[Frame] = []
    at = 0
    parser.number = 0
    while at < len(stream):
        size = chance.randrange(1, 200)
        parser.feed(bytes(stream[at : at + size]))
        at += size
        while one := parser.next():
            found.append(one)
    assert [one.request for one in found] == list(range(20))


def test_commands_run_after_a_right_hello_only(listening: str) -> None:
    with connected(listening) as peer:
        peer.link.sendall(frame(SECRET, 0, CLIENT, Type.START, 1, pack([(Tag.HANDLE, "x"), (Tag.ARG, "true")])))
        assert peer.is_silent()
        assert peer.hello().kind == Type.WELCOME
        assert peer.works()
    with connected(listening) as forger:
        other = secrets.token_bytes(32)
        nonce = pack([(Tag.NONCE, bytes(16)), (Tag.EPOCH, 99), (Tag.SECRET, other)])
        forger.link.sendall(frame(other, 0, CLIENT, Type.HELLO, 0, nonce))
        assert forger.is_silent(), "the agent took a second secret"
        forger.link.sendall(frame(SECRET, 0, AGENT, Type.HELLO, 0, nonce))
        assert forger.is_silent(), "a code of the other side was taken"
    with connected(listening) as peer:
        assert peer.hello(first=False).kind == Type.WELCOME and peer.works()


@pytest.mark.parametrize("what", ["bit", "repeat", "skip", "other key", "too long"])
def test_a_frame_that_is_not_the_next_right_one_does_nothing(listening: str, what: str) -> None:
    with connected(listening) as peer:
        peer.hello()
        assert peer.works()
        sealed = bytearray(peer.bytes_of(Type.START, (Tag.HANDLE, "evil"), (Tag.ARG, "true"), (Tag.FLAGS, 8)))
        if what == "bit":
            sealed[HEADER.size + 3] ^= 1
        elif what == "repeat":
            peer.link.sendall(sealed)
            assert peer.receive().kind == Type.EXITED
        elif what == "skip":
            sealed = bytearray(peer.bytes_of(Type.START, (Tag.HANDLE, "evil"), (Tag.ARG, "true"), (Tag.FLAGS, 8)))
            peer.sent -= 1
        elif what == "other key":
            peer.sent -= 1
            body = bytes(sealed[:-16])
            sealed[-16:] = code(SECRET, peer.sent, CLIENT, body)
        elif what == "too long":
            sealed = bytearray(HEADER.pack(MAGIC, Type.START, MAX_PAYLOAD + 1, 1) + bytes(100))
        if what in ("bit", "skip", "too long"):
            peer.sent -= 1
        peer.link.sendall(sealed)
        assert peer.is_silent()
        assert peer.works(), "a right frame after a wrong one is not found"


def test_an_old_session_cannot_be_replayed(listening: str) -> None:
    with connected(listening) as peer:
        hello_nonce = bytes(16)
        recorded = frame(SECRET, 0, CLIENT, Type.HELLO, 0, pack([(Tag.NONCE, hello_nonce), (Tag.SECRET, SECRET)]))
        peer.link.sendall(recorded)
        first = peer.receive()
        peer.key = session_key(SECRET, hello_nonce, first.fields.bytes(Tag.TOKEN))
        peer.parser.expect(peer.key)
        start = peer.bytes_of(Type.START, (Tag.HANDLE, "once"), (Tag.ARG, "true"), (Tag.FLAGS, 8))
        peer.link.sendall(start)
        assert peer.receive().kind == Type.EXITED
    with connected(listening) as again:
        again.link.sendall(recorded)
        assert again.receive().kind == Type.WELCOME
        again.link.sendall(start)
        assert again.is_silent(), "the agent's nonce does not enter the session's key"


def test_a_higher_epoch_wins_and_a_lower_one_is_told(listening: str) -> None:
    with connected(listening) as older, connected(listening) as newer, connected(listening) as oldest:
        assert older.hello(epoch=3).kind == Type.WELCOME
        assert newer.hello(epoch=4, first=False).kind == Type.WELCOME
        assert older.receive().kind == Type.STALE
        assert oldest.hello(epoch=2, first=False).kind == Type.STALE
        assert newer.works(), "the refused one threw out the right one"


@pytest.mark.parametrize("left", ["header", "half a frame", "whole frame", "garbage", "nothing"])
def test_a_new_client_on_the_same_wire_is_understood_whatever_the_old_one_left(serial: Peer, left: str) -> None:
    assert serial.hello().kind == Type.WELCOME and serial.works()
    sealed = serial.bytes_of(Type.FILE_WRITE, (Tag.DATA, bytes(200_000)))
    rest = {
        "header": sealed[:20],
        "half a frame": sealed[:100_000],
        "whole frame": sealed[:-16] + bytes(16),
        "garbage": secrets.token_bytes(5000) + MAGIC,
        "nothing": b"",
    }[left]
    again = Peer(serial.link)
    assert again.hello(epoch=2, first=False, before=rest).kind == Type.WELCOME
    assert again.works()


def test_a_client_finds_its_welcome_behind_what_the_agent_sent_to_another(serial: Peer) -> None:
    serial.hello()
    serial.link.sendall(
        serial.bytes_of(
            *(Type.START, (Tag.HANDLE, "flood"), (Tag.ARG, "sh"), (Tag.ARG, "-c"), (Tag.MAX_OUTPUT, 4 << 20)),
            (Tag.ARG, "head -c 3000000 /dev/zero"),
            (Tag.FLAGS, int(Start.STREAM)),
        )
    )
    serial.link.recv(3)
    again = Peer(serial.link)
    assert again.hello(epoch=2, first=False).kind == Type.WELCOME
    assert again.works()


@pytest.mark.parametrize("how", ["killed", "fenced"])
def test_a_job_of_a_client_that_is_gone_answers_nobody(listening: str, how: str, tmp_path: Path) -> None:
    """The first client's list is stopped half-way; it goes on once the next one has asked under the same number."""
    for number in range(3000):
        (tmp_path / f"{number:04}").touch()
    with connected(listening) as peer:
        with connected(listening) as dead:
            dead.hello()
            listing = dead.bytes_of(Type.FILE_LIST, (Tag.PATH, str(tmp_path)), request=1)
            dead.link.sendall(listing + dead.bytes_of(Type.PAUSE, request=2))
            assert dead.receive().request == 2, "the list was answered before all stood still"
            if how == "fenced":
                assert peer.hello(epoch=2, first=False).kind == Type.WELCOME
        if how == "killed":
            assert peer.hello(first=False).kind == Type.WELCOME
        peer.link.sendall(peer.bytes_of(Type.RESUME, request=9))
        assert peer.receive().request == 9
        start = ((Tag.HANDLE, "long"), (Tag.ARG, "sleep"), (Tag.ARG, "0.5"), (Tag.FLAGS, int(Start.WAIT)))
        peer.link.sendall(peer.bytes_of(Type.START, *start, request=1))
        answer = peer.receive()
        assert (answer.request, answer.kind, answer.fields.text(Tag.HANDLE)) == (1, Type.EXITED, "long")
