"""Whether to answer, and when to look closer first.

An answer pays when p > lambda / (1 + lambda), a wrong one costing lambda right ones. Where p from the free signals
lies close to that threshold, more signals are bought; the width of that band is set by how many further calls a
question may cost on average. Source: evaluation specification, sections 7.2 and 7.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rorqual.errors import ConfigError
from rorqual.referee.confidence.boosting import Matrix
from rorqual.referee.confidence.calibrator import Calibrator, Signals

PROFILES: dict[str, float] = {"chat": 1.0, "assistant": 3.0, "regulated": 9.0}
"""How many right answers a wrong one costs (lambda)."""

MAX_EXTRA_CALLS = 0.3

Choice = Literal["answer", "look closer", "abstain"]


def threshold_of(profile: str) -> float:
    """The p above which the profile answers. Raises: ConfigError for a profile that does not exist."""
    if profile not in PROFILES:
        raise ConfigError(f"There is no profile {profile!r}. Choose one of {', '.join(PROFILES)}.")
    return PROFILES[profile] / (1 + PROFILES[profile])


@dataclass(frozen=True)
class Band:
    """Between `low` and `high` (both included) the p of a tier is too close to the threshold to decide by."""

    low: float
    high: float

    def holds(self, p: float) -> bool:
        return self.low <= p <= self.high


EMPTY = Band(1.0, 0.0)


def band_around(threshold: float, chances: Sequence[float], share: float) -> Band:
    """The band of log odds [t - d, t + d] with the largest d that holds at most `share` of `chances`.

    Quantiles of calibration questions stand for those to come. Log odds, because near 0 and 1 a small step of p is a
    large one of belief. Empty when even the nearest ones are too many.
    """
    middle = _log_odds(threshold)
    distances = sorted(abs(_log_odds(p) - middle) for p in chances)
    most = int(share * len(distances) + 1e-9)
    if most < 1:
        return EMPTY
    # a group of equally distant ones comes in whole or not at all
    width = distances[most - 1]
    if most < len(distances) and distances[most] - width < 1e-9:
        nearer = [d for d in distances[:most] if d < width - 1e-9]
        if not nearer:
            return EMPTY
        width = nearer[-1]
    width += 1e-12 * max(1.0, width)  # rounding on the way to p and back must not lose the outermost
    return Band(_chance(middle - width), _chance(middle + width))


def _log_odds(p: float) -> float:
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


def _chance(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


@dataclass(frozen=True)
class Cascade:
    """Tier by tier until one is sure. bands: for every tier but the last; `calls`: what each tier above 0 costs."""

    calibrator: Calibrator
    threshold: float
    bands: tuple[Band, ...]
    calls: dict[int, int]

    @staticmethod
    def plan(
        calibrator: Calibrator, threshold: float, calls: dict[int, int], max_extra_calls: float = MAX_EXTRA_CALLS
    ) -> Cascade:
        """Bands that spend at most `max_extra_calls` a question on average over the calibration questions.

        Nine tenths go to the first step, the rest to a second one.
        """
        bands = []
        tiers = calibrator.tiers
        for at, tier in enumerate(tiers[:-1]):
            budget = max_extra_calls * (1.0 if len(tiers) == 2 else 0.9 if at == 0 else 0.1)
            bands.append(band_around(threshold, tier.chances, budget / max(calls[tiers[at + 1].tier], 1)))
        return Cascade(calibrator, threshold, tuple(bands), calls)

    def choose(self, signals: Signals, step: int) -> tuple[Choice, float]:
        """What to do with the signals of the tiers up to number `step`, and the p it follows from."""
        p = float(self.calibrator.tiers[step].p([signals])[0])
        if step < len(self.bands) and self.bands[step].holds(p):
            return "look closer", p
        return ("answer" if p > self.threshold else "abstain"), p

    def run(self, rows: Sequence[Signals]) -> tuple[Matrix, float]:
        """For rows with the signals of all tiers: the p each question ends with [N], and mean calls a question."""
        p = self.calibrator.tiers[0].p(rows)
        open_ = np.ones(len(rows), dtype=np.bool_)
        calls = 0.0
        for band, tier in zip(self.bands, self.calibrator.tiers[1:], strict=True):
            open_ &= (p >= band.low) & (p <= band.high)
            calls += self.calls[tier.tier] * float(open_.mean()) if len(rows) else 0.0
            p = np.where(open_, tier.p(rows), p)
        return p, calls
