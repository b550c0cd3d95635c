"""Frames between client and guest agent, as bytes.

A frame is a header of 32 bytes (16 bytes of magic, type, three zero bytes, payload length u32, request id u64; little
endian), the payload, and a 16-byte BLAKE2b code over the running number (u64), the side (0 client, 1 agent), header and
payload. A payload is a row of fields: tag u8, length u32, bytes; numbers take 8 bytes. The same tag may come again.

A hello is sealed with the sandbox's secret, everything after it with `session_key` of the secret and both nonces.
The other side of this file is agent/wire.c, agent/connection.c and the enumerations of agent/agent.h.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

MAGIC = b"\xf7rorqual\x00\xd3\x9e\x51\xc8\x1a\xb6\x01"
HEADER = struct.Struct("<16sB3xIQ")
MAC_BYTES = 16
NONCE_BYTES = 16
KEY_BYTES = 32
MAX_PAYLOAD = 1 << 20
MAX_WELCOME = 1024
"""Payload of a welcome at most: while one is looked for, nothing longer is taken for a frame."""
CLIENT, AGENT = 0, 1


class Type(IntEnum):
    """What a frame asks or tells."""

    HELLO = 1
    START = 2
    WAIT = 3
    WRITE = 4
    CLOSE_STDIN = 5
    KILL = 6
    RESIZE = 7
    ATTACH = 8
    FETCH = 9
    LIST = 10
    FORGET = 11
    FILE_READ = 20
    FILE_WRITE = 21
    FILE_LIST = 22
    FILE_STAT = 23
    FILE_MKDIR = 24
    FILE_MOVE = 25
    FILE_REMOVE = 26
    FILE_LINK = 27
    PORT_OPEN = 30
    PORT_DATA = 31
    PORT_CLOSE = 32
    PING = 40
    PAUSE = 41
    RESUME = 42
    SET_TTL = 43
    POWER_OFF = 44
    REKEY = 45
    SYNC = 46
    WELCOME = 64
    OK = 65
    ERROR = 66
    OUTPUT = 67
    EXITED = 68
    PORT_BYTES = 69
    PORT_ENDED = 70
    STALE = 71


class Tag(IntEnum):
    """What a field holds."""

    NONCE = 1
    EPOCH = 2
    SECRET = 3
    HANDLE = 4
    ARG = 5
    ENV = 6
    CWD = 7
    USER = 8
    TIMEOUT_MS = 9
    MAX_OUTPUT = 10
    FLAGS = 11
    STREAM = 12
    OFFSET = 13
    DATA = 14
    SIGNAL = 15
    COLS = 16
    ROWS = 17
    STATUS = 18
    TIMED_OUT = 19
    DURATION_US = 20
    PAUSED_US = 21
    OUT_TOTAL = 22
    ERR_TOTAL = 23
    OUT_LOST = 24
    ERR_LOST = 25
    OUT_DATA = 26
    ERR_DATA = 27
    PID = 28
    ERRNO = 29
    TEXT = 30
    PATH = 31
    MODE = 32
    LIMIT = 33
    SIZE = 34
    MTIME_US = 35
    TARGET = 36
    KIND = 37
    TOKEN = 38
    DEPTH = 39
    PORT = 40
    ID = 41
    IDLE_MS = 42
    LIFE_MS = 43
    RUNNING = 44
    DONE = 45
    OOM = 46
    NPROC = 47
    NOFILE = 48
    FSIZE = 49
    DATA_LIMIT = 50
    FILTER = 51
    STATE = 52
    TRUNCATED = 53
    HOSTNAME = 54
    ENTROPY = 55
    CPU_LOCKED = 56
    ENTRY = 57
    TIME_US = 58
    IDLE_FOR_MS = 59
    INDEX = 60
    IN_TOTAL = 61
    IN_CLOSED = 62


class Start(IntFlag):
    """How a command is started."""

    PTY = 1
    STDIN = 2
    STREAM = 4
    WAIT = 8
    STATUS_PIPE = 16


Value = bytes | str | int


class Fields:
    """The fields of one payload; a name that is absent reads as empty or 0."""

    def __init__(self, payload: bytes) -> None:
        self._fields = list(_split(payload))

    def all(self, tag: Tag) -> list[bytes]:
        """Every value of `tag`, in order."""
        return [value for found, value in self._fields if found == tag]

    def bytes(self, tag: Tag) -> bytes:
        """The first value of `tag`, or nothing."""
        return next((value for found, value in self._fields if found == tag), b"")

    def has(self, tag: Tag) -> bool:
        """Whether the field is there."""
        return any(found == tag for found, _ in self._fields)

    def text(self, tag: Tag) -> str:
        """The first value as text; bytes that are no UTF-8 are kept as surrogates, as in file names."""
        return self.bytes(tag).decode("utf-8", errors="surrogateescape")

    def number(self, tag: Tag) -> int:
        """The first value as a number below 2**63, whatever the other side wrote there."""
        return int.from_bytes(self.bytes(tag)[:8], "little") & (1 << 63) - 1


def _split(payload: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 5 <= len(payload):
        tag, size = struct.unpack_from("<BI", payload, at)
        if at + 5 + size > len(payload):
            return
        yield tag, payload[at + 5 : at + 5 + size]
        at += 5 + size


def pack(fields: list[tuple[Tag, Value]]) -> bytes:
    """The payload that holds these fields in this order."""
    parts = []
    for tag, value in fields:
        if isinstance(value, int):
            value = value.to_bytes(8, "little")
        elif isinstance(value, str):
            value = value.encode("utf-8", errors="surrogateescape")
        parts.append(struct.pack("<BI", tag, len(value)) + value)
    return b"".join(parts)


def code(key: bytes, number: int, side: int, frame: bytes) -> bytes:
    """The message code of a frame (header and payload)."""
    return hashlib.blake2b(struct.pack("<QB", number, side) + frame, key=key, digest_size=MAC_BYTES).digest()


def session_key(secret: bytes, client_nonce: bytes, agent_nonce: bytes) -> bytes:
    """The key of one connection."""
    return hashlib.blake2b(client_nonce + agent_nonce, key=secret, digest_size=KEY_BYTES).digest()


def frame(key: bytes, number: int, side: int, kind: Type, request: int, payload: bytes) -> bytes:
    """A whole frame, sealed."""
    body = HEADER.pack(MAGIC, kind, len(payload), request) + payload
    return body + code(key, number, side, body)


@dataclass(frozen=True)
class Frame:
    """A received frame whose code was right."""

    kind: int
    request: int
    payload: bytes

    @property
    def fields(self) -> Fields:
        """Its payload taken apart."""
        return Fields(self.payload)


class Forged(Exception):
    """The stream holds something that the agent cannot have sent."""


class Parser:
    """Finds sealed frames of the other side in a stream that may begin with anything.

    Until `expect` is told the session's key it looks for a welcome sealed with the secret; bytes that fit nothing are
    skipped one by one up to the next magic. From then on frame follows upon frame, and anything else is an attack:
    looking on would let the other side hide frames in the data of others, or have us compute codes without end.
    """

    def __init__(self, key: bytes, side: int = AGENT) -> None:
        self.key = key
        self.side = side
        self.number = 0
        self.skipped = 0
        self.hunting = True
        self._buffer = bytearray()

    def expect(self, key: bytes) -> None:
        """From here on frames are sealed with this key, counted from 0."""
        self.key = key
        self.number = 0
        self.hunting = False

    def feed(self, data: bytes) -> None:
        """Adds received bytes."""
        self._buffer += data

    def next(self) -> Frame | None:
        """The next right frame, or None when more bytes are needed. Raises: Forged once the session's key is known."""
        buffer = self._buffer
        while True:
            if self.hunting:
                at = buffer.find(MAGIC)
                skip = at if at >= 0 else len(buffer) - _beginning(buffer)
                self.skipped += skip
                del buffer[:skip]
                if at < 0:
                    return None
            elif bytes(buffer[: len(MAGIC)]) != MAGIC[: len(buffer)]:
                raise Forged("bytes between two frames")
            if len(buffer) < HEADER.size:
                return None
            _, kind, length, request = HEADER.unpack_from(buffer)
            if length <= (MAX_WELCOME if self.hunting else MAX_PAYLOAD):
                whole = HEADER.size + length + MAC_BYTES
                if len(buffer) < whole:
                    return None
                body = bytes(buffer[: HEADER.size + length])
                if hmac.compare_digest(code(self.key, self.number, self.side, body), buffer[whole - MAC_BYTES : whole]):
                    self.number += 1
                    del buffer[:whole]
                    return Frame(kind, request, body[HEADER.size :])
            if not self.hunting:
                raise Forged(f"a frame of {length:,} bytes with a wrong code")
            self.skipped += 1
            del buffer[:1]


def _beginning(buffer: bytearray) -> int:
    """How many bytes at the end could be the first ones of a magic."""
    for size in range(min(len(buffer), len(MAGIC) - 1), 0, -1):
        if buffer[-size:] == MAGIC[:size]:
            return size
    return 0
