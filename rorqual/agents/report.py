"""What a run's journal says, for people: how far it is, and its calls one by one. Reads only; the run may be live."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rorqual.agents.runs import RunFolder
from rorqual.agents.view import first_line, visible
from rorqual.errors import RorqualError
from rorqual.journal.reading import replay_folder
from rorqual.journal.records import (
    Attach,
    Close,
    Event,
    Preempt,
    Record,
    Tokens,
    ToolCall,
    ToolResult,
)


@dataclass
class RunState:
    """How far a run is. processes: how many have driven it. tokens: that the model wrote."""

    processes: int = 0
    tokens: int = 0
    turns: int = 0
    calls: int = 0
    finished_calls: int = 0
    closed: str | None = None
    preempted: bool = False

    @property
    def word(self) -> str:
        """One word for people."""
        if self.closed is not None:
            return self.closed
        return "preempted" if self.preempted else "unfinished" if self.processes else "new"

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "state": self.word,
            "processes": self.processes,
            "tokens": self.tokens,
            "turns": self.turns,
            "calls": self.calls,
            "finished_calls": self.finished_calls,
        }


def records_of(run: RunFolder) -> Iterator[Record]:
    """Its records in order; none for a run that never began."""
    if run.journal.is_dir():
        for _, record in replay_folder(run.journal):
            yield record


def state_of(run: RunFolder) -> RunState:
    """How far the run is."""
    state = RunState()
    in_turn = False
    for record in records_of(run):
        if isinstance(record, Tokens):
            state.tokens += len(record.ids)
            state.turns += not in_turn
        elif isinstance(record, ToolCall):
            state.calls += 1
        elif isinstance(record, ToolResult):
            state.finished_calls += 1
        elif isinstance(record, Attach):
            state.processes += 1
            state.preempted = False
        elif isinstance(record, Preempt):
            state.preempted = True
        elif isinstance(record, Close):
            state.closed = record.stop_reason
        in_turn = isinstance(record, Tokens) or (in_turn and not isinstance(record, ToolCall | ToolResult))
    return state


def summary_of(run: RunFolder) -> dict[str, Any]:
    """Name, task and state for a list of runs; one that cannot be read has the state `unreadable` and says why."""
    try:
        return {"name": run.name, "task": run.settings.task, **state_of(run).to_dict()}
    except RorqualError as error:
        return {"name": run.name, "task": "", **RunState().to_dict(), "state": "unreadable", "problem": str(error)}


def show_run(run: RunFolder, *, as_json: bool) -> None:
    """Print the run: its task, what happened, and where its results are."""
    state = state_of(run)
    if as_json:
        print(json.dumps({"name": run.name, "task": run.settings.task, **state.to_dict(), "steps": list(steps(run))}))
        return
    print(visible(f"{run.name}: {state.word}\n{run.settings.task}\n"))
    for step in steps(run):
        print(visible("  ".join(f"{value}" for value in step.values() if value not in (None, ""))))
    print(f"\n{state.turns} turns, {state.tokens:,} tokens, {state.calls} calls, {state.processes} processes")
    print(f"results: {run.out()}\njournal: {run.journal}")


def steps(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Calls, results and events of the platform, in order."""
    for record in records_of(run):
        if isinstance(record, ToolCall):
            yield {"what": "call", "index": record.call_index, "tool": record.tool, "arguments": record.arguments}
        elif isinstance(record, ToolResult):
            output = first_line(record.output.decode("utf-8", "replace"))
            yield {"what": "result", "index": record.call_index, "exit_code": record.exit_code, "output": output}
        elif isinstance(record, Event) and record.kind not in ("now", "random", "uuid"):
            fields = {key: value for key, value in record.fields.items() if key != "request"}
            yield {"what": record.kind, **fields}
        elif isinstance(record, Preempt | Close | Attach):
            yield {"what": type(record).__name__.lower(), "why": getattr(record, "stop_reason", "")}
