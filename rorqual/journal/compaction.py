"""Compaction: a sealed segment whose requests are all closed becomes a columnar file, and only then goes.

The file is written under another name, synced, read back and compared with the segment by digest before it gets its
name; the segment is removed after that name is durable. Cut anywhere, one of the two is there and whole.
"""

import fcntl
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from rorqual.errors import JournalError
from rorqual.journal import columns, frames
from rorqual.journal.disk import Disk
from rorqual.journal.reading import judge_last, read_segment
from rorqual.journal.records import Close, request_of
from rorqual.journal.recovery import check_header, damaged
from rorqual.journal.segments import Bytes, Segment, list_segments
from rorqual.journal.state import State

_LOCK = "compacting"
_NEW = ".new"


@dataclass(frozen=True, slots=True)
class Compacted:
    """What one compaction did. Sizes in bytes, of the segments that were compacted."""

    segments: list[str]
    """Names of the segments that were made columnar."""
    bytes_before: int
    bytes_after: int
    open_requests: list[int]
    """Requests without an end, whose segments stay as they are."""


def compact(path: str | os.PathLike[str], *, disk: Disk | None = None) -> Compacted:
    """Make every segment columnar that is sealed and mentions only closed requests; a writer may go on meanwhile.

    Raises: JournalError when the folder cannot be read, a segment is damaged, the disk is full, or another compaction
    runs; what was compacted before stays so.
    """
    folder, disk = Path(path), disk or Disk()
    list_segments(folder)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _compact(folder, disk)
    except BlockingIOError:
        raise JournalError(f"the journal {folder} is being compacted by another process. Wait for its end.") from None
    except OSError as error:
        raise JournalError(
            f"the journal {folder} cannot be compacted: {error.strerror or error}. Nothing is lost: the segments "
            f"that were not compacted are as they were.",
            retryable=True,
        ) from error
    finally:
        os.close(descriptor)


def _compact(folder: Path, disk: Disk) -> Compacted:
    for left in folder.glob(f"*{_NEW}"):
        disk.unlink(left)
    listing = list_segments(folder)
    for path in listing.stale:  # an original whose columnar file is there; stale segments are the writer's to remove
        if path.with_suffix(".col").exists():
            disk.unlink(path)
    mentioned, closed = _requests(folder, listing.segments)
    done, before, after = [], 0, 0
    for segment in listing.segments:
        if segment.is_columnar or segment.stop_lsn is None or not mentioned[segment.name] <= closed:
            continue
        size = segment.path.stat().st_size
        after += _make_columnar(segment, segment.stop_lsn, disk)
        before += size
        done.append(segment.name)
    every: set[int] = set().union(*mentioned.values()) if mentioned else set()
    return Compacted(done, before, after, sorted(every - closed))


def _requests(folder: Path, segments: list[Segment]) -> tuple[dict[str, set[int]], set[int]]:
    """The requests that each segment mentions, and those that are closed in any."""
    mentioned: dict[str, set[int]] = {}
    closed: set[int] = set()
    state = State.load(folder, writable=False)
    for segment in segments:
        if segment.is_columnar:  # was compacted, so all of its requests are closed
            mentioned[segment.name] = set(columns.read_index(segment).requests)
            closed |= mentioned[segment.name]
            continue
        whole = (
            segment if segment.stop_lsn is not None else replace(segment, stop_lsn=judge_last(segment, state).next_lsn)
        )
        mine = mentioned[segment.name] = set()
        for _, kind, payload, _ in read_segment(whole):
            request = request_of(kind, payload)
            if request is not None:
                mine.add(request)
                if kind == Close.TYPE:
                    closed.add(request)
    return mentioned, closed


def _make_columnar(segment: Segment, stop_lsn: int, disk: Disk) -> int:
    """Returns the bytes of the columnar file."""
    with Bytes(segment.path) as file:
        header = check_header(file.data, segment)
        prefix = frames.whole_frames(file.data, frames.FILE_HEADER_BYTES, segment.first_lsn, header.seed, stop_lsn)
        if prefix.next_lsn != stop_lsn:
            raise damaged(segment, prefix, "The segment is sealed")
        data = columns.encode_columns(file.data, segment.first_lsn, stop_lsn)
        digest = hashlib.sha256(file.data[: prefix.end]).digest()
    target = columns.path_of(segment)
    new = target.with_suffix(_NEW)
    descriptor = disk.create(new)
    try:
        disk.write(descriptor, data, 0, synced=True)
    finally:
        disk.close(descriptor)
    if hashlib.sha256(columns.restore(replace(segment, path=new))).digest() != digest:
        disk.unlink(new)
        raise AssertionError(f"{segment.name} does not come back from its columns")
    disk.rename(new, target)
    disk.sync_folder(segment.path.parent)
    disk.unlink(segment.path)
    disk.sync_folder(segment.path.parent)
    return len(data)
