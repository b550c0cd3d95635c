"""Records out of segments, in order, each checked. Damage raises; nothing is skipped."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rorqual.errors import JournalError
from rorqual.journal import columns, frames
from rorqual.journal.records import Record, decode
from rorqual.journal.recovery import Recovered, check_header, damaged, recover
from rorqual.journal.segments import Bytes, Segment, list_segments
from rorqual.journal.state import State

Payload = tuple[int, int, bytes, int]
"""LSN, type, payload, and byte offset of its frame (0 in a compacted segment)."""


@dataclass(frozen=True, slots=True)
class Place:
    """A frame's place in a segment: byte and LSN."""

    offset: int
    lsn: int


def read_segment(
    segment: Segment, since: int = 0, end: int | None = None, start: Place | None = None
) -> Iterator[Payload]:
    """Payloads with LSN > `since`, from `start` on.

    The last segment needs `end`, the byte behind its last durable record; the others end where the next one begins.
    Raises: JournalError with segment and offset where the segment does not hold what it must.
    """
    if not segment.is_columnar:
        try:
            file = Bytes(segment.path)
        except FileNotFoundError:  # compacted since the folder was listed
            segment = replace(segment, path=columns.path_of(segment))
    if segment.is_columnar:
        yield from _read_columnar(segment, since)
        return
    with file:
        header = check_header(file.data, segment)
        data = file.data if end is None else file.data[:end]
        stop = 2**64 if segment.stop_lsn is None else segment.stop_lsn
        place = start or Place(frames.FILE_HEADER_BYTES, segment.first_lsn)
        at, next_lsn = place.offset, place.lsn
        for lsn, kind, _, begin, behind in frames.iterate(data, at, next_lsn, header.seed, stop):
            if lsn > since:
                yield lsn, kind, bytes(data[begin:behind]), at
            at, next_lsn = behind + frames.CRC_BYTES, lsn + 1
        if (segment.stop_lsn is not None and next_lsn != stop) or (end is not None and at != end):
            prefix = frames.whole_frames(data, at, next_lsn, header.seed, stop)
            why = "The segment is sealed" if segment.stop_lsn is not None else "Its records were committed"
            raise damaged(segment, prefix, why)


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


def read_records(
    segment: Segment, since: int = 0, end: int | None = None, start: Place | None = None
) -> Iterator[tuple[int, Record]]:
    """Like `read_segment`, decoded."""
    for lsn, kind, payload, at in read_segment(segment, since, end, start):
        yield lsn, decode_record(segment, kind, payload, at)


def decode_record(segment: Segment, kind: int, payload: bytes, at: int) -> Record:
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
    """What of the last segment counts. Raises: JournalError when committed records in it are damaged."""
    if segment.is_columnar:
        count = columns.num_records(segment)
        return Recovered(segment.path.stat().st_size, segment.first_lsn + count, 0, 0)
    with Bytes(segment.path) as file:
        mark = None if state is None else state.mark_of(segment.epoch, segment.first_lsn)
        return recover(file.data, segment, mark, has_state=state is not None)


def replay_folder(folder: Path, since: int = 0) -> Iterator[tuple[int, Record]]:
    """Records of a journal that nobody writes, without changing it: what opening it for writing would keep.

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
