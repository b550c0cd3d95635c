"""How sure a figure is: intervals of shares, exact paired tests, bootstrap of means over blocks.

Source: evaluation specification, section 2.3; E. B. Wilson (1927) for the interval, Q. McNemar (1947) for the
test. Intervals are two-sided and of 95 % unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
REPEATS = 10_000
_CELLS = 4_000_000  # resampled blocks held at once; bounds the memory of a bootstrap


@dataclass(frozen=True)
class Interval:
    """A figure with its bounds."""

    value: float
    low: float
    high: float


def wilson(successes: float, trials: float, confidence: float = CONFIDENCE) -> Interval | None:
    """Wilson's interval of a share; None without trials. Raises: ValueError for more successes than trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials are no share. Check what was counted.")
    if not trials:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # at 0 and at 1 the formula's bound is exact; rounding must not put the figure outside its interval
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def miss_bound(trials: int) -> float | None:
    """Upper 95 % bound on the miss rate when none of `trials` missed: 3 / n, at most 1. To be told beside a 100 %."""
    return min(1.0, 3 / trials) if trials else None


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p that two runs on the same items are equally good.

    `only_first` items were right in the first run alone, `only_second` in the second alone; 1 when none differ.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts of differing items are {only_first} and {only_second}; they cannot be negative.")
    n, k = only_first + only_second, min(only_first, only_second)
    # whole numbers to the end: floats of 2**n overflow beyond a thousand differing items
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@dataclass(frozen=True)
class PairedShares:
    """Two runs on the same items: shares right, their difference (second less first) and McNemar's exact p."""

    first: float
    second: float
    difference: float
    p: float
    n: int


def compare_right(first: dict[str, bool], second: dict[str, bool]) -> PairedShares | None:
    """Pair two runs on their item ids and compare how often they are right; None when they share no item."""
    shared = first.keys() & second.keys()
    if not shared:
        return None
    gained = sum(second[i] and not first[i] for i in shared)
    lost = sum(first[i] and not second[i] for i in shared)
    a, b = sum(first[i] for i in shared) / len(shared), sum(second[i] for i in shared) / len(shared)
    return PairedShares(a, b, b - a, mcnemar_exact(lost, gained), len(shared))


def bootstrap_mean(
    values: Sequence[float] | npt.NDArray[np.float64],
    blocks: Sequence[Hashable] | None = None,
    *,
    seed: int,
    repeats: int = REPEATS,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Percentile interval of the mean of `values`; None without values.

    blocks: the base document of each value. Whole blocks are drawn, because probes of one document share its fate;
    None draws single values. For a paired comparison give the differences: `paired_bootstrap` does.
    Raises: ValueError when blocks and values do not pair.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        return None
    if blocks is not None and len(blocks) != len(x):
        raise ValueError(f"{len(blocks)} blocks for {len(x)} values do not pair. Name the document of each value.")
    numbers: dict[Hashable, int] = {}
    where = np.array([numbers.setdefault(b, len(numbers)) for b in (range(len(x)) if blocks is None else blocks)])
    sums, sizes = np.bincount(where, x), np.bincount(where).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(repeats)
    step = max(1, _CELLS // len(sums))
    for start in range(0, repeats, step):
        drawn = rng.integers(0, len(sums), (min(step, repeats - start), len(sums)))
        means[start : start + step] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(float(x.mean()), float(low), float(high))


def paired_bootstrap(
    first: dict[str, float],
    second: dict[str, float],
    blocks: dict[str, Hashable] | None = None,
    *,
    seed: int,
    repeats: int = REPEATS,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Interval of the mean difference (second less first) over the items both runs have; None when they share none.

    blocks: the base document of an item, where several items share one.
    """
    shared = [i for i in first if i in second]
    differences = [second[i] - first[i] for i in shared]
    named = None if blocks is None else [blocks[i] for i in shared]
    return bootstrap_mean(differences, named, seed=seed, repeats=repeats, confidence=confidence)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, tied values at their mean rank; None with fewer than two values or a constant side."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values do not pair. Give two equal lists.")
    if len(first) < 2:
        return None
    a, b = (_ranks(np.asarray(side, dtype=np.float64)) for side in (first, second))
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm else None


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, where, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (np.cumsum(sizes) - (sizes - 1) / 2)[where]
    return ranks
