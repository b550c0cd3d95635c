"""What the engine hands out: token events while a request runs, and a `Completion` when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rorqual.engine.exactness import Exactness

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token, or the end of a request that ends without one.

    id: the token, or None on the closing event of a cancelled, late or failed request.
    text: complete characters only; empty while a character is unfinished, for end tokens and stop strings.
    logprob, top_logprobs: as asked in `SamplingParams`; ((id, logprob), ...) best first.
    finish_reason: set on the last event, else None.
    policy_logprob, support: with `SamplingParams.record`, as `recording.drawn_from` has them; a support of None is
        every id.
    experts: with `SamplingParams.routing`, int16 [n, L, A]: the experts that the L learned routers chose for the n
        tokens before this one that were read since the last event.
    policy_version: of the weights that the token was drawn with (`Engine.change_weights`).
    """

    id: int | None
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    policy_logprob: float | None = None
    support: NDArray[np.int32] | None = field(default=None, compare=False, repr=False)
    experts: NDArray[np.int16] | None = field(default=None, compare=False, repr=False)
    policy_version: int = 0


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A prompt token with its log probability (None for the first: nothing precedes it)."""

    id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `completion_tokens` counts every sampled token, the end token included.

    drafted_tokens, accepted_tokens: drafts that were verified, and those of them that became tokens.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: waiting for a place, from there to the first token, and from the first to the last token."""

    queue_s: float
    first_token_s: float
    decode_s: float


@dataclass(frozen=True)
class Completion:
    """A finished request. `ids` holds every sampled token, also those whose text a stop string removed."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    seed: int
    usage: Usage
    timing: Timing
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    prompt_scores: tuple[TokenScore, ...] | None = field(default=None, repr=False)
    exactness: Exactness | None = field(default=None, repr=False)
