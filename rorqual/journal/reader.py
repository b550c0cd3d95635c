"""`Reader`: follows a journal while another process writes it, and sees durable records only."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from rorqual.journal import frames
from rorqual.journal.reading import Place, decode_record, judge_last, read_segment
from rorqual.journal.records import Record
from rorqual.journal.segments import Segment, list_segments
from rorqual.journal.state import NAME, State


class Reader:
    """A place in a journal that moves on with `poll` and `follow`.

    path: the journal's folder. since: begin behind this LSN. Nothing is changed and no lock is taken. What a killed
    writer left behind its last acknowledged record appears once a writer has opened the journal and kept it.
    """

    def __init__(self, path: str | os.PathLike[str], since: int = 0) -> None:
        """Raises: JournalError when the folder cannot be read."""
        self.path = Path(path)
        self.lsn = since
        """LSN of the last record that was given."""
        list_segments(self.path)
        self._state: State | None = None
        self._state_inode = -1
        self._place: tuple[str, Place] | None = None  # segment without suffix, and the next frame in it

    def poll(self) -> Iterator[tuple[int, Record]]:
        """Records that are durable now and were not given yet, as (LSN, record).

        Raises: JournalError at damage; polling again raises it again.
        """
        self._refresh()
        for segment in list_segments(self.path).segments:
            if segment.stop_lsn is not None and segment.stop_lsn - 1 <= self.lsn:
                continue
            if segment.stop_lsn is not None:
                yield from self._read(segment, None)
                continue
            end, next_lsn = self._durable_end(segment)
            if next_lsn - 1 > self.lsn:
                yield from self._read(segment, end)
            elif end:  # nothing new: what is known to be durable is not read again, now or at the next record
                self._place = (segment.path.stem, Place(end, next_lsn))

    def follow(self, *, poll_s: float = 0.02, timeout_s: float | None = None) -> Iterator[tuple[int, Record]]:
        """`poll` without end; with `timeout_s`, until nothing has come for so long."""
        heard = time.monotonic()
        while timeout_s is None or time.monotonic() - heard < timeout_s:
            before = self.lsn
            yield from self.poll()
            if self.lsn != before:
                heard = time.monotonic()
            time.sleep(poll_s)

    def close(self) -> None:
        """Give the mapping of `state` back."""
        if self._state is not None:
            self._state.close()
            self._state, self._state_inode = None, -1

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refresh(self) -> None:
        """Map `state` if it is new; a writer that found none made one."""
        try:
            inode = os.stat(self.path / NAME).st_ino
        except FileNotFoundError:
            return
        if inode != self._state_inode:
            self.close()
            self._state, self._state_inode = State.load(self.path, writable=False), inode

    def _durable_end(self, segment: Segment) -> tuple[int, int]:
        """Byte behind the last durable record of the last segment, and the LSN of the record that may come there.

        0 and the segment's first LSN when nothing is known to be durable in it.
        """
        if self._state is None or segment.is_columnar:
            judged = judge_last(segment, self._state)
            return judged.end, judged.next_lsn
        mark = self._state.mark_of(segment.epoch, segment.first_lsn)
        return (0, segment.first_lsn) if mark is None else (mark.offset, mark.lsn + 1)

    def _read(self, segment: Segment, end: int | None) -> Iterator[tuple[int, Record]]:
        start = None
        if self._place is not None and self._place[0] == segment.path.stem and not segment.is_columnar:
            start = self._place[1]
        for lsn, kind, payload, at in read_segment(segment, self.lsn, end, start):
            record = decode_record(segment, kind, payload, at)
            self.lsn = lsn
            if at:
                self._place = (segment.path.stem, Place(at + frames.FRAME_BYTES + len(payload), lsn + 1))
            yield lsn, record
