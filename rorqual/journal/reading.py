"""Records out of segments, in order, each checked. Damage raises; nothing is skipped."""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rorqual.errors import JournalError
from rorqual.journal import columns, frames
from rorqual.journal.records import Record, decode
from rorqual.journal.recovery import Recovered, check_header, damaged, recover
from rorqual.journal.segments import Bytes, Segment, list_segments
from rorqual.journal.state import State
from rorqual.journal.tokens import HAS_LOGPROBS, ONE_TOKEN, Tokens

_ONE_TOKEN_FRAME = struct.Struct(f"{frames.HEAD.format}{ONE_TOKEN.format[1:]}I")

Payload = tuple[int, int, bytes, int]
"""LSN, type, payload, and byte offset of its frame (0 in a compacted segment)."""


@dataclass(frozen=True, slots=True)
class Place:
    """A frame's place in a segment: byte and LSN."""

    offset: int
    lsn: int


class _Walk:
    """The frames of a segment that is not compacted, of which each is checked."""

    def __init__(self, segment: Segment, end: int | None, start: Place | None) -> None:
        self._segment, self._end = segment, end
        self._file = Bytes(segment.path)
        self.data = self._file.data if end is None else self._file.data[:end]
        self._start = start or Place(frames.FILE_HEADER_BYTES, segment.first_lsn)
        self._stop = 2**64 if segment.stop_lsn is None else segment.stop_lsn

    def __iter__(self) -> Iterator[frames.Found]:
        with self._file:
            seed = check_header(self._file.data, self._segment).seed
            at, lsn = self._start.offset, self._start.lsn
            for found in frames.iterate(self.data, at, lsn, seed, self._stop):
                yield found
                at, lsn = found[4] + frames.CRC_BYTES, found[0] + 1
            self._check_end(at, lsn, seed)

    def records(self, since: int) -> Iterator[tuple[int, Record]]:
        """Decoded, those with LSN > `since`. Frames of one token, which are nearly all, are read in one go."""
        with self._file:
            seed = check_header(self._file.data, self._segment).seed
            at, lsn, stop, size = self._start.offset, self._start.lsn, self._stop, _ONE_TOKEN_FRAME.size
            view, read, crc32 = self.data, _ONE_TOKEN_FRAME.unpack_from, zlib.crc32
            body, last = size - frames.CRC_BYTES, len(view) - size
            read_head, last_head = frames.HEAD.unpack_from, len(view) - frames.FRAME_BYTES
            expected = (ONE_TOKEN.size, Tokens.TYPE, 1, HAS_LOGPROBS, frames.MAGIC)
            while lsn < stop:
                if at <= last:
                    one = read(view, at)
                    magic, kind, _, _, length, found, request, first, count, flags, version, token, logprob, crc = one
                    is_one = found == lsn and (length, kind, count, flags, magic) == expected
                    if is_one and crc32(view[at : at + body], seed) == crc:
                        if lsn > since:
                            yield lsn, Tokens(request, first, version, (token,), (logprob,))
                        at, lsn = at + size, lsn + 1
                        continue
                if at > last_head:
                    break
                magic, kind, _, _, length, found = read_head(view, at)
                behind = at + frames.HEAD_BYTES + length
                if magic != frames.MAGIC or found != lsn or behind + frames.CRC_BYTES > len(view):
                    break
                if crc32(view[at:behind], seed).to_bytes(4, "little") != view[behind : behind + frames.CRC_BYTES]:
                    break
                if lsn > since:
                    yield lsn, decode_record(self._segment, kind, view[at + frames.HEAD_BYTES : behind], at)
                at, lsn = behind + frames.CRC_BYTES, lsn + 1
            self._check_end(at, lsn, seed)

    def _check_end(self, at: int, lsn: int, seed: int) -> None:
        is_sealed = self._segment.stop_lsn is not None
        if (is_sealed and lsn != self._stop) or (self._end is not None and at != self._end):
            prefix = frames.whole_frames(self.data, at, lsn, seed, self._stop)
            raise damaged(self._segment, prefix, "The segment is sealed" if is_sealed else "It was committed")


