"""Comparing two arms of an ablation over seeds: means, spreads, and whether a difference is more than noise.

A difference counts when it is larger than two pooled standard deviations of single runs. Seeds are paired (same data
order, same initial values of shared parameters), so the standard deviation of the paired differences is shown too; the
verdict does not use it.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LIMIT = 2.0
"""Pooled standard deviations above which a difference counts."""


@dataclass(frozen=True)
class Sample:
    """Final losses of one arm by seed."""

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values.values())

    @property
    def sd(self) -> float | None:
        """Standard deviation of a single run (n - 1 in the denominator); None with fewer than two seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """`variant` against `base`; a negative difference means that the variant has the lower loss."""

    difference: float
    """Mean of the variant minus mean of the base, nats per token."""
    pooled_sd: float | None
    units: float | None
    """The difference in pooled standard deviations; infinite when every seed gave the same loss twice."""
    paired_sd: float | None
    """Standard deviation of the per-seed differences over the seeds that both have."""
    verdict: str
    """`lower`, `higher`, `same` (within the noise) or `unknown` (too few seeds)."""


def pooled_sd(a: Sample, b: Sample) -> float | None:
    """Standard deviation of a run, estimated from both arms around their own means; None without two seeds each."""
    if a.sd is None or b.sd is None:
        return None
    free = [len(s.values) - 1 for s in (a, b)]
    return math.sqrt((free[0] * a.sd**2 + free[1] * b.sd**2) / sum(free))


def compare(variant: Sample, base: Sample) -> Comparison:
    """The difference of two arms, and what may be said of it."""
    difference = variant.mean - base.mean
    spread = pooled_sd(variant, base)
    common = sorted(set(variant.values) & set(base.values))
    pairs = [variant.values[seed] - base.values[seed] for seed in common]
    paired = statistics.stdev(pairs) if len(pairs) > 1 else None
    if spread is None:
        return Comparison(difference, None, None, paired, "unknown")
    units = difference / spread if spread else (math.copysign(math.inf, difference) if difference else 0.0)
    verdict = "same" if abs(units) <= LIMIT else "lower" if units < 0 else "higher"
    return Comparison(difference, spread, units, paired, verdict)


def samples(results: list[dict[str, Any]], field: str = "nats_per_token") -> dict[str, Sample]:
    """Final losses by arm, from result lines."""
    found: dict[str, dict[int, float]] = {}
    for line in results:
        if line.get(field) is not None:
            found.setdefault(line["arm"], {})[line["seed"]] = line[field]
    return {arm: Sample(dict(sorted(values.items()))) for arm, values in found.items()}
