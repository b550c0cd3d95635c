"""What the referee asks of others: how likely an answer is right, and more text to judge it by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rorqual.referee.answer import Answer, Asked
from rorqual.referee.policy import Evidence


class Confidence(Protocol):
    """A calibrated estimate. Rule 9 acts on it: p <= loss_ratio / (1 + loss_ratio) is not answered."""

    async def estimate(self, request: Asked, answer: Answer) -> float | None:
        """The probability that the answer is right; None when it cannot tell."""
        ...


class Retriever(Protocol):
    """Finds text that an answer can rest on."""

    async def retrieve(self, request: Asked, answer: Answer) -> Sequence[Evidence]: ...
