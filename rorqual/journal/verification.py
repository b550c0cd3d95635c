"""`verify`: reads everything a journal holds and says what is wrong with it, without changing anything."""

import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rorqual.errors import JournalError
from rorqual.journal import columns
from rorqual.journal.reading import decode_record, judge_last, read_segment
from rorqual.journal.records import BY_TYPE
from rorqual.journal.segments import Segment, list_segments
from rorqual.journal.state import State


@dataclass(frozen=True, slots=True)
class Problem:
    """Damage, and its place."""

    segment: str
    offset: int | None
    message: str


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One segment, as far as it could be read."""

    name: str
    epoch: int
    first_lsn: int
    num_records: int
    file_bytes: int
    is_columnar: bool
    is_sealed: bool


@dataclass(slots=True)
class Report:
    """What `verify` found."""

    path: str
    segments: list[SegmentReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    records: dict[str, int] = field(default_factory=dict)
    """Number of readable records by type."""
    last_lsn: int = 0
    epoch: int = 0
    torn_bytes: int = 0
    """Of a tail that no commit acknowledged; the next writer cuts it off."""
    missing: int = 0
    """Acknowledged records that are gone, because a file was cut."""
    stale: list[str] = field(default_factory=list)
    """Files that count for nothing: of a writer that had lost the journal, or compacted meanwhile."""
    has_state: bool = True

    @property
    def ok(self) -> bool:
        """No damage, and nothing acknowledged is missing."""
        return not self.problems and not self.missing

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self)}


def verify(path: str | os.PathLike[str]) -> Report:
    """Check every byte that counts. A torn tail is no damage.

    Raises: JournalError when `path` is no readable folder.
    """
    folder = Path(path)
    listing, state = list_segments(folder), State.load(folder, writable=False)
    report = Report(str(folder), stale=[path.name for path in listing.stale], has_state=state is not None)
    counts: Counter[str] = Counter()
    expected = listing.segments[0].first_lsn if listing.segments else 1
    for segment in listing.segments:
        stop_lsn = segment.stop_lsn
        try:
            if stop_lsn is None:
                last = judge_last(segment, state)
                report.torn_bytes, stop_lsn = last.torn_bytes, last.next_lsn
        except JournalError as error:
            report.problems.append(Problem(segment.name, error.offset, str(error)))
        num_records = _read(replace(segment, stop_lsn=stop_lsn), counts, report)
        expected = segment.first_lsn + num_records
        report.segments.append(
            SegmentReport(
                segment.name,
                segment.epoch,
                segment.first_lsn,
                num_records,
                segment.path.stat().st_size,
                segment.is_columnar,
                segment.stop_lsn is not None,
            )
        )
    report.records, report.last_lsn = dict(sorted(counts.items())), expected - 1
    report.epoch = state.epoch if state is not None else max((s.epoch for s in listing.segments), default=0)
    if not report.problems:
        report.missing = max(0, (state.acknowledged() if state is not None else 0) - report.last_lsn)
    if listing.segments and listing.segments[0].first_lsn != 1:
        first = listing.segments[0]
        text = f"the journal begins with LSN {first.first_lsn}: the segments before {first.name} are missing."
        report.problems.insert(0, Problem(first.name, 0, text))
    return report


def _read(segment: Segment, counts: Counter[str], report: Report) -> int:
    """Read and decode a segment to its end or first damage; the number of records."""
    number = 0
    try:
        for _, kind, payload, at in read_segment(segment):
            decode_record(segment, kind, payload, at)
            counts[BY_TYPE[kind].__name__] += 1
            number += 1
        if segment.is_columnar:
            columns.restore(segment)
    except JournalError as error:
        if not any(problem.segment == segment.name for problem in report.problems):
            report.problems.append(Problem(segment.name, error.offset, str(error)))
    return number
