"""Segment files of the disk cache: records one behind the other, written by one process and read by any.

Append-only files of some tens of MiB were preferred to one file a page: a prompt's pages lie in a row and are read by
one call, and 8,192 pages of a million tokens need no 8,192 files. A segment is deleted as a whole. Its writer holds a
lock on it while it lives, so others neither delete it nor wonder about its unfinished end; nobody appends to a file
that another process began. A reader that has it open goes on reading when it is deleted.

A segment that its writer has finished gets an index beside it, all its headers in one file under one checksum, so that
a restart reads that instead of a header here and there; without a sound one the segment itself is scanned.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rorqual import log
from rorqual.engine.store import records
from rorqual.engine.store.records import Header

logger = log.get(__name__)

SUFFIXES = (".pages", ".points")
"""Of segments with pages, and with window checkpoints: the two are wanted for different times."""

_MAGIC = b"rorqual cache 1\n"
_HEAD = struct.Struct("<16s16s8s")
HEAD_BYTES = 64
BEGUN_S = 60.0
"""A file without a whole head is younger than this while its writer may still be beginning it."""

_INDEX_MAGIC = b"rorqual index 1\n"
_INDEX = struct.Struct("<16sQ16s")
"""Magic, bytes of the segment, digest of the rest: offset and number of tokens of each record, and its head."""
_AT = struct.Struct("<QI")


def _head(fingerprint: bytes) -> bytes:
    digest = hashlib.blake2b(_MAGIC + fingerprint, digest_size=8).digest()
    return _HEAD.pack(_MAGIC, fingerprint, digest).ljust(HEAD_BYTES, b"\0")


@dataclass(eq=False)
class Segment:
    """An open segment file. `scanned` is where the records known so far end; `used` when one was last wanted."""

    path: Path
    fd: int
    scanned: int = HEAD_BYTES
    used: float = 0.0
    is_own: bool = False
    records: list[bytes] = field(default_factory=list)
    """Index keys of its records."""
    heads: list[bytes] = field(default_factory=list)
    """Of an own segment: offset and head of every record, for the index."""

    @property
    def is_points(self) -> bool:
        return self.path.suffix == ".points"

    @property
    def nbytes(self) -> int:
        """Bytes of the file now; 0 when it is gone."""
        return os.fstat(self.fd).st_size if self.fd >= 0 else 0

    def touch(self, now: float) -> None:
        """Note a use, for other processes too (at most once in ten seconds)."""
        if now - self.used > 10:
            with contextlib.suppress(OSError):  # another user's file: only this process remembers
                os.utime(self.fd, (now, now))
            self.used = now

    def close(self) -> None:
        """Close the file, and with it the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def create(folder: Path, suffix: str, fingerprint: bytes, number: int) -> Segment:
    """A new segment of this process, locked, with its head written."""
    path = folder / f"{time.time_ns():020d}-{os.getpid()}-{number}{suffix}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write(fd, _head(fingerprint), 0)
    except OSError:  # a full disk: neither the file nor its descriptor may stay, since the next record tries again
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return Segment(path, fd, used=time.time(), is_own=True)


def open_segment(path: Path, fingerprint: bytes, strangers: set[str]) -> Segment | None:
    """An existing segment; None when its head is damaged or another model's, said once: its name goes to `strangers`.

    A file that ends within its head holds nothing, for its writer was killed as it began: it is deleted when it is old
    enough that no writer can be about to lock it.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # deleted by another process meanwhile
        return None
    if os.pread(fd, HEAD_BYTES, 0) != _head(fingerprint):
        found = os.fstat(fd)
        if (found.st_size >= HEAD_BYTES or time.time() - found.st_mtime > BEGUN_S) and not is_locked(fd):
            strangers.add(path.name)
            logger.warning("%s is not a segment of this cache (its head is damaged or another's); ignored", path)
            if found.st_size < HEAD_BYTES:
                path.unlink(missing_ok=True)
        os.close(fd)
        return None
    return Segment(path, fd, used=os.fstat(fd).st_mtime)


def is_locked(fd: int) -> bool:
    """Whether a living process other than this one's own lock holds the file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def scan(segment: Segment) -> Iterator[tuple[int, Header]]:
    """(offset, header) of the records behind those scanned before, up to the first that is not whole.

    What is not whole is the unfinished end of a living writer, and left for the next scan, or a torn or damaged rest,
    said once in the log. Contents are checked when they are read.
    """
    size = segment.nbytes
    if segment.scanned == HEAD_BYTES:
        indexed = read_index(segment, size)
        if indexed is not None:
            segment.scanned = size
            yield from indexed
    while segment.scanned < size:
        at = segment.scanned
        head = os.pread(segment.fd, records.HEADER, at)
        count = records.num_tokens(head)
        tokens = b"" if count is None or count > size else os.pread(segment.fd, 4 * count, at + records.HEADER)
        header = records.decode(head, tokens)
        if header is None or at + header.nbytes > size:
            if not segment.is_own and not is_locked(segment.fd):
                logger.warning(
                    "%s: the record at byte %d is torn or damaged; %d bytes from there on are discarded",
                    segment.path, at, size - at,
                )  # fmt: skip
                segment.scanned = size  # never tried again
            return
        segment.scanned = at + header.nbytes
        if header.is_alive:
            yield at, header


