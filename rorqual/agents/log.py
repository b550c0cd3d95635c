"""One trajectory's part of a journal: what is recorded so far, in order, and the one way to record more.

The log is read once, when a run is opened. What the loop asked for and got (tokens, calls, results, the time) is
handed out again in order; facts about the sandbox stand beside it. New records are durable when `write` returns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rorqual.agents.errors import AgentError
from rorqual.journal import Journal
from rorqual.journal.records import (
    Attach,
    Close,
    EnvSnapshot,
    Event,
    PolicySwitch,
    Record,
    Request,
    Resume,
    Tokens,
    ToolCall,
    ToolResult,
)

ASKED = ("now", "random", "uuid", "turn_ended", "turn_restarted")
"""Kinds of events that are answers to the loop, and so are handed out again in order."""


@dataclass(frozen=True)
class SnapshotFact:
    """A durable snapshot. calls_before: how many calls had their results when it was taken."""

    sandbox_id: str
    snapshot_id: str
    kind: str
    calls_before: int


@dataclass
class Facts:
    """What the log says besides the trajectory itself."""

    epochs: int = 0
    """How many processes have driven this trajectory."""
    sandbox: dict[str, Any] | None = None
    """The last sandbox: id, driver, incarnation."""
    snapshots: list[SnapshotFact] = field(default_factory=list)
    generation: int = 0
    """How often the sandbox's state was taken back; part of the keys of calls made since."""
    restoring: bool = False
    """Whether the last such attempt has no end on record."""
    calls: list[ToolCall] = field(default_factory=list)
    results: dict[int, ToolResult] = field(default_factory=dict)
    model: dict[str, Any] | None = None
    """The model that took over last, where another one than the request's did: model, fingerprint, version."""
    verdict: dict[str, Any] | None = None
    """What a judge said of the finished work."""
    closed: Close | None = None


class TrajectoryLog:
    """The records of request `number`, and writing more of them.

    Raises: AgentError when a record cannot belong where it stands (the journal is of another program).
    """

    def __init__(self, journal: Journal, number: int = 1) -> None:
        self.journal, self.number = journal, number
        self.pending: deque[Record] = deque()
        self.facts = Facts()
        self.request: Request | None = None
        for _, record in journal.replay():
            if _owner(record) in (None, number):
                self._take(record)
        self.was_empty = self.request is None

    @property
    def durable_lsn(self) -> int:
        """Up to where everything survives whatever comes."""
        return self.journal.durable_lsn

    def write(self, *records: Record) -> None:
        """Record these; durable on return. Raises: JournalError when that failed, and then nothing may be acted on."""
        for record in records:
            self.journal.append(record)
        self.journal.commit()
        for record in records:
            self._note(record)

    def event(self, kind: str, /, **fields: Any) -> Event:
        """An event of this trajectory."""
        return Event(kind, {"request": self.number, **fields})

    def attach(self, owner: str) -> int:
        """Record that this process drives the trajectory from now on; returns its epoch, from 1."""
        epoch = self.facts.epochs + 1
        records: list[Record] = [Attach(owner, epoch)]
        if not self.was_empty:
            records.append(Resume("start", self.durable_lsn, "C", self.number))
        self.write(*records)
        return epoch

    def next(self, *types: type[Record]) -> Record | None:
        """The next answer on record if it is one of these types; it stays until `take`."""
        record = self.pending[0] if self.pending else None
        return record if isinstance(record, types) else None

    def next_event(self, kind: str) -> dict[str, Any] | None:
        """The fields of the next answer on record if it is an event of this kind; takes it."""
        record = self.pending[0] if self.pending else None
        if isinstance(record, Event) and record.kind == kind:
            self.pending.popleft()
            return record.fields
        return None

    def take(self) -> Record:
        """Take the next answer off the record."""
        return self.pending.popleft()

    @property
    def is_live(self) -> bool:
        """Whether everything on record has been handed out."""
        return not self.pending

    def _take(self, record: Record) -> None:
        self._note(record)
        if isinstance(record, Request):
            if self.request is not None:
                raise AgentError(f"request {self.number} was begun twice in one journal; it is damaged or not a run's.")
            self.request = record
        elif isinstance(record, Tokens | PolicySwitch | ToolCall | ToolResult) or (
            isinstance(record, Event) and record.kind in ASKED
        ):
            self.pending.append(record)

    def _note(self, record: Record) -> None:
        facts = self.facts
        if isinstance(record, Attach):
            facts.epochs = max(facts.epochs, record.epoch)
        elif isinstance(record, ToolCall):
            facts.calls.append(record)
        elif isinstance(record, ToolResult):
            facts.results[record.call_index] = record
        elif isinstance(record, EnvSnapshot):
            facts.snapshots.append(SnapshotFact(record.sandbox_id, record.snapshot_id, record.kind, len(facts.results)))
        elif isinstance(record, Close):
            facts.closed = record
        elif isinstance(record, Event):
            self._note_event(record)

    def _note_event(self, event: Event) -> None:
        facts = self.facts
        if event.kind == "sandbox":
            facts.sandbox = event.fields
        elif event.kind == "generation":
            facts.generation, facts.restoring = event.fields["generation"], event.fields["restoring"]
        elif event.kind == "model":
            facts.model = event.fields
        elif event.kind == "verdict":
            facts.verdict = event.fields["verdict"]
        elif event.kind == "restored":
            facts.restoring = False


def _owner(record: Record) -> int | None:
    """The request a record belongs to; None for those of the whole journal."""
    if isinstance(record, Event):
        found = record.fields.get("request")
        return found if isinstance(found, int) else None
    return getattr(record, "request", None)
