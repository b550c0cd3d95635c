"""Knowledge, abstention and the quality of a confidence: the formulas of a result table.

Source: evaluation specification, sections 3.1 and 3.2. Every function is pure and takes plain sequences. Where a
value is not defined (a share of nothing, a ranking of one class) it is `None`, never a number that looks like a
result. Long contexts: `context_metrics.py`; tokens and money: `economy.py`.

Equal scores never depend on the order items came in: AUROC counts a tie half, risk within a tied group is the mean
over all its orders, and a coverage or a threshold never cuts through a tied group, because no gate could.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Letter = Literal["C", "P", "I", "A", "X"]
LETTERS: tuple[Letter, ...] = ("C", "P", "I", "A", "X")
Scores = Sequence[float] | npt.NDArray[np.float64]
Labels = Sequence[bool] | Sequence[int] | npt.NDArray[np.bool_]

ECE_BINS = 15
LOG_LOSS_FLOOR = 1e-12
"""A stated certainty that is wrong costs -ln of this, not infinity."""


def share(part: float, whole: float) -> float | None:
    """part / whole, or None when there is nothing to have a share of."""
    return part / whole if whole else None


@dataclass(frozen=True)
class Counts:
    """How many items were graded correct, partly, incorrect, abstained and undecided; weights may be fractions.

    `n` leaves the undecided out: they are no result. `worst()` counts them as incorrect, for the bound.
    """

    C: float = 0
    P: float = 0
    I: float = 0  # noqa: E741 - the specification's letter
    A: float = 0
    X: float = 0

    @staticmethod
    def of(grades: Iterable[str]) -> Counts:
        """Count letters. Raises: KeyError for one that is no grade."""
        tally: dict[str, int] = dict.fromkeys(LETTERS, 0)
        for letter in grades:
            tally[letter] += 1
        return Counts(**tally)

    @property
    def n(self) -> float:
        return self.C + self.P + self.I + self.A

    @property
    def undecided_rate(self) -> float | None:
        """X among all items, decided or not."""
        return share(self.X, self.n + self.X)

    def worst(self) -> Counts:
        """The same with every undecided item counted as incorrect."""
        return Counts(self.C, self.P, self.I + self.X, self.A)

    def scaled(self, factor: float) -> Counts:
        return Counts(*(factor * getattr(self, letter) for letter in LETTERS))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, letter) + getattr(other, letter) for letter in LETTERS))


# -- knowledge and abstention (3.1) --


def accuracy(counts: Counts) -> float | None:
    """ACC = C / N."""
    return share(counts.C, counts.n)


def omniscience_index(counts: Counts) -> float | None:
    """OI = 100 (C - I) / N, from -100 to 100."""
    value = utility(counts, 1.0)
    return None if value is None else 100 * value


def utility(counts: Counts, loss: float) -> float | None:
    """U_lambda = (C - lambda I) / N, for a wrong answer that costs `loss` (lambda) right ones."""
    return share(counts.C - loss * counts.I, counts.n)


def answer_threshold(loss: float) -> float:
    """The confidence above which answering pays under U_lambda: lambda / (1 + lambda). Raises: ValueError below 0."""
    if loss < 0:
        raise ValueError(f"a wrong answer cannot cost {loss} right ones. Give a loss of 0 or more.")
    return loss / (1 + loss)


def loss_of_confidence(confidence: float) -> float:
    """The loss that a promised confidence t stands for: t / (1 - t). Raises: ValueError outside [0, 1)."""
    if not 0 <= confidence < 1:
        raise ValueError(f"a promised confidence of {confidence} encodes no loss. Give one from 0 up to, not at, 1.")
    return confidence / (1 - confidence)


def hallucination_rate(counts: Counts) -> float | None:
    """HR = I / (I + P + A): of what was not right, how much was wrong. None when everything was right.

    Never to be shown without RET and OI beside it: a model that refuses everything has HR 0.
    """
    return share(counts.I, counts.I + counts.P + counts.A)


def answered_share(counts: Counts) -> float | None:
    """HR_U of a class without answers: the share that was answered anyway (there, every answer is wrong)."""
    return share(counts.C + counts.P + counts.I, counts.n)


def correct_given_attempted(counts: Counts) -> float | None:
    """CGA = C / (C + I)."""
    return share(counts.C, counts.C + counts.I)


def f1_of_attempts(counts: Counts) -> float | None:
    """F1 = 2 ACC CGA / (ACC + CGA); 0 when nothing was right but something was tried, None when nothing was tried."""
    acc, cga = accuracy(counts), correct_given_attempted(counts)
    if acc is None or cga is None:
        return None
    return harmonic_mean(acc, cga)


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b), and 0 when both are 0."""
    return 2 * first * second / (first + second) if first + second else 0.0


