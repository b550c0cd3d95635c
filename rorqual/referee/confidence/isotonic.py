"""Isotonic calibration: the rising curve that best turns a score into a probability.

Source: pool adjacent violators (Ayer et al. 1955). Between the blocks the curve is drawn straight, and a small share
of a logistic in the score is mixed in, so that two different scores never get one probability: thresholds could
not part them, and ranking by the probability would lose what the score knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

MIX = 1e-3
"""Share of the logistic; the most by which a probability differs from the isotonic fit for it."""


@dataclass(frozen=True)
class Curve:
    """Points of a rising curve from log odds to probability."""

    scores: tuple[float, ...]
    chances: tuple[float, ...]

    def __call__(self, scores: Vector) -> Vector:
        """Probabilities [N] of log odds [N], strictly rising."""
        straight = np.interp(scores, self.scores, self.chances)
        return (1 - MIX) * straight + MIX / (1 + np.exp(-scores / 4))


def fit(scores: Vector, right: npt.NDArray[np.bool_]) -> Curve:
    """The isotonic fit of `right` on `scores`, one point at the mean score of each block."""
    order = np.argsort(scores, kind="stable")
    blocks: list[list[float]] = []  # sum of scores, sum right, count
    for score, y in zip(scores[order], right[order], strict=True):
        blocks.append([float(score), float(y), 1.0])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] >= blocks[-1][1] * blocks[-2][2]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    points = [(s / n, y / n) for s, y, n in blocks]
    return Curve(tuple(s for s, _ in points), tuple(p for _, p in points))