def _walk(segment: Segment, end: int | None, start: Place | None) -> _Walk | Segment:
    """The walk over a segment, or its columnar file where it has become one."""
    if segment.is_columnar:
        return segment
    try:
        return _Walk(segment, end, start)
    except FileNotFoundError:  # compacted since the folder was listed
        return replace(segment, path=columns.path_of(segment))


def read_segment(
    segment: Segment, since: int = 0, end: int | None = None, start: Place | None = None
) -> Iterator[Payload]:
    """Payloads with LSN > `since`, from `start` on.

    The last segment needs `end`, the byte behind its last durable record; the others end where the next one begins.
    Raises: JournalError with segment and offset where the segment does not hold what it must.
    """
    walk = _walk(segment, end, start)
    if isinstance(walk, Segment):
        yield from _read_columnar(walk, since)
        return
    data = walk.data
    for lsn, kind, _, begin, behind in walk:
        if lsn > since:
            yield lsn, kind, bytes(data[begin:behind]), begin - frames.HEAD_BYTES


def _read_columnar(segment: Segment, since: int) -> Iterator[Payload]:
    lsn = segment.first_lsn - 1
    for lsn, kind, _, payload in columns.read_columns(segment):
        if lsn > since:
            yield lsn, kind, payload, 0
    if segment.stop_lsn is not None and lsn + 1 != segment.stop_lsn:
        raise JournalError(
            f"{segment.name} ends with LSN {lsn}, but the next segment begins with {segment.stop_lsn}. A segment is "
            f"missing between them: put it back, or take the trajectories in it as failed.",
            segment=segment.name,
            offset=0,
        )


def read_records(segment: Segment, since: int = 0, end: int | None = None) -> Iterator[tuple[int, Record]]:
    """Like `read_segment`, decoded."""
    walk = _walk(segment, end, None)
    if isinstance(walk, Segment):
        for lsn, kind, payload, at in _read_columnar(walk, since):
            yield lsn, decode_record(segment, kind, payload, at)
        return
    yield from walk.records(since)


def decode_record(segment: Segment, kind: int, payload: frames.Buffer, at: int) -> Record:
    """Raises: JournalError when a payload whose checksum is right is no record."""
    try:
        return decode(kind, payload)
    except ValueError as error:
        raise JournalError(
            f"{segment.name} holds at byte {at}, with a right checksum, what is no record: {error}. A later version "
            f"may have written it; read the journal with that one.",
            segment=segment.name,
            offset=at,
        ) from None


def judge_last(segment: Segment, state: State | None) -> Recovered:
    """What of the last segment counts, also while somebody writes it.

    Raises: JournalError when committed records in it are damaged.
    """
    if segment.is_columnar:
        count = columns.num_records(segment)
        return Recovered(segment.path.stat().st_size, segment.first_lsn + count, 0, 0)
    mark = None if state is None else state.mark_of(segment.epoch, segment.first_lsn)
    data = memoryview(segment.path.read_bytes())  # no mapping: a writer that seals the segment cuts what lies behind
    try:
        return recover(data, segment, mark, has_state=state is not None)
    except JournalError:
        now = None if state is None else state.mark_of(segment.epoch, segment.first_lsn)
        if now is None or now == mark:
            raise
        # commits went on while it was read, so a frame may be here that is later than the one before it
        return Recovered(now.offset, now.lsn + 1, 0, 0)


def replay_folder(folder: Path, since: int = 0) -> Iterator[tuple[int, Record]]:
    """Records of a journal without changing it: what opening it for writing would keep, or what is durable so far.

    Raises: JournalError with segment and offset at the first damage; the records before it have been given.
    """
    state = State.load(folder, writable=False)
    for segment in list_segments(folder).segments:
        damage: JournalError | None = None
        end = None
        if segment.stop_lsn is None:
            try:
                end = judge_last(segment, state).end
            except JournalError as error:
                damage, end = error, error.offset
        if end != 0 and (segment.stop_lsn is None or since < segment.stop_lsn - 1):
            yield from read_records(segment, since, end)
        if damage is not None:
            raise damage
