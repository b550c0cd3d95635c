"""Split-conformal thresholds: a promise about wrong answers that needs no belief about the confidence.

Take the confidences of calibration questions whose forced answer was wrong, and put the threshold at the one of rank
floor(alpha (n + 1)) from the top. A new question whose answer would be wrong, exchangeable with those, is then
answered with a probability of at most alpha. Source: evaluation specification, section 7.3; Vovk et al. (2005). The
promise is over the draw of calibration questions too: for one given calibration set the rate itself varies, as
`spread` says. It says nothing about questions of another kind than those calibrated on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Promise:
    """Answer when the confidence is greater than `threshold`; alpha and the number of wrong answers it rests on."""

    threshold: float
    alpha: float
    num_wrong: int

    @property
    def spread(self) -> float:
        """Standard deviation, over calibration sets, of the rate that a threshold of this rank realises.

        The rate follows Beta(k, n + 1 - k) with k the rank, when no two confidences are equal.
        """
        n, k = self.num_wrong, math.floor(self.alpha * (self.num_wrong + 1))
        return math.sqrt(k * (n + 1 - k) / ((n + 1) ** 2 * (n + 2)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def promise(wrong: Sequence[float], alpha: float) -> Promise:
    """The threshold for `wrong`, the confidences of calibration answers that were wrong.

    With too few of them for this alpha nothing may be answered (threshold infinity). Raises: ConfigError unless
    0 < alpha < 1.
    """
    if not 0 < alpha < 1:
        raise ConfigError(
            f"alpha is {alpha}, which is no rate of errors to promise. Give one between 0 and 1, e.g. 0.05."
        )
    rank = math.floor(alpha * (len(wrong) + 1))
    ordered = sorted(wrong, reverse=True)
    return Promise(ordered[rank - 1] if rank else math.inf, alpha, len(ordered))
