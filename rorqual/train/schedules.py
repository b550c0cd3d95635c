"""What changes during a run, as functions of the tokens consumed so far.

Everything depends on consumed tokens (and, for the warm-up, on the step), both stored in the checkpoint, so
resuming or another batch size never shifts a schedule. Source: V4 report, training setup; where the report is
silent the fractions follow V3 (decay from about 70%, bias speed to zero at the end).
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from rorqual.errors import ConfigError


class Stage(StrEnum):
    """How compressed sparse attention reads, and what learns. Source: V4 report (dense first, a short indexer warm-up,
    then sparse to the end); the warm-up's rules are V3.2's.
    """

    DENSE = "dense"
    """It reads every visible entry; everything learns, indexers from their own loss."""
    INDEX_WARMUP = "index_warmup"
    """It reads every visible entry; only the indexers learn."""
    SPARSE = "sparse"
    """It reads the indexers' picks; everything learns."""


@dataclass(frozen=True)
class Schedule:
    """All schedules of one run. Fractions are of `total_tokens`."""

    total_tokens: int
    peak_lr: float
    end_lr: float
    warmup_steps: int
    decay_from: float
    """Fraction where the cosine begins; MTP's weight changes there too."""
    dense_until: float
    """Fraction during which compressed sparse attention reads every visible entry."""
    mtp_weight: float
    mtp_weight_end: float
    bias_speed: float
    bias_off_from: float
    """Fraction after which router biases stand still."""
    seq_lens: tuple[tuple[float, int], ...]
    """(fraction from which it holds, tokens per row), rising from 0.0."""
    tokens_per_step: int
    ramp_until: float = 0.0
    """Fraction over which the batch grows linearly from `ramp_from` of its full size; 0 for none."""
    ramp_from: float = 0.2
    index_warmup: float = 0.0
    """Length of the indexers' warm-up after `dense_until`: a fraction, or from 1 on a number of full steps; 0: none."""
    index_warmup_lr: float = 1e-3

    def __post_init__(self) -> None:
        if not self.seq_lens or self.seq_lens[0][0] != 0.0:
            raise ConfigError(
                f"seq_lens is {self.seq_lens}, which leaves the first tokens without a row length. Begin at 0.0."
            )

    def lr(self, step: int, tokens: int) -> float:
        """Learning rate of step `step` (0-based): linear warm-up, constant, cosine down to `end_lr`."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        start = self.decay_from * self.total_tokens
        if tokens < start:
            return self.peak_lr
        share = min((tokens - start) / max(self.total_tokens - start, 1), 1.0)
        return self.end_lr + (self.peak_lr - self.end_lr) * 0.5 * (1 + math.cos(math.pi * share))

    def mtp(self, tokens: int) -> float:
        """Weight of the MTP loss."""
        return self.mtp_weight if tokens < self.decay_from * self.total_tokens else self.mtp_weight_end

    def bias(self, tokens: int) -> float:
        """How far a router bias moves per step."""
        return self.bias_speed if tokens < self.bias_off_from * self.total_tokens else 0.0

    def stage(self, tokens: int) -> Stage:
        """Which stage of the introduction of sparse attention this is."""
        dense = self.dense_until * self.total_tokens
        if tokens < dense:
            return Stage.DENSE
        warmup = self.index_warmup * (self.total_tokens if self.index_warmup < 1 else self.tokens_per_step)
        return Stage.INDEX_WARMUP if tokens < dense + warmup else Stage.SPARSE

    def is_dense(self, tokens: int) -> bool:
        """Whether compressed sparse attention still reads every visible entry."""
        return self.stage(tokens) is not Stage.SPARSE

    def seq_len(self, tokens: int) -> int:
        """Tokens per row."""
        return next(length for start, length in reversed(self.seq_lens) if tokens >= start * self.total_tokens)

    def rows(self, tokens: int) -> int:
        """Rows per step: the batch in tokens over the row length, at least one."""
        batch = float(self.tokens_per_step)
        ramp = self.ramp_until * self.total_tokens
        if tokens < ramp:
            batch *= self.ramp_from + (1 - self.ramp_from) * tokens / ramp
        return max(1, round(batch / self.seq_len(tokens)))

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_from(0)

    def steps_from(self, tokens: int) -> int:
        """Optimizer steps left after `tokens` consumed tokens."""
        steps = 0
        while tokens < self.total_tokens:
            # Jump over stretches where the batch is constant; walk through the ramp.
            edges = [self.ramp_until, 1.0, *(start for start, _ in self.seq_lens)]
            ahead = [math.ceil(e * self.total_tokens) for e in edges if e * self.total_tokens > tokens]
            size = self.rows(tokens) * self.seq_len(tokens)
            in_ramp = tokens < self.ramp_until * self.total_tokens
            count = 1 if in_ramp else max(1, math.ceil((min(ahead) - tokens) / size))
            steps += count
            tokens += count * size
        return steps
