"""Gradient boosting of one-split trees that never go against a signal's known direction; numpy alone.

A model of 300 stumps over a dozen signals is a few kilobytes of JSON, can be read as one curve per signal, and has
no opinion about a signal that was not measured. Source: Friedman (2001), section 4.4 (logistic loss, Newton leaves);
monotone by refusing splits whose leaves fall where the signal should rise. A library for this would bring a
compiled dependency of tens of megabytes to a gateway that evaluates one row at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rorqual.errors import ConfigError

Matrix = npt.NDArray[np.float64]

MAX_CUTS = 64
"""Candidate cuts per signal, at equal shares of the items."""


@dataclass(frozen=True)
class Stump:
    """`low` is added where signal number `signal` is below `cut`, else `high`; nothing where it is missing."""

    signal: int
    cut: float
    low: float
    high: float


@dataclass(frozen=True)
class Boosted:
    """A sum of stumps: the log odds that an answer is right."""

    base: float
    stumps: tuple[Stump, ...]

    def log_odds(self, rows: Matrix) -> Matrix:
        """Log odds [N] of signals [N, F]; NaN stands for not measured."""
        total = np.full(len(rows), self.base)
        for stump in self.stumps:
            column = rows[:, stump.signal]
            total += np.where(np.isnan(column), 0.0, np.where(column < stump.cut, stump.low, stump.high))
        return total

    def to_dict(self) -> dict[str, Any]:
        return {"base": self.base, "stumps": [[s.signal, s.cut, s.low, s.high] for s in self.stumps]}

    @staticmethod
    def from_dict(record: dict[str, Any]) -> Boosted:
        stumps = tuple(Stump(int(s[0]), float(s[1]), float(s[2]), float(s[3])) for s in record["stumps"])
        return Boosted(float(record["base"]), stumps)


def fit(
    rows: Matrix,
    right: npt.NDArray[np.bool_],
    rises: list[bool],
    *,
    rounds: int = 300,
    rate: float = 0.1,
    l2: float = 4.0,
) -> Boosted:
    """Fit to signals [N, F] and whether each answer was right [N].

    rises: for each signal, whether more of it may only raise the odds (else: only lower them). l2: pull of a leaf to 0,
    in items. Raises: ConfigError when the answers are all right or all wrong, so nothing can be told apart.
    """
    check_outcomes(right)
    y = right.astype(np.float64)
    base = float(np.log(y.mean() / (1 - y.mean())))
    bins, cuts = _binned(rows)
    odds, stumps = np.full(len(y), base), []
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-odds))
        best = _best_stump(bins, cuts, y - p, p * (1 - p), rises, l2)
        if best is None:
            break
        stump = Stump(best.signal, best.cut, rate * best.low, rate * best.high)
        stumps.append(stump)
        odds = odds + Boosted(0.0, (stump,)).log_odds(rows)
    return Boosted(base, tuple(stumps))


def check_outcomes(right: npt.NDArray[np.bool_]) -> None:
    """Raises: ConfigError when the answers are all right or all wrong, so nothing can be told apart."""
    if right.all() or not right.any():
        raise ConfigError(
            f"all {len(right)} calibration answers are {'right' if right.any() else 'wrong'}, so there is nothing to "
            "tell apart. Add questions of the other kind, such as ones the model cannot know."
        )


def _binned(rows: Matrix) -> tuple[list[npt.NDArray[np.intp]], list[Matrix]]:
    """Per signal the number of cuts at or below each value [N] (-1: not measured), and the cuts."""
    bins, cuts = [], []
    for column in rows.T:
        known = column[~np.isnan(column)]
        edges = np.unique(np.quantile(known, np.linspace(0, 1, MAX_CUTS + 2)[1:-1])) if len(known) else np.empty(0)
        where = np.searchsorted(edges, column, side="right")
        bins.append(np.where(np.isnan(column), -1, where))
        cuts.append(edges)
    return bins, cuts


def _best_stump(
    bins: list[npt.NDArray[np.intp]], cuts: list[Matrix], slope: Matrix, bend: Matrix, rises: list[bool], l2: float
) -> Stump | None:
    """The allowed split that lowers the loss most; None when none does."""
    best, best_gain = None, 1e-9
    for signal, (where, edges) in enumerate(zip(bins, cuts, strict=True)):
        if not len(edges):
            continue
        seen = where >= 0
        g = np.cumsum(np.bincount(where[seen], slope[seen], len(edges) + 1))
        h = np.cumsum(np.bincount(where[seen], bend[seen], len(edges) + 1))
        low, high = g[:-1] / (h[:-1] + l2), (g[-1] - g[:-1]) / (h[-1] - h[:-1] + l2)
        gain = low * g[:-1] + high * (g[-1] - g[:-1])
        gain = np.where(high >= low if rises[signal] else high <= low, gain, -np.inf)
        at = int(np.argmax(gain))
        if gain[at] > best_gain:
            best_gain, best = float(gain[at]), Stump(signal, float(edges[at]), float(low[at]), float(high[at]))
    return best
