"""Records out of segments, in order, each checked. Damage raises; nothing is skipped."""

from collections.abc import Iterator
from pathlib import Path

from rorqual.errors import JournalError
from rorqual.journal import frames
from rorqual.journal.records import Record, decode
from rorqual.journal.recovery import check_header, damaged, recover
from rorqual.journal.segments import Bytes, Segment, list_segments
from rorqual.journal.state import State

Payload = tuple[int, int, bytes, int]
"""LSN, type, payload, and byte offset of its frame."""


def read_segment(segment: Segment, since: int = 0, end: int | None = None) -> Iterator[Payload]:
    """Payloads with LSN > `since`. The last segment needs `end`, the byte behind its last durable record.

    Raises: JournalError with segment and offset where the segment does not hold what it must.
    """
    with Bytes(segment.path) as file:
        header = check_header(file.data, segment)
        data = file.data if end is None else file.data[:end]
        stop = 2**64 if segment.stop_lsn is None else segment.stop_lsn
        at, lsn = frames.FILE_HEADER_BYTES, segment.first_lsn - 1
        for lsn, kind, _, begin, behind in frames.iterate(data, at, segment.first_lsn, header.seed, stop):
            if lsn > since:
                yield lsn, kind, bytes(data[begin:behind]), at
            at = behind + frames.CRC_BYTES
        if (segment.stop_lsn is not None and lsn + 1 != stop) or (end is not None and at != end):
            prefix = frames.whole_frames(data, at, lsn + 1, header.seed, stop)
            why = "The segment is sealed" if segment.stop_lsn is not None else "Its records were committed"
            raise damaged(segment, prefix, why)


def read_records(segment: Segment, since: int = 0, end: int | None = None) -> Iterator[tuple[int, Record]]:
    """Like `read_segment`, decoded."""
    for lsn, kind, payload, at in read_segment(segment, since, end):
        try:
            yield lsn, decode(kind, payload)
        except ValueError as error:
            raise JournalError(
                f"{segment.name} holds at byte {at}, with a right checksum, what is no record: {error}. A later "
                f"version may have written it; read the journal with that one.",
                segment=segment.name,
                offset=at,
            ) from None


def replay_folder(folder: Path, since: int = 0) -> Iterator[tuple[int, Record]]:
    """Records of a journal that nobody writes, without changing it: what opening it for writing would keep."""
    state = State.load(folder, writable=False)
    for segment in list_segments(folder).segments:
        if segment.stop_lsn is not None:
            if segment.stop_lsn - 1 > since:
                yield from read_records(segment, since)
            continue
        with Bytes(segment.path) as file:
            mark = None if state is None else state.mark_of(segment.epoch, segment.first_lsn)
            end = recover(file.data, segment, mark, has_state=state is not None).end
        if end:
            yield from read_records(segment, since, end)
