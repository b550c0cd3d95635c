"""The loop: the model speaks, its calls are made, their results go back, until it has nothing more to call.

It asks its session for everything and holds nothing else, so running it again from its first line is how a run goes on
after anything (`session.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rorqual.agents.session import Session

DEFAULT_TURNS = 50

Ending = Literal["done", "length", "turns"]
"""`done`: the model answered without a call. `length`: its tokens ran out. `turns`: it still called after the last."""


@dataclass(frozen=True)
class Answer:
    """How the loop ended, and the model's last words."""

    ending: Ending
    text: str
    turns: int


def converse(session: Session, messages: Sequence[Mapping[str, Any]], max_turns: int = DEFAULT_TURNS) -> Answer:
    """Run one task to its end. Raises: as `Session`."""
    session.open(messages)
    text = ""
    for turn in range(1, max_turns + 1):
        reply = session.generate()
        text = reply.content.strip()
        if reply.finish_reason == "length":
            return Answer("length", text, turn)
        if not reply.calls:
            return Answer("done", text, turn)
        session.calls(reply.calls)
    return Answer("turns", text, max_turns)
