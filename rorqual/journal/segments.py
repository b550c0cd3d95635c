"""The files of a journal's folder: names, order, and which of them count.

A segment is named after its first LSN and its writer's epoch: `00000000000000000001-0000000001.seg`, or `.col` once it
is compacted. A segment ends where the next one's first LSN says. Segments of an epoch older than one before them, or
with a first LSN that a newer epoch has too, were written by a writer that had already lost the journal: they are stale
and hold nothing.
"""

import contextlib
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import JournalError

_NAME = re.compile(r"(\d{20})-(\d{10})\.(seg|col)")


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment's file. `stop_lsn`: first LSN of the segment behind it; None for the last."""

    path: Path
    first_lsn: int
    epoch: int
    stop_lsn: int | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name

    @property
    def is_columnar(self) -> bool:
        """Compacted."""
        return self.path.suffix == ".col"


def file_name(first_lsn: int, epoch: int, suffix: str = "seg") -> str:
    """Name of a segment's file; names sort as their LSNs do."""
    return f"{first_lsn:020d}-{epoch:010d}.{suffix}"


@dataclass(frozen=True, slots=True)
class Listing:
    """The segments that count, in order, and the files that do not."""

    segments: list[Segment]
    stale: list[Path]


def list_segments(folder: Path) -> Listing:
    """Raises: JournalError when the folder is none or cannot be read."""
    try:
        names = sorted(entry for entry in os.listdir(folder) if _NAME.fullmatch(entry))
    except OSError as error:
        raise JournalError(
            f"{folder} cannot be read as a journal: {error.strerror}. Give the folder that holds its segments."
        ) from None
    found: dict[tuple[int, int], Path] = {}
    stale: list[Path] = []
    for name in names:
        first, epoch, suffix = _NAME.fullmatch(name).groups()  # type: ignore[union-attr]
        key = int(first), int(epoch)
        if key in found:  # compaction ended, or is, between naming its result (`.col`, sorts first) and removing this
            stale.append(folder / name)
            continue
        found[key] = folder / name
    kept: list[tuple[int, int]] = []
    for key in sorted(found):
        if kept and key[1] < kept[-1][1]:
            stale.append(found[key])
            continue
        if kept and kept[-1][0] == key[0]:
            stale.append(found[kept.pop()])
        kept.append(key)
    segments = [
        Segment(found[key], *key, stop_lsn=kept[number + 1][0] if number + 1 < len(kept) else None)
        for number, key in enumerate(kept)
    ]
    return Listing(segments, stale)


def _mapped(descriptor: int) -> tuple[int, mmap.mmap | None]:
    """A file's length and its bytes; None for an empty one. A writer that seals it makes it shorter, at any time."""
    while True:
        size = os.fstat(descriptor).st_size
        try:
            return size, mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else None
        except ValueError:  # longer than the file: it was cut after it was asked how long it is
            if os.fstat(descriptor).st_size >= size:
                raise


class Bytes:
    """A file's bytes, mapped for reading: `data` has the length the file had when it was opened."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size, self._map = _mapped(descriptor)
        finally:
            os.close(descriptor)
        self.data = memoryview(self._map) if self._map is not None else memoryview(b"")

    def close(self) -> None:
        """Give the mapping back."""
        self.data.release()
        if self._map is not None:
            with contextlib.suppress(BufferError):  # somebody still iterates; the mapping goes when they are done
                self._map.close()

    def __enter__(self) -> "Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
