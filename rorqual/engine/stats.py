"""What the engine has done and is doing, in numbers: for metrics, and step by step for debugging."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rorqual.engine.events import FinishReason

RECENT = 64
"""Steps that `tokens_per_step` looks back at."""


class StepRecord(NamedTuple):
    """One step of the model, as `Engine.step_log` remembers it."""

    number: int
    decoding: int
    """Requests that read the token they sampled last."""
    prompt_tokens: int
    """Tokens of prompts (and of what is read again after a preemption)."""
    seconds: float
    running: int
    waiting: int
    admitted: int
    preempted: int
    charged_bytes: int
    """State memory that the running requests are charged for."""

    @property
    def tokens(self) -> int:
        return self.decoding + self.prompt_tokens


@dataclass(frozen=True)
class EngineStats:
    """A moment of the engine; counts are since its start."""

    running: int
    waiting: int
    rounds: int
    prompt_tokens: int
    """Read by the model, those read again included."""
    sampled_tokens: int
    tokens_per_step: float
    """Mean over the last steps."""
    busy_s: float
    """Seconds inside steps of the model."""
    preemptions: int
    failed_steps: int
    finished: Mapping[FinishReason, int]
    state_bytes: Mapping[str, int]
    """Held by the running requests' states, by kind (window, entries, index_keys, pending, ..., total)."""
    charged_bytes: int
    max_state_bytes: int | None
    drafted_tokens: int = 0
    """Drafts that were verified."""
    accepted_tokens: int = 0
    """Those of them that became tokens."""
    verifications: int = 0
    """Tokens that a request read together with drafts: one for each step and request."""
    accepted_length: float = 0.0
    """Mean tokens that a request got from a step with drafts, at least 1; 0 before the first."""


@dataclass
class Meter:
    """The counters behind `EngineStats`; the engine's thread writes, anyone reads. `log`: steps to remember."""

    log: int = 0
    rounds: int = 0
    prompt_tokens: int = 0
    sampled_tokens: int = 0
    busy_s: float = 0.0
    preemptions: int = 0
    failed_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verifications: int = 0
    finished: Counter[FinishReason] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.steps: deque[StepRecord] = deque(maxlen=self.log)
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._stays: deque[float] = deque(maxlen=RECENT)

    def add(self, record: StepRecord) -> None:
        """Count a round."""
        self.rounds += 1
        self.prompt_tokens += record.prompt_tokens
        self.busy_s += record.seconds
        self.preemptions += record.preempted
        if record.tokens:
            self._recent.append(record.tokens)
        self.steps.append(record)

    def add_stay(self, seconds: float) -> None:
        """Count how long a request that ended had run."""
        self._stays.append(seconds)

    @property
    def mean_stay_s(self) -> float:
        """Seconds that the last requests ran; 1 before the first has ended."""
        stays = list(self._stays)
        return sum(stays) / len(stays) if stays else 1.0

    @property
    def accepted_length(self) -> float:
        """Mean tokens from a verification: the accepted drafts and the token after them."""
        return 1 + self.accepted_tokens / self.verifications if self.verifications else 0.0

    @property
    def tokens_per_step(self) -> float:
        recent = list(self._recent)
        return sum(recent) / len(recent) if recent else 0.0
