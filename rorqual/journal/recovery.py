"""What of the last segment counts after its writer ended, in whatever way.

The last segment is the only one that may end in a torn tail; those before it were complete and durable before the next
began. Its whole frames from the beginning are kept. What follows them is either

- nothing, or zeros (room that was set aside): the end;
- a torn tail: written, perhaps in part, by a commit that did not come to its end and acknowledged nothing; or what a
  cut of the file left of a frame. It is cut off;
- damage in records that were committed: refused, with the byte. Known from the mark, which says how far the segment was
  durable, and from a later whole frame that proves it (`frames.FIRST_OF_COMMIT`).

A file that is shorter than its mark has been cut: the records wholly before the cut are given, and how many
acknowledged ones are missing is said. Without a state file the rule is the careful one: torn is only a
frame that the file's end cuts, with no whole frame behind it.
"""

from dataclasses import dataclass

from rorqual.errors import JournalError
from rorqual.journal import frames
from rorqual.journal.segments import Segment
from rorqual.journal.state import Mark


@dataclass(frozen=True, slots=True)
class Recovered:
    """The part of the last segment that counts."""

    end: int
    """Byte behind the last record."""
    next_lsn: int
    torn_bytes: int
    """Bytes that are not zero behind it, of a tail that counts for nothing."""
    missing: int
    """Acknowledged records that are gone, because the file was cut."""


def recover(
    data: memoryview, segment: Segment, mark: Mark | None, *, has_state: bool, from_mark: bool = False
) -> Recovered:
    """Judge the last segment's bytes; `mark` is the furthest in it. Nothing is changed.

    from_mark: look only at what lies behind the mark, when the file reaches it: opening takes no longer than that, and
    damage before it is found by whoever reads there, as in sealed segments.

    Raises: JournalError with segment and offset when committed records are damaged.
    """
    size = len(data)
    acknowledged = mark.lsn if mark is not None else segment.first_lsn - 1
    if size < frames.FILE_HEADER_BYTES:
        return Recovered(0, segment.first_lsn, size, acknowledged - segment.first_lsn + 1)
    header = check_header(data, segment)
    if header.flags & frames.UNSYNCED:
        mark = None
    start, lsn = frames.FILE_HEADER_BYTES, segment.first_lsn
    if from_mark and mark is not None and start <= mark.offset <= size:
        start, lsn = mark.offset, mark.lsn + 1
    prefix = frames.whole_frames(data, start, lsn, header.seed)
    used = _used(data, prefix.end)
    missing = max(0, acknowledged - prefix.next_lsn + 1)
    if mark is not None and prefix.end < mark.offset <= size:
        raise damaged(segment, prefix, "Its records were committed, so this is no torn tail")
    if used > prefix.end and not header.flags & frames.UNSYNCED:
        proof = frames.proof_of_commit(data[:used], prefix.end, prefix.next_lsn, header.seed, any_frame=not has_state)
        if proof is not None:
            raise damaged(segment, prefix, f"The frame at byte {proof} proves that it was committed")
        cut_is_known = mark is not None and prefix.end < mark.offset
        if (cut_is_known or not has_state) and not _is_cut(data, prefix.end, used):
            raise damaged(segment, prefix, "The frame is there in full length, so this is no torn tail")
    return Recovered(prefix.end, prefix.next_lsn, used - prefix.end, missing)


def check_header(data: memoryview, segment: Segment) -> frames.FileHeader:
    """The header of a segment's file. Raises: JournalError when it is damaged or not the one of that name."""
    header = frames.decode_file_header(data, segment.name)
    if (header.first_lsn, header.epoch) != (segment.first_lsn, segment.epoch):
        raise JournalError(
            f"{segment.name} says of itself that it begins with LSN {header.first_lsn} in epoch {header.epoch}. It was "
            f"renamed or is another journal's. Give it its own name back, or take it out of the folder.",
            segment=segment.name,
            offset=0,
        )
    return header


def damaged(segment: Segment, prefix: frames.Prefix, why: str) -> JournalError:
    """The refusal of a frame, with its place."""
    return JournalError(
        f"{segment.name} is damaged at byte {prefix.end}: the frame of LSN {prefix.next_lsn} is not whole "
        f"({prefix.fault or 'the data end'}). {why}; records are never skipped. The records before it can be read "
        f"(rorqual journal show); take the trajectories in this segment as failed, or restore the file from a copy.",
        segment=segment.name,
        offset=prefix.end,
    )


def _used(data: memoryview, start: int, step: int = 1 << 16) -> int:
    """Byte behind the last that is not zero, at least `start`."""
    end = len(data)
    while end > start:
        block = bytes(data[max(start, end - step) : end]).rstrip(b"\0")
        if block:
            return max(start, end - step) + len(block)
        end = max(start, end - step)
    return start


def _is_cut(data: memoryview, at: int, used: int) -> bool:
    """Whether the frame at `at` would go on behind the bytes that are there."""
    if used - at < frames.HEAD_BYTES:
        return True
    length = frames.HEAD.unpack_from(data, at)[4]
    return at + frames.FRAME_BYTES + int(length) > used
