"""Who wants to see a run while it happens: the terminal, a JSON stream, a test. Nothing here changes the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.chat import Event


@dataclass(frozen=True)
class CallView:
    """A call to be shown. output, flags: once it has ended. replayed: answered from a record."""

    index: int
    tool: str
    arguments: str
    key: str
    output: str | None = None
    exit_code: int | None = None
    flags: int = 0
    replayed: bool = False


@dataclass(frozen=True)
class TurnUsage:
    """Tokens of one turn. cached: of the prompt, where that is known."""

    prompt: int
    cached: int
    completion: int


class Observer:
    """Base of all: ignores everything. `live` is False for what comes from the record of an earlier process."""

    def prompt(self, ids: Sequence[int], live: bool) -> None:
        """The trajectory begins with these ids."""

    def tokens(self, ids: Sequence[int], position: int, live: bool) -> None:
        """Ids of the model from `position` on, which are durable: they are acknowledged by this call."""

    def events(self, events: Sequence[Event], live: bool) -> None:
        """What the ids say."""

    def call(self, call: CallView, live: bool) -> None:
        """A call is on record and about to be made."""

    def result(self, call: CallView, live: bool) -> None:
        """A call has its result, which is durable."""

    def observation(self, ids: Sequence[int], position: int, live: bool) -> None:
        """The ids the model is given from `position` on."""

    def usage(self, usage: TurnUsage, live: bool) -> None:
        """A turn has ended and cost this much."""

    def note(self, text: str) -> None:
        """Something about the platform: a restore, a resume."""