def retention(forced: Sequence[str], gated: Sequence[str]) -> float | None:
    """RET: of the items the forced run got right, the share that is still right with the gate; same order of items.

    Pairs with an undecided side are left out. Raises: ValueError for runs of different lengths.
    """
    pairs = _decided_pairs(forced, gated)
    kept = sum(f == "C" and g == "C" for f, g in pairs)
    return share(kept, sum(f == "C" for f, _ in pairs))


def over_refusal(forced: Sequence[str], gated: Sequence[str]) -> float | None:
    """OVER = 1 - RET."""
    kept = retention(forced, gated)
    return None if kept is None else 1 - kept


def rescue(forced: Sequence[str], gated: Sequence[str]) -> float | None:
    """RESCUE: of the items the forced run got wrong, the share on which the gated run abstained."""
    pairs = _decided_pairs(forced, gated)
    saved = sum(f == "I" and g == "A" for f, g in pairs)
    return share(saved, sum(f == "I" for f, _ in pairs))


def _decided_pairs(forced: Sequence[str], gated: Sequence[str]) -> list[tuple[str, str]]:
    if len(forced) != len(gated):
        raise ValueError(f"{len(forced)} forced and {len(gated)} gated grades are not of the same items. Pair by item.")
    return [(f, g) for f, g in zip(forced, gated, strict=True) if "X" not in (f, g)]


def at_prevalence(answerable: Counts, unanswerable: Counts, prevalence: float) -> Counts | None:
    """Counts of a mixture with `prevalence` answerable questions, by re-weighting; None when a needed side is empty.

    OI depends on the mixture, so it is published at several (0.13, 0.43, 0.80). Raises: ValueError outside [0, 1].
    """
    if not 0 <= prevalence <= 1:
        raise ValueError(f"a prevalence of {prevalence} is no share. Give one from 0 to 1.")
    if (prevalence > 0 and not answerable.n) or (prevalence < 1 and not unanswerable.n):
        return None
    known = answerable.scaled(prevalence / answerable.n) if prevalence > 0 else Counts()
    unknown = unanswerable.scaled((1 - prevalence) / unanswerable.n) if prevalence < 1 else Counts()
    return known + unknown


# -- quality of a confidence (3.2): score s, correctness y --


def auroc(scores: Scores, labels: Labels) -> float | None:
    """Chance that a right item scores above another one, ties half. None unless both kinds are there."""
    s, y = _aligned(scores, labels)
    positives, negatives = float(y.sum()), float((1 - y).sum())
    if not positives or not negatives:
        return None
    _, where, sizes = np.unique(s, return_inverse=True, return_counts=True)
    ranks = np.cumsum(sizes) - (sizes - 1) / 2  # the mean rank, from 1, of each tied group
    total = float((ranks[where] * y).sum())
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


def risk_coverage(scores: Scores, labels: Labels) -> npt.NDArray[np.float64]:
    """risk(i) for i = 1..n: errors among the i highest scores divided by i; float64 [n].

    Within a tied group the errors are spread evenly, which is the mean over all orders of the group.
    """
    s, y = _aligned(scores, labels)
    order = np.argsort(-s, kind="stable")
    errors = _evened(s[order], 1 - y[order])
    return np.cumsum(errors) / np.arange(1, len(s) + 1)


def aurc(scores: Scores, labels: Labels) -> float | None:
    """AURC: the mean over i of risk(i)."""
    risks = risk_coverage(scores, labels)
    return float(risks.mean()) if len(risks) else None


def excess_aurc(scores: Scores, labels: Labels) -> float | None:
    """E-AURC: AURC less that of a perfect ordering of the same labels (exact, not the limit formula)."""
    value = aurc(scores, labels)
    if value is None:
        return None
    y = np.asarray(labels, dtype=np.float64)
    best = aurc(y, y > 0)
    assert best is not None
    return value - best


def coverage_at_risk(scores: Scores, labels: Labels, risk: float) -> float | None:
    """COV@r: the largest share of items that a threshold on the score can let through at a risk of `risk` or less."""
    s, y = _aligned(scores, labels)
    if not len(s):
        return None
    ends = _group_ends(np.sort(-s))
    risks = risk_coverage(s, y > 0)[ends]
    fine = np.flatnonzero(risks <= risk + 1e-12)
    return float(ends[fine[-1]] + 1) / len(s) if len(fine) else 0.0


@dataclass(frozen=True)
class GatePoint:
    """What a threshold does to a set of forced answers: those with a score of at least `threshold` are given.

    hr: wrong answers given among those and the abstentions. ret: right answers given among all right ones.
    """

    threshold: float
    hr: float | None
    ret: float | None


