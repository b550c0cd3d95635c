"""A piece of an answer on its way: what every dialect's writer is fed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rorqual import chat


@dataclass(frozen=True)
class Piece:
    """An event of the reply, with the log probabilities of the tokens since the last one (None when not asked for)."""

    event: chat.Event
    logprobs: dict[str, Any] | None
