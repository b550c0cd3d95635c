"""A run in the terminal while it happens: thinking, calls, results and cost; plain lines where there is no terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rorqual.agents.cost import Meter
from rorqual.agents.observer import CallView, Observer, TurnUsage
from rorqual.agents.tools.base import OUT_OF_MEMORY, REFUSED, TIMED_OUT
from rorqual.chat import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart

SHOWN_CALLS = 8
THOUGHT_LINES = 8
ARGUMENT_CHARS, OUTPUT_CHARS = 70, 60


class LiveView(Observer):
    """Panels that follow the run. Use as a context manager; what stays on the screen is the last state."""

    def __init__(self, title: str, meter: Meter, console: Console | None = None) -> None:
        self._title, self._meter = title, meter
        self._console = console or Console(stderr=True)
        self._began = time.monotonic()
        self._thought, self._said = "", ""
        self._calls: dict[int, CallView] = {}
        self._notes: list[str] = []
        self._live = Live(self, console=self._console, refresh_per_second=8)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._live.__exit__(*exc)

    def events(self, events: Sequence[Event], live: bool) -> None:
        for event in events:
            if isinstance(event, ReasoningDelta):
                self._thought += event.text
            elif isinstance(event, ContentDelta):
                self._said += event.text
            elif isinstance(event, ToolCallStart):
                self._said += f"\n→ {event.name} "
            elif isinstance(event, ToolCallArguments):
                self._said += event.piece

    def call(self, call: CallView, live: bool) -> None:
        self._calls[call.index] = call
        self._thought = self._said = ""

    def result(self, call: CallView, live: bool) -> None:
        self._calls[call.index] = call

    def usage(self, usage: TurnUsage, live: bool) -> None:
        self._meter.add(usage)

    def note(self, text: str) -> None:
        self._notes = [*self._notes[-2:], text]

    def __rich__(self) -> Group:
        parts: list[Any] = [self._table()] if self._calls else []
        for title, text, style in (("thinking", self._thought, "dim"), ("writing", self._said, "")):
            if text.strip():
                tail = "\n".join(text.strip().splitlines()[-THOUGHT_LINES:])
                parts.append(Panel(Text(visible(tail), style=style), title=title, title_align="left"))
        parts += [Text(visible(note), style="yellow") for note in self._notes]
        seconds = time.monotonic() - self._began
        parts.append(Text(f"{self._meter.text()}, {seconds:,.0f} s", style="dim"))
        return Group(Text(visible(self._title), style="bold", overflow="ellipsis", no_wrap=True), *parts)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False, expand=True)
        for ratio in (None, None, 5, 4):
            table.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
        for index in sorted(self._calls)[-SHOWN_CALLS:]:
            call = self._calls[index]
            table.add_row(state_of(call), call.tool, first_line(call.arguments), first_line(call.output or ""))
        return table


class PlainView(Observer):
    """A line for each call, result and note."""

    def __init__(self, meter: Meter, stream: IO[str] | None = None) -> None:
        self._meter, self._stream = meter, stream or sys.stderr

    def call(self, call: CallView, live: bool) -> None:
        if live:
            self._print(f"{call.index}: {call.tool} {first_line(call.arguments)[:ARGUMENT_CHARS]}")

    def result(self, call: CallView, live: bool) -> None:
        if live:
            self._print(f"{call.index}: {state_of(call)} {first_line(call.output or '')[:OUTPUT_CHARS]}")

    def usage(self, usage: TurnUsage, live: bool) -> None:
        self._meter.add(usage)

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        print(visible(text), file=self._stream, flush=True)


class JsonView(Observer):
    """One JSON object a line: what is printed under `tokens` is durable.

    It never changes again, unless a server that cannot go on within a turn has to begin a broken-off one anew.
    """

    def __init__(self, meter: Meter, stream: IO[str] | None = None) -> None:
        self._meter, self._stream = meter, stream or sys.stdout

    def prompt(self, ids: Sequence[int], live: bool) -> None:
        self._print("prompt", ids=list(ids), position=0, live=live)

    def tokens(self, ids: Sequence[int], position: int, live: bool) -> None:
        self._print("tokens", ids=list(ids), position=position, live=live)

    def observation(self, ids: Sequence[int], position: int, live: bool) -> None:
        self._print("observation", ids=list(ids), position=position, live=live)

    def call(self, call: CallView, live: bool) -> None:
        self._print("call", index=call.index, tool=call.tool, arguments=call.arguments, key=call.key, live=live)

    def result(self, call: CallView, live: bool) -> None:
        self._print(
            "result", index=call.index, key=call.key, output=call.output, exit_code=call.exit_code, flags=call.flags,
            replayed=call.replayed, live=live,
        )  # fmt: skip

    def usage(self, usage: TurnUsage, live: bool) -> None:
        self._meter.add(usage)

    def note(self, text: str) -> None:
        self._print("note", text=text)

    def _print(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._stream, flush=True)


def state_of(call: CallView) -> str:
    """One word for how far a call is."""
    if call.output is None:
        return "running"
    for bit, word in ((REFUSED, "refused"), (TIMED_OUT, "late"), (OUT_OF_MEMORY, "memory")):
        if call.flags & bit:
            return word
    return "ok" if call.exit_code == 0 else "failed"


def first_line(text: str) -> str:
    """The first line that has something in it."""
    return next((visible(line).strip() for line in text.splitlines() if line.strip()), "")


def visible(text: str) -> str:
    """Without control characters: what a tool printed must not steer the user's terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text.replace("\t", "    "))
