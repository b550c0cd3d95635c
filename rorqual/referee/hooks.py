"""What the referee asks of others: how likely an answer is right, and more text to judge it by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rorqual.referee.answer import Answer, Asked
from rorqual.referee.policy import Evidence


class Confidence(Protocol):
    """A calibrated estimate. Rule 9 acts on it: p <= loss_ratio / (1 + loss_ratio) is not answered.

    An attribute `request_fields` (optional, a mapping) names fields that its estimate needs in requests to the
    upstream, such as `logprobs`; what they add to the answer is taken out again for a client that did not ask for it.
    """

    async def estimate(self, request: Asked, answer: Answer) -> float | None:
        """The probability that the answer is right; None when it cannot tell."""
        ...


def request_fields(confidence: Confidence | None) -> Mapping[str, Any]:
    """What `confidence` needs in a request; nothing without one."""
    found: Mapping[str, Any] = getattr(confidence, "request_fields", {})
    return found


class Retriever(Protocol):
    """Finds text that an answer can rest on."""

    async def retrieve(self, request: Asked, answer: Answer) -> Sequence[Evidence]: ...
