"""The file `state` beside the segments: who may write (an epoch) and how far the journal is durable (marks).

It is mapped into memory by writer and readers, so a mark costs no system call and survives the writer's death at any
instant; after a loss of power it may be older than the segments, never newer, since a mark is set after its sync.
A mark tells damage in committed records from a torn tail, and a reader how far it may read.

Each epoch has two places for marks and uses them by turns: a writer killed within a mark leaves the one before, and one
that lost its journal to a successor can only touch its own places. Mapping needs a file system that one machine sees.
"""

import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from rorqual.journal.disk import Disk

NAME = "state"
STATE_BYTES = 4096
_MAGIC = b"RQSTATE1"
_EPOCH_AT, _MARKS_AT, _MARK_STRIDE, _EPOCH_PLACES = 32, 64, 64, 16
_MARK, _CRC = struct.Struct("<QQQQ"), struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Mark:
    """Bytes before `offset` of the segment that begins with `first_lsn` are durable, and with them records to `lsn`."""

    epoch: int
    first_lsn: int
    offset: int
    lsn: int


class State:
    """An open state file."""

    def __init__(self, path: Path, *, writable: bool, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(descriptor, STATE_BYTES, access=access)
        finally:
            os.close(descriptor)
        self.worker = bytes(self._map[8:24])
        self._turn = 0

    @classmethod
    def load(cls, folder: Path, *, writable: bool, disk: Disk | None = None) -> "State | None":
        """The folder's state; None when there is none or it is no whole state file."""
        path = folder / NAME
        try:
            head = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(head) != STATE_BYTES or head[:8] != _MAGIC or _CRC.unpack_from(head, 24)[0] != zlib.crc32(head[:24]):
            return None
        return cls(path, writable=writable, disk=disk)

    @classmethod
    def create(cls, folder: Path, worker: bytes, epoch: int, disk: Disk) -> "State":
        """A new state file, durable on return. Its bytes are all written, so marks never need room on the disk."""
        head = _MAGIC + worker
        data = (head + _CRC.pack(zlib.crc32(head))).ljust(_EPOCH_AT, b"\0") + epoch.to_bytes(8, "little")
        new = folder / f"{NAME}.tmp"
        disk.unlink(new)
        descriptor = disk.create(new)
        try:
            disk.write(descriptor, data.ljust(STATE_BYTES, b"\0"), 0, synced=True)
        finally:
            disk.close(descriptor)
        disk.rename(new, folder / NAME)
        disk.sync_folder(folder)
        return cls(folder / NAME, writable=True, disk=disk)

    @property
    def epoch(self) -> int:
        """Of the writer that may write."""
        return int.from_bytes(self._map[_EPOCH_AT : _EPOCH_AT + 8], "little")

    def set_epoch(self, epoch: int) -> None:
        """From now on writers of earlier epochs may not write; durable on return."""
        self._map[_EPOCH_AT : _EPOCH_AT + 8] = epoch.to_bytes(8, "little")  # one aligned store
        self._disk.flush(self._map)

    def set_mark(self, epoch: int, first_lsn: int, offset: int, lsn: int) -> None:
        """Note how far this epoch's writer has synced."""
        self._turn ^= 1
        data = _MARK.pack(epoch, first_lsn, offset, lsn)
        at = _MARKS_AT + _MARK_STRIDE * (2 * (epoch % _EPOCH_PLACES) + self._turn)
        self._map[at : at + 36] = data + zlib.crc32(data).to_bytes(4, "little")

    def marks(self) -> list[Mark]:
        """All that can be read, in no order."""
        found = []
        for place in range(2 * _EPOCH_PLACES):
            at = _MARKS_AT + _MARK_STRIDE * place
            data = self._map[at : at + 36]
            mark = Mark(*_MARK.unpack_from(data))
            if mark.epoch and zlib.crc32(data[:32]) == _CRC.unpack_from(data, 32)[0]:
                found.append(mark)
        return found

    def acknowledged(self) -> int:
        """LSN of the last record that the newest writer is known to have acknowledged; 0 when nothing is known."""
        marks = self.marks()
        newest = max((mark.epoch for mark in marks), default=0)
        return max((mark.lsn for mark in marks if mark.epoch == newest), default=0)

    def mark_of(self, epoch: int, first_lsn: int) -> Mark | None:
        """The furthest mark in a segment."""
        own = [mark for mark in self.marks() if (mark.epoch, mark.first_lsn) == (epoch, first_lsn)]
        return max(own, key=lambda mark: mark.lsn, default=None)

    def sync(self) -> None:
        """Make the marks durable too."""
        self._disk.flush(self._map)

    def close(self) -> None:
        """Give the mapping back."""
        self._map.close()
