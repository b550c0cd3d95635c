"""Where records of the disk cache lie, and how the system is told to read them before they are wanted."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.engine.store.records import Header
from rorqual.engine.store.segments import Segment

AHEAD_BYTES = 256 << 20
"""No more than this is asked for before it is known to be wanted."""

SCATTERED_BYTES = 2 << 20
"""Pieces of a file shorter than this are announced to the system, which cannot guess where the next one lies. A long
one is read sooner without: asked for all of it at once, the system goes through its list before the first byte.
"""


@dataclass(eq=False, slots=True)
class Stored:
    """Where a record lies, from `offset` up to `end`."""

    segment: Segment
    offset: int
    header: Header
    end: int = 0

    def __post_init__(self) -> None:
        self.end = self.offset + self.header.nbytes


def spans_of(stored: Sequence[Stored]) -> list[tuple[int, int]]:
    """From which of these records up to which they lie one behind the other, all of one size."""
    out: list[tuple[int, int]] = []
    first, at, segment, size = 0, -1, None, (-1, -1)
    for i, one in enumerate(stored):
        own = one.end - one.offset, one.header.content_bytes
        if one.offset != at or one.segment is not segment or own != size:
            if i:
                out.append((first, i))
            first, segment, size = i, one.segment, own
        at = one.end
    return [*out, (first, len(stored))] if stored else []


def announce(stored: Sequence[Stored], spans: Sequence[tuple[int, int]]) -> None:
    """Let the system fetch scattered pieces of what will be read while the first pages are checked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for first, end in spans[1:]:
        fd, begin = stored[first].segment.fd, stored[first].offset
        if fd >= 0 and stored[end - 1].end - begin <= SCATTERED_BYTES:
            os.posix_fadvise(fd, begin, stored[end - 1].end - begin, os.POSIX_FADV_WILLNEED)


def read_ahead(path: Path, offset: int, num_bytes: int, least: int) -> None:
    """Let the system begin to read so many bytes of a file, if there are more than `least`.

    A thread sends them nowhere: the file is read from front to back in the system's own way, and nothing is copied.
    On a single processor that would only be in the way.
    """
    num_bytes = min(num_bytes, AHEAD_BYTES)
    if sys.platform == "linux" and num_bytes > least and len(os.sched_getaffinity(0)) > 1:
        threading.Thread(target=_send_nowhere, args=(path, offset, num_bytes)).start()


def _send_nowhere(path: Path, offset: int, num_bytes: int) -> None:
    with (
        contextlib.suppress(OSError),
        open(path, "rb", buffering=0) as file,
        open(os.devnull, "wb", buffering=0) as out,
    ):
        end = offset + num_bytes
        while offset < end and (sent := os.sendfile(out.fileno(), file.fileno(), offset, end - offset)):
            offset += sent
