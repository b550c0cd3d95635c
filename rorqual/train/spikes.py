"""Loss spikes, found as they happen: how far each loss lies above what the losses before it foretold.

Holt's linear smoothing follows level and trend of the loss; the score of a step is its one-step residual over the usual
size of such residuals. The trend matters: an average without one lags behind a falling loss, takes the lag for noise,
and then no spike is large enough. Source: V4 report (an automatic detector exists); its form and thresholds are not
public and follow open reimplementations.

Steps that stand out upwards stay out of the statistics, so a slow climb cannot hide itself; after `lookback` of them in
a row they are the new normal and the statistics start again.
"""

import math
from dataclasses import dataclass
from typing import Any

CUT_OFF = 1.08
"""Residuals above two standard deviations are left out, which makes the rest of normal noise look too quiet by this."""


@dataclass(frozen=True)
class Thresholds:
    """When a loss counts as a spike. Scores are in standard deviations of one-step residuals."""

    trigger: float = 6.0
    """Score from which a step is a spike."""
    onset: float = 2.0
    """Score above which a step stands out; a spike begins where the run of such steps around it does."""
    min_rise: float = 0.2
    """Nats that a spike rises at least above the prediction and the recent mean, however quiet the loss is."""
    level_decay: float = 0.97
    """Memory of level and variance per step."""
    trend_decay: float = 0.9
    """Memory of the trend per step."""
    warmup: int = 100
    """Steps that only feed the statistics, at first and after every reset."""
    lookback: int = 64
    """Most steps that the begin of a spike is searched back, and that stay out of the statistics in a row."""


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far above the prediction."""

    step: int
    """The step that was noticed."""
    onset: int
    """The first step of the excursion it belongs to."""
    loss: float
    predicted: float
    score: float
    """Standard deviations above the prediction; infinite for a loss that is not a number."""


class SpikeDetector:
    """Feed it every step's loss; it answers with a `Spike` or None."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.reset()

    def reset(self) -> None:
        """Forget everything seen; the warm-up begins again."""
        self.seen = 0
        self.level = self.trend = self.variance = self.mean = 0.0
        self.onset: int | None = None
        self.standing_out = 0

    @property
    def is_calm(self) -> bool:
        """Whether the last step did not stand out."""
        return self.onset is None

    def observe(self, step: int, loss: float) -> Spike | None:
        """Take in the loss of `step` (1, 2, ...). A loss that is no finite number is a spike at any time."""
        t = self.thresholds
        if not math.isfinite(loss):
            return Spike(step, self._begin(step), loss, self.level + self.trend, math.inf)
        if self.seen == 0:
            self.seen, self.level, self.mean = 1, loss, loss
            return None
        predicted = self.level + self.trend
        residual, sigma = loss - predicted, self._sigma()
        if self.seen >= t.warmup and residual > t.onset * sigma:
            self.standing_out += 1
            if self.standing_out > t.lookback:
                self.reset()
                return self.observe(step, loss)
            onset = self._begin(step)
            # The mean without trend: where a falling loss levels off, the trend runs ahead of it for a while.
            if residual > t.trigger * sigma and loss - max(predicted, self.mean) > t.min_rise:
                return Spike(step, onset, loss, predicted, residual / sigma if sigma > 0 else math.inf)
            return None
        self.onset, self.standing_out = None, 0
        # Early losses fall steeply: the memory is a tenth of the steps seen until that reaches its full length.
        gain = max(1 - t.level_decay, min(10 / self.seen, 0.5))
        level = predicted + gain * residual
        self.trend = t.trend_decay * self.trend + (1 - t.trend_decay) * (level - self.level)
        self.level = level
        self.mean += gain * (loss - self.mean)
        self.variance += gain * (residual * residual - self.variance)
        self.seen += 1
        return None

    def _begin(self, step: int) -> int:
        if self.onset is None:
            self.onset = step
        return self.onset

    def _sigma(self) -> float:
        """Standard deviation of one-step residuals."""
        return math.sqrt(self.variance) * CUT_OFF

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered, as plain values."""
        names = ("seen", "level", "trend", "variance", "mean", "onset", "standing_out")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name in self.state_dict():
            setattr(self, name, state[name])
