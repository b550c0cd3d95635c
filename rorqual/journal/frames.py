"""Frames: how a record lies in a segment, and how the whole frames at a segment's beginning are found again.

    file header  64 bytes   magic, version, flags, worker id, epoch, first LSN, creation time, CRC
    frame        20 + n + 4 magic, type, flags, reserved, payload length, LSN; payload; CRC

All little endian. The CRC of a frame is zlib's CRC-32 over header and payload, started from a value drawn from worker
id and epoch: a frame that lies in a payload (a tool may print anything) or in another journal's file is none of this
one. LSNs are dense, so a frame with another LSN than the expected one is none either.

The first frame of each commit has FIRST_OF_COMMIT: when it was written, everything before it was durable. So it proves,
found behind damage, that the damage is in committed records and no torn tail.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from rorqual.errors import JournalError

FILE_MAGIC = b"RQJOURN1"
VERSION = 1
FILE_HEADER_BYTES = 64
UNSYNCED = 1
"""File header flag: written without syncing, so nothing about durability may be concluded from it."""

MAGIC = 0x4D_52_46_A5  # b"\xa5FRM": no text begins so
MAGIC_BYTES = MAGIC.to_bytes(4, "little")
HEAD = struct.Struct("<IBBHIQ")
HEAD_BYTES, CRC_BYTES = HEAD.size, 4
FRAME_BYTES = HEAD_BYTES + CRC_BYTES
FIRST_OF_COMMIT = 1
MOST_PAYLOAD_BYTES = 1 << 30

_FILE = struct.Struct("<8sHH16sQQQ8x")
_CRC = struct.Struct("<I")

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class FileHeader:
    """The first 64 bytes of a segment. `created_ns`: wall time, since 1970."""

    worker: bytes
    epoch: int
    first_lsn: int
    created_ns: int
    flags: int = 0

    def encode(self) -> bytes:
        """64 bytes."""
        head = _FILE.pack(FILE_MAGIC, VERSION, self.flags, self.worker, self.epoch, self.first_lsn, self.created_ns)
        return head + _CRC.pack(zlib.crc32(head))

    @property
    def seed(self) -> int:
        """What the CRC of this segment's frames starts from."""
        return crc_seed(self.worker, self.epoch)


def decode_file_header(data: Buffer, segment: str) -> FileHeader:
    """Raises: JournalError when these are not the 64 bytes of an undamaged header of a known version."""
    head = bytes(data[:FILE_HEADER_BYTES])
    if len(head) < FILE_HEADER_BYTES or zlib.crc32(head[:-4]) != _CRC.unpack(head[-4:])[0] or head[:8] != FILE_MAGIC:
        raise JournalError(
            f"the file header of {segment} is damaged (byte offset 0). Nothing in the segment can be trusted. "
            f"Restore the file from a copy, or take it out of the folder and count its records as lost.",
            segment=segment,
            offset=0,
        )
    _, version, flags, worker, epoch, first_lsn, created_ns = _FILE.unpack(head[:-4])
    if version != VERSION:
        raise JournalError(
            f"{segment} has format version {version}; this program reads version {VERSION}. Use the program that "
            f"wrote it.",
            segment=segment,
            offset=8,
        )
    return FileHeader(worker, epoch, first_lsn, created_ns, flags)


def crc_seed(worker: bytes, epoch: int) -> int:
    """What the CRC of frames of this worker and epoch starts from."""
    return zlib.crc32(worker + epoch.to_bytes(8, "little"))


def encode_frame(kind: int, flags: int, lsn: int, payload: Buffer, seed: int) -> bytes:
    """One frame."""
    body = HEAD.pack(MAGIC, kind, flags, 0, len(payload), lsn) + payload
    return body + zlib.crc32(body, seed).to_bytes(4, "little")


@dataclass(frozen=True, slots=True)
class Prefix:
    """The whole frames from some place of a segment on."""

    end: int
    """Byte behind the last whole frame."""
    next_lsn: int
    fault: str | None
    """Why the frame at `end` is none; None when the data end there."""


def whole_frames(data: Buffer, start: int, lsn: int, seed: int, stop_lsn: int = 2**64) -> Prefix:
    """Walk over frames until the data end, LSN `stop_lsn` is reached or a frame is none. Nothing is decoded."""
    view, unpack, crc32, size = memoryview(data), HEAD.unpack_from, zlib.crc32, len(data)
    at, last_head, from_bytes = start, size - FRAME_BYTES, int.from_bytes
    while at <= last_head and lsn < stop_lsn:
        magic, _, _, _, length, found = unpack(view, at)
        behind = at + HEAD_BYTES + length
        if magic != MAGIC or found != lsn or behind + CRC_BYTES > size:
            break
        if crc32(view[at:behind], seed) != from_bytes(view[behind : behind + CRC_BYTES], "little"):
            break
        at, lsn = behind + CRC_BYTES, lsn + 1
    else:
        return Prefix(at, lsn, None if at == size or lsn == stop_lsn else f"{size - at} bytes are no frame")
    return Prefix(at, lsn, _fault(view, at, lsn, size))


def _fault(view: memoryview, at: int, lsn: int, size: int) -> str:
    magic, _, _, _, length, found = HEAD.unpack_from(view, at)
    if magic != MAGIC:
        return "its magic number is wrong"
    if found != lsn:
        return f"it has LSN {found}"
    if at + FRAME_BYTES + length > size:
        return f"it would have {length} bytes, more than are left"
    return "its checksum is wrong"


Found = tuple[int, int, int, int, int]
"""LSN, type, flags, and where the payload begins and ends."""


def iterate(data: Buffer, start: int, lsn: int, seed: int, stop_lsn: int = 2**64) -> Iterator[Found]:
    """Whole frames from `start` on; ends as `whole_frames` does (ask that for the reason)."""
    view, unpack, crc32, size = memoryview(data), HEAD.unpack_from, zlib.crc32, len(data)
    at, last_head, from_bytes = start, size - FRAME_BYTES, int.from_bytes
    while at <= last_head and lsn < stop_lsn:
        magic, kind, flags, _, length, found = unpack(view, at)
        begin = at + HEAD_BYTES
        behind = begin + length
        if magic != MAGIC or found != lsn or behind + CRC_BYTES > size:
            return
        if crc32(view[at:behind], seed) != from_bytes(view[behind : behind + CRC_BYTES], "little"):
            return
        yield lsn, kind, flags, begin, behind
        at, lsn = behind + CRC_BYTES, lsn + 1


def proof_of_commit(data: Buffer, start: int, lsn: int, seed: int, *, any_frame: bool = False) -> int | None:
    """Where from `start` on a whole frame lies that says LSN `lsn`, before it, was durable; None when nowhere.

    any_frame: take any later whole frame for a proof, also one of the same commit.
    """
    text = bytes(data[start:])
    at = text.find(MAGIC_BYTES)
    while at >= 0:
        if at + FRAME_BYTES <= len(text):
            _, _, flags, _, length, found = HEAD.unpack_from(text, at)
            if (
                (any_frame or flags & FIRST_OF_COMMIT)
                and found > lsn
                and whole_frames(text, at, found, seed, found + 1).end > at
            ):
                return start + at
        at = text.find(MAGIC_BYTES, at + 1)
    return None