def append(segment: Segment, data: bytes | bytearray) -> int:
    """Write a record at the end; returns its offset. Raises OSError when the disk is full, the end is cut back then."""
    at = segment.scanned
    try:
        _write(segment.fd, data, at)
    except OSError:
        os.ftruncate(segment.fd, at)
        raise
    segment.scanned = at + len(data)
    count = records.num_tokens(bytes(data[: records.HEADER])) or 0
    segment.heads.append(_AT.pack(at, count) + data[: records.HEADER + 4 * count])
    return at


def finish(segment: Segment) -> None:
    """Bring an own segment to the disk itself, write its index, and let it go: anybody may delete it now.

    Without room for the index it has none, and whoever opens it reads the segment itself.
    """
    try:
        os.fdatasync(segment.fd)
        _write_index(segment)
    except OSError as error:
        logger.warning("%s has no index beside it (%s)", segment.path, error)
    segment.heads.clear()
    segment.is_own = False
    fcntl.flock(segment.fd, fcntl.LOCK_UN)


def _write_index(segment: Segment) -> None:
    body = b"".join(segment.heads)
    path = _index_path(segment)
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            file.write(_INDEX.pack(_INDEX_MAGIC, segment.scanned, _sum(body)) + body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_index(segment: Segment, size: int) -> list[tuple[int, Header]] | None:
    """What `finish` wrote beside a segment of so many bytes; None when there is no sound index for it.

    A damaged one is discarded with a line in the log; one for another length says that the segment was cut.
    """
    path = _index_path(segment)
    try:
        data = path.read_bytes()
    except OSError:
        return None
    length, records_of = _parse_index(data)
    if records_of is None:
        logger.warning("%s is damaged and has been discarded; the segment itself is read instead", path)
        with contextlib.suppress(OSError):  # another user's file
            path.unlink(missing_ok=True)
    return records_of if length == size else None


def _parse_index(data: bytes) -> tuple[int, list[tuple[int, Header]] | None]:
    """Bytes of the segment that an index was written for, and its records; None for a damaged one."""
    if len(data) < _INDEX.size:
        return 0, None
    magic, length, digest = _INDEX.unpack_from(data)
    body = data[_INDEX.size :]
    if magic != _INDEX_MAGIC or digest != _sum(body):
        return length, None
    out: list[tuple[int, Header]] = []
    at = 0
    while at < len(body):
        offset, count = _AT.unpack_from(body, at)
        head, at = at + _AT.size, at + _AT.size + records.HEADER + 4 * count
        header = records.decode(body[head : head + records.HEADER], body[head + records.HEADER : at])
        if header is None:
            return length, None
        out.append((offset, header))
    return length, out


def _index_path(segment: Segment) -> Path:
    return segment.path.with_name(segment.path.name + ".index")


def _sum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()


def discard(segment: Segment, offset: int) -> None:
    """Mark a record as dead, for every process that opens the file later."""
    with contextlib.suppress(OSError):  # read-only: each process finds out by itself
        _index_path(segment).unlink(missing_ok=True)  # it would call the record alive
        os.pwrite(segment.fd, b"\0", offset + records.ALIVE_AT)


def delete(segment: Segment) -> bool:
    """Remove the file unless another process still writes to it. True when it is gone."""
    if not segment.is_own and is_locked(segment.fd):
        return False
    _index_path(segment).unlink(missing_ok=True)
    segment.path.unlink(missing_ok=True)
    segment.close()
    return True


def _write(fd: int, data: bytes | bytearray, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
