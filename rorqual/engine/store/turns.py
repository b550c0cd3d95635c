"""Sampled turns: so that a conversation that a client sends back as text hits, although it was sampled as tokens.

A model may sample "un" "able" where the tokenizer would write "unable". The client returns the text, its ids differ,
and everything behind them misses. Between two control tokens a text is one run, so the store remembers, for every
sampled run that the tokenizer would have cut otherwise, its bytes and its ids, keyed by all ids before it: the same
beginning followed by the same bytes is the same turn. Replacing never changes the text. Source: ds4's memory of
sampled bytes.

A file of records, appended to; what is torn is skipped, and it is written anew when half of it is old.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rorqual import log

logger = log.get(__name__)

_MAGIC = b"RQt1"
_RECORD = struct.Struct("<4sII16s")
"""Magic, crc32 of key, byte count and ids, number of ids, key; then bytes of the run (uint32), then the ids."""


class TurnTokenizer(Protocol):
    """What the store needs of a tokenizer; `rorqual.tokenizer.Tokenizer` has it."""

    @property
    def control_token_ids(self) -> frozenset[int]: ...
    @property
    def byte_lengths(self) -> NDArray[np.int64]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str, allow_special: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Replaced:
    """A run whose ids were put back as sampled: tokens [begin, end) of the result."""

    begin: int
    end: int
    num_before: int
    """How many ids the run had as the tokenizer writes it."""


class TurnStore:
    """Remembers at most `budget` bytes of sampled runs, in `path` too where one is given."""

    def __init__(self, tokenizer: TurnTokenizer, path: str | Path | None = None, budget: int = 16 << 20) -> None:
        self.budget = budget
        self.path = None if path is None else Path(path)
        self._tokenizer = tokenizer
        self._turns: OrderedDict[bytes, tuple[int, NDArray[np.int32]]] = OrderedDict()  # key -> run's bytes, ids
        self._lengths: dict[int, int] = {}  # how many remembered runs have so many bytes: most runs need no look-up
        self._nbytes = 0
        self._lock = threading.Lock()  # requests are restored on callers' threads, outputs remembered on the engine's
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._load(self.path)

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def nbytes(self) -> int:
        """Bytes of all remembered runs as they stand in the file."""
        return self._nbytes

    def remember(self, ids: Sequence[int], start: int, scope: str = "") -> int:
        """Remember what was sampled: `ids` is the whole sequence, sampling began at `start`. Returns the runs kept."""
        kept = 0
        for begin, end, key, data in self._runs(np.asarray(ids, dtype=np.int32), start, scope):
            if end <= start:
                continue
            own = np.asarray(ids[begin:end], dtype=np.int32)
            try:
                canonical = self._tokenizer.encode(data.decode("utf-8"), allow_special=False)
            except UnicodeDecodeError:  # a cut character: no client can send this text back
                continue
            if canonical != own.tolist():
                with self._lock:
                    self._keep(key, len(data), own)
                    self._append(key, len(data), own)
                kept += 1
        return kept

    def restore(self, ids: Sequence[int], scope: str = "") -> tuple[list[int], list[Replaced]]:
        """A rendered prompt's ids with remembered runs as they were sampled, and which those are.

        The result stands for the same bytes.
        """
        if not self._turns:
            return list(ids), []
        source = np.asarray(ids, dtype=np.int32)
        out: list[NDArray[np.int32]] = []
        replaced: list[Replaced] = []
        before = hashlib.blake2b(scope.encode(), digest_size=16)
        at = 0
        bytes_before = np.concatenate([[0], np.cumsum(self._tokenizer.byte_lengths[source])])
        for begin, end in self._bounds(source):
            run = source[begin:end]
            if end > begin and int(bytes_before[end] - bytes_before[begin]) in self._lengths:
                with self._lock:
                    found = self._turns.get(_key(before, self._bytes(run)))
                if found is not None:
                    replaced.append(Replaced(at, at + len(found[1]), end - begin))
                    run = found[1]
            piece = np.concatenate([run, source[end : end + 1]])  # with the control token that ends it
            before.update(piece.tobytes())
            at += len(piece)
            out.append(piece)
        return np.concatenate(out).tolist() if out else [], replaced

    def _bounds(self, ids: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
        """Begin and end of every run between control tokens, empty ones included."""
        control = np.fromiter(self._tokenizer.control_token_ids, dtype=np.int32)
        begin = 0
        for end in [*np.flatnonzero(np.isin(ids, control)).tolist(), len(ids)]:
            yield begin, end
            begin = end + 1

    def _runs(self, ids: NDArray[np.int32], start: int, scope: str) -> Iterator[tuple[int, int, bytes, bytes]]:
        """(begin, end, key, bytes) of every run with text that ends behind `start`."""
        before = hashlib.blake2b(scope.encode(), digest_size=16)
        for begin, end in self._bounds(ids):
            if end > max(begin, start):
                data = self._bytes(ids[begin:end])
                yield begin, end, _key(before, data), data
            before.update(ids[begin : end + 1].tobytes())

    def _bytes(self, run: NDArray[np.int32]) -> bytes:
        token_bytes = self._tokenizer.token_bytes
        return b"".join([token_bytes(i) for i in run.tolist()])

    def _keep(self, key: bytes, length: int, ids: NDArray[np.int32]) -> None:
        self._forget(key)
        self._turns[key] = (length, ids)
        self._lengths[length] = self._lengths.get(length, 0) + 1
        self._nbytes += _size(ids)
        while self._nbytes > self.budget:
            self._forget(next(iter(self._turns)))

    def _forget(self, key: bytes) -> None:
        old = self._turns.pop(key, None)
        if old is not None:
            self._nbytes -= _size(old[1])
            self._lengths[old[0]] -= 1
            if not self._lengths[old[0]]:
                del self._lengths[old[0]]

    # The file

    def _append(self, key: bytes, length: int, ids: NDArray[np.int32]) -> None:
        if self.path is None or not len(self._turns):
            return
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, _record(key, length, ids))  # one call: whole, or recognised as torn
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
            if size > 2 * max(self._nbytes, 1 << 16):
                self._rewrite(self.path)
        except OSError as error:
            logger.warning("sampled turns could not be written to %s (%s); they are kept in memory", self.path, error)

    def _rewrite(self, path: Path) -> None:
        """Write what is remembered into a new file and put it in the old one's place."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
        with open(temporary, "wb") as file:
            for key, (length, ids) in self._turns.items():
                file.write(_record(key, length, ids))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def _load(self, path: Path) -> None:
        data = b""
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
        at, lost = 0, 0
        while at < len(data):
            found = _parse(data, at)
            if found is None:
                behind = data.find(_MAGIC, at + 1)
                behind = len(data) if behind < 0 else behind
                lost += behind - at
                at = behind
                continue
            key, length, ids, at = found
            self._keep(key, length, ids)
        if lost:
            logger.warning("%s: %d bytes of sampled turns are torn or damaged and have been discarded", path, lost)