def gate_point(scores: Scores, labels: Labels, threshold: float) -> GatePoint:
    """HR and RET of the gate `score >= threshold`; `labels` say whether the forced answer is right."""
    s, y = _aligned(scores, labels)
    given = s >= threshold
    wrong = float((given * (1 - y)).sum())
    abstained = float((~given).sum())
    return GatePoint(threshold, share(wrong, wrong + abstained), share(float((given * y).sum()), float(y.sum())))


def fit_threshold(scores: Scores, labels: Labels, hr: float) -> float:
    """The lowest threshold at which HR is `hr` or less on these items; infinity when no score allows it.

    HR never rises with the threshold, so this is also the one that retains most.
    """
    s, y = _aligned(scores, labels)
    if not len(s):
        return math.inf
    order = np.argsort(-s, kind="stable")
    ends = _group_ends(-s[order])
    wrong = np.cumsum(1 - y[order])[ends]
    abstained = len(s) - (ends + 1)
    rates = wrong / np.maximum(wrong + abstained, 1)
    fine = np.flatnonzero(rates <= hr + 1e-12)
    return float(s[order][ends[fine[-1]]]) if len(fine) else math.inf


def crossed_retention_at_hr(
    scores: Scores, labels: Labels, halves: Sequence[bool], hr: float, counted: Sequence[bool] | None = None
) -> GatePoint | None:
    """RET@h where nobody gave calibration items: each half's threshold is fitted on the other, and both are pooled.

    halves: which half an item is in; an entity must not be in both. counted: items whose retention counts (all).
    threshold: the mean of the two. None where a half is empty.
    """
    s, y = _aligned(scores, labels)
    first, keeps = np.asarray(halves, bool), np.ones(len(s), bool) if counted is None else np.asarray(counted, bool)
    if not first.any() or first.all():
        return None
    given, thresholds = np.zeros(len(s), bool), []
    for half in (first, ~first):
        thresholds.append(fit_threshold(s[~half], y[~half], hr))
        given |= half & (s >= thresholds[-1])
    wrong, abstained = float((given * (1 - y)).sum()), float((~given).sum())
    right = y * keeps
    return GatePoint(
        float(np.mean(thresholds)),
        share(wrong, wrong + abstained),
        share(float((given * right).sum()), float(right.sum())),
    )


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram: mean confidence, share right, number of items."""

    confidence: float
    right: float
    n: int


def reliability(scores: Scores, labels: Labels, bins: int = ECE_BINS) -> list[Bin]:
    """Bins of equal mass (sizes differ by one at most) by rising confidence; fewer when there are fewer items."""
    s, y = _aligned(scores, labels)
    order = np.argsort(s, kind="stable")
    s, y = s[order], _evened(s[order], y[order])
    parts = zip(np.array_split(s, bins), np.array_split(y, bins), strict=True)
    return [Bin(float(a.mean()), float(b.mean()), len(a)) for a, b in parts if len(a)]


def expected_calibration_error(scores: Scores, labels: Labels, bins: int = ECE_BINS) -> float | None:
    """ECE: the mean over items of |mean confidence - share right| of their bin; bins of equal mass."""
    table = reliability(scores, labels, bins)
    total = sum(b.n for b in table)
    return share(sum(b.n * abs(b.confidence - b.right) for b in table), total)


def brier(scores: Scores, labels: Labels) -> float | None:
    """Mean of (s - y) squared."""
    s, y = _aligned(scores, labels)
    return float(((s - y) ** 2).mean()) if len(s) else None


def log_loss(scores: Scores, labels: Labels) -> float | None:
    """Mean of -ln of the probability that was given to what happened, nats; certainty is held off by 1e-12."""
    s, y = _aligned(scores, labels)
    if not len(s):
        return None
    s = np.clip(s, LOG_LOSS_FLOOR, 1 - LOG_LOSS_FLOOR)
    return float(-(y * np.log(s) + (1 - y) * np.log1p(-s)).mean())


def _aligned(scores: Scores, labels: Labels) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if s.shape != y.shape or s.ndim != 1:
        raise ValueError(f"scores of shape {s.shape} and labels of shape {y.shape} do not pair. Give two equal lists.")
    if not np.isfinite(s).all():
        raise ValueError("a score is not finite, so it has no place in an order. Leave such items out as undecided.")
    if not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("a label is neither 0 nor 1. Correctness is yes or no; count a partial answer as 0.")
    return s, y


def _group_ends(ordered: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The last index of each run of equal values."""
    return np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))


def _evened(ordered: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`values` with each run of equal `ordered` replaced by its mean."""
    _, where, sizes = np.unique(ordered, return_inverse=True, return_counts=True)
    return (np.bincount(where, values, len(sizes)) / np.maximum(sizes, 1))[where] if len(values) else values