def _key(before: Any, data: bytes) -> bytes:  # Any: a hash object of hashlib
    digest = before.copy()
    digest.update(b"\0run\0" + data)
    return bytes(digest.digest())


def _size(ids: NDArray[np.int32]) -> int:
    return _RECORD.size + 4 + 4 * len(ids)


def _record(key: bytes, length: int, ids: NDArray[np.int32]) -> bytes:
    rest = struct.pack("<I", length) + ids.astype("<i4").tobytes()
    return _RECORD.pack(_MAGIC, zlib.crc32(key + rest), len(ids), key) + rest


def _parse(data: bytes, at: int) -> tuple[bytes, int, NDArray[np.int32], int] | None:
    """The record at `at`: key, bytes of the run, ids, and where the next begins; None when it is not whole."""
    if len(data) - at < _RECORD.size:
        return None
    magic, crc, count, key = _RECORD.unpack_from(data, at)
    begin, end = at + _RECORD.size, at + _RECORD.size + 4 + 4 * count
    if magic != _MAGIC or end > len(data) or zlib.crc32(key + data[begin:end]) != crc:
        return None
    ids = np.frombuffer(data, dtype="<i4", count=count, offset=begin + 4).astype(np.int32)
    return key, int(struct.unpack_from("<I", data, begin)[0]), ids, end
