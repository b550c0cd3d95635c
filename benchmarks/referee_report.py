"""The rows of the abstention study, from the records of its questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rorqual.evals import metrics
from rorqual.evals.metrics import Counts
from rorqual.referee.confidence import SIGNALS, Calibrator, Cascade, fit, promise, threshold_of
from rorqual.train.run_plots import COLOURS, pyplot

Record = dict[str, Any]
Vector = npt.NDArray[np.float64]

PREVALENCES = (0.13, 0.43, 0.80)
SPLITS = 50
FORBIDDEN = -99.0  # where a signal was not measured


class Exam:
    """Records of one split as arrays; `only` picks rows."""

    def __init__(self, records: Sequence[Record], paraphrases: int) -> None:
        self.paraphrases = paraphrases
        self.records = list(records)
        self.right = np.array([r["right"] for r in records], dtype=np.bool_)
        self.kind = np.array([r["class"] for r in records])
        self.entity = np.array([r["entity"] for r in records])
        self.is_new = np.array([r["wording"] == "new" for r in records])
        self.signals = [r["signals"][str(paraphrases)] for r in records]

    def only(self, where: npt.NDArray[np.bool_]) -> Exam:
        return Exam([r for r, keep in zip(self.records, where, strict=True) if keep], self.paraphrases)

    @property
    def is_known(self) -> npt.NDArray[np.bool_]:
        return np.char.startswith(self.kind, "K")

    def column(self, name: str) -> Vector:
        if name == "max_prob":
            return np.array([r["max_prob"] for r in self.records])
        sign = 1.0 if next(s.rises for s in SIGNALS if s.name == name) else -1.0
        return np.array([sign * s[name] if name in s else FORBIDDEN for s in self.signals])

    def mix(self, known: str) -> npt.NDArray[np.bool_]:
        """One known stratum with all unknown ones."""
        return (self.kind == known) | ~self.is_known


def draws(entities: npt.NDArray[Any], repeats: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """How often each row is in each bootstrap sample [repeats, N]; samples draw whole entities."""
    _, where = np.unique(entities, return_inverse=True)
    count = int(where.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=repeats).astype(np.float32)
    return drawn[:, where]


def resampled(s: Vector, y: npt.NDArray[np.bool_], weights: npt.NDArray[np.float32]) -> dict[str, Vector]:
    """AUROC and AURC of every bootstrap sample [repeats]; equal scores in a random order, the same for all samples."""
    order = np.lexsort((np.random.default_rng(2).random(len(s)), -s))
    w, wrong = weights[:, order].astype(np.float64), (~y[order]).astype(np.float64)
    total, errors = np.cumsum(w, axis=1), np.cumsum(w * wrong, axis=1)
    risk = errors / np.maximum(total, 1)
    right = w * (1 - wrong)
    below = errors[:, -1:] - errors
    return {
        "AUROC": (right * below).sum(1) / (right.sum(1) * errors[:, -1]),
        "AURC": (w * risk).sum(1) / total[:, -1],
    }


def resampled_gate(
    s: Vector, y: npt.NDArray[np.bool_], threshold: float, weights: npt.NDArray[np.float32]
) -> tuple[Vector, Vector]:
    """HR and RET of the gate in every bootstrap sample [repeats]."""
    given = s >= threshold
    wrong, kept = weights[:, given & ~y].sum(1), weights[:, given & y].sum(1)
    return wrong / (wrong + weights[:, ~given].sum(1)), kept / weights[:, y].sum(1)


def interval(values: Vector) -> list[float]:
    return [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))]


def threshold_for_retention(scores: Vector, right: npt.NDArray[np.bool_], retained: float) -> float:
    """The highest threshold that keeps at least `retained` of the right answers."""
    kept = np.sort(scores[right])[::-1]
    return float(kept[int(np.ceil(retained * len(kept))) - 1])


def gate_figures(cal: Exam, test: Exam, cal_s: Vector, test_s: Vector, repeats: int) -> dict[str, Any]:
    """A1/A2/A3/A4's figures of one score on one mix, thresholds from cal, intervals over test entities."""
    at_ret = threshold_for_retention(cal_s, cal.right, 0.99)
    at_hr = metrics.fit_threshold(cal_s, cal.right, 0.05)
    own_ret = threshold_for_retention(test_s, test.right, 0.99)

    weights = draws(test.entity, repeats)
    one = metrics.gate_point(test_s, test.right, at_ret)
    two = metrics.gate_point(test_s, test.right, at_hr)
    spread = resampled(test_s, test.right, weights)
    hr_one, ret_one = resampled_gate(test_s, test.right, at_ret, weights)
    hr_two, ret_two = resampled_gate(test_s, test.right, at_hr, weights)
    many = {
        "HR@cal_RET99": (one.hr, hr_one), "RET@cal_RET99": (one.ret, ret_one),
        "RET@cal_HR5": (two.ret, ret_two), "HR@cal_HR5": (two.hr, hr_two),
        "AUROC": (metrics.auroc(test_s, test.right), spread["AUROC"]),
        "AURC": (metrics.aurc(test_s, test.right), spread["AURC"]),
    }  # fmt: skip
    result: dict[str, Any] = {
        name: [None if value is None else round(value, 4), *interval(draw)] for name, (value, draw) in many.items()
    }
    curve = metrics.gate_point(test_s, test.right, own_ret)
    curve5 = metrics.gate_point(test_s, test.right, metrics.fit_threshold(test_s, test.right, 0.05))
    result["on_test_curve"] = {"HR@RET99": curve.hr, "RET@HR5": curve5.ret}
    return result


def rows(
    cal: list[Record], test: list[Record], *, paraphrases: int, repeats: int, plots: Path
) -> Iterator[dict[str, Any]]:
    """Every row of the study. `plots`: folder for the figures and the fitted calibrator."""
    c, t = Exam(cal, paraphrases), Exam(test, paraphrases)
    calls = {0: 0, 1: paraphrases, 2: 5}
    yield from forced(c, t)
    calibrator = fitted(c)
    calibrator.save(plots / "confidence.json")
    cascade = Cascade.plan(calibrator, threshold_of("chat"), calls)
    scores = score_table(calibrator, cascade, c, t)
    for known in ("K-clean", "K-graded"):
        at, bt = c.mix(known), t.mix(known)
        for name, (a, b) in scores.items():
            found = gate_figures(c.only(at), t.only(bt), a[at], b[bt], repeats)
            yield {"row": "gate", "mix": known, "score": name, "n": int(bt.sum()), **found}
        yield from sampled_rows(
            known, t, {"cascade": scores["cascade"][1], "mean_logprob": scores["mean_logprob"][1]}, repeats
        )
        yield from at_goals(calibrator, known, c.only(at), t.only(bt), calls, repeats)
        yield from compared(known, t, bt, {name: b[bt] for name, (_, b) in scores.items()}, repeats)
    yield index_row(t, scores)
    yield from held_out(c, t, calls)
    yield from calibration_rows(calibrator, cascade, t, plots)
    yield from conformal_rows(cascade, t)
    draw(t, scores, plots)
    yield {"row": "A10", "extra_calls": round(cascade.run(t.signals)[1], 4), "cal": round(cascade.run(c.signals)[1], 4)}


def at_goals(
    calibrator: Calibrator, known: str, c: Exam, t: Exam, calls: dict[int, int], repeats: int
) -> Iterator[dict[str, Any]]:
    """The cascade planned around the threshold of each goal, for this mix of questions; cal gives both."""
    p = calibrator.p(c.signals)
    own = [replace(tier, chances=tuple(np.sort(tier.p(c.signals)).tolist())) for tier in calibrator.tiers]
    calibrator = replace(calibrator, tiers=tuple(own))
    goals = {
        "RET 99": threshold_for_retention(p, c.right, 0.99),
        "HR 5": metrics.fit_threshold(p, c.right, 0.05),
    }
    for goal, threshold in goals.items():
        cascade = Cascade.plan(calibrator, threshold, calls)
        cal_p, test_p = cascade.run(c.signals)[0], cascade.run(t.signals)[0]
        found = gate_figures(c, t, cal_p, test_p, repeats)
        spent = round(cascade.run(t.signals)[1], 4)
        yield {"row": "gate", "mix": known, "score": f"cascade for {goal}", "extra_calls": spent, **found}


def forced(c: Exam, t: Exam) -> Iterator[dict[str, Any]]:
    """What the model knows: share right by stratum, wording and exposure."""
    for split, exam in (("cal", c), ("test", t)):
        for kind in sorted(set(exam.kind)):
            for new in (False, True):
                here = (exam.kind == kind) & (exam.is_new == new)
                share = float(exam.right[here].mean()) if here.any() else None
                yield {"row": "forced", "split": split, "class": str(kind), "new_wording": new, "n": int(here.sum()),
                       "entities": len(set(exam.entity[here])), "right": share}  # fmt: skip
    grades = np.array([-1 if r["grade"] is None else r["grade"] for r in t.records])
    for grade in range(10):
        here = (t.kind == "K-graded") & (grades == grade)
        if here.any():
            yield {"row": "exposure", "times": 2**grade, "n": int(here.sum()), "right": float(t.right[here].mean())}


def fitted(exam: Exam) -> Calibrator:
    """The calibrator of `exam`, without `recall`: it costs a call and adds nothing, but is shown beside the others."""
    names = [signal.name for signal in SIGNALS if signal.name != "recall"]
    return fit(exam.signals, exam.right.tolist(), model_sha="study", groups=exam.entity.tolist(), names=names)


def score_table(calibrator: Calibrator, cascade: Cascade, c: Exam, t: Exam) -> dict[str, tuple[Vector, Vector]]:
    """Every score that is compared, on cal and test: baselines, single signals, the calibrated tiers, the cascade."""
    used = {*calibrator.at().signals, "recall"}
    table = {
        name: (c.column(name), t.column(name)) for name in ("max_prob", *(s.name for s in SIGNALS if s.name in used))
    }
    for tier in calibrator.tiers:
        table[f"tier {tier.tier}"] = (tier.p(c.signals), tier.p(t.signals))
    table["cascade"] = (cascade.run(c.signals)[0], cascade.run(t.signals)[0])
    return table


def compared(
    known: str, t: Exam, where: npt.NDArray[np.bool_], scores: dict[str, Vector], repeats: int
) -> Iterator[dict[str, Any]]:
    """AURC of the cascade less that of every other score, on the same draws of entities (negative: cascade better)."""
    exam = t.only(where)
    weights = draws(exam.entity, repeats)
    best = resampled(scores["cascade"], exam.right, weights)["AURC"]
    for name, score in scores.items():
        if name != "cascade":
            own = metrics.aurc(scores["cascade"], exam.right), metrics.aurc(score, exam.right)
            gap = best - resampled(score, exam.right, weights)["AURC"]
            assert own[0] is not None and own[1] is not None
            value = round(own[0] - own[1], 4)
            yield {"row": "AURC difference", "mix": known, "against": name, "value": value, "ci": interval(gap)}


def sampled_rows(known: str, t: Exam, scores: dict[str, Vector], repeats: int) -> Iterator[dict[str, Any]]:
    """Semantic entropy of samples, on the part of the entities that was sampled, beside others on the same part."""
    where = t.mix(known) & np.array(["semantic_entropy" in s for s in t.signals])
    if not where.any():
        return
    exam = t.only(where)
    weights = draws(exam.entity, repeats)
    table = {"semantic_entropy": exam.column("semantic_entropy"), **{name: s[where] for name, s in scores.items()}}
    for name, s in table.items():
        spread = resampled(s, exam.right, weights)
        yield {"row": "sampled part", "mix": known, "score": name, "n": int(where.sum()),
               "AUROC": [round(metrics.auroc(s, exam.right) or 0.0, 4), *interval(spread["AUROC"])],
               "AURC": [round(metrics.aurc(s, exam.right) or 0.0, 4), *interval(spread["AURC"])]}  # fmt: skip


def counts(right: npt.NDArray[np.bool_], given: npt.NDArray[np.bool_]) -> Counts:
    return Counts(C=float((right & given).sum()), I=float((~right & given).sum()), A=float((~given).sum()))


def index_row(t: Exam, scores: dict[str, tuple[Vector, Vector]]) -> dict[str, Any]:
    """A5: OI on K-graded with the unknown classes at lambda 1, as a share of the oracle's, and by prevalence."""
    result: dict[str, Any] = {"row": "A5"}
    where = t.mix("K-graded")
    exam, p = t.only(where), scores["cascade"][1][where]
    given = p > threshold_of("chat")
    oracle = metrics.omniscience_index(counts(exam.right, exam.right))
    for name, mask in (("gate off", np.ones(len(p), dtype=np.bool_)), ("cascade", given)):
        index = metrics.omniscience_index(counts(exam.right, mask))
        assert index is not None and oracle
        result[name] = {"OI": round(index, 2), "share of oracle": round(index / oracle, 4)}
        known, unknown = (
            counts(exam.right[exam.is_known], mask[exam.is_known]),
            counts(exam.right[~exam.is_known], mask[~exam.is_known]),
        )
        for prevalence in PREVALENCES:
            mixed = metrics.at_prevalence(known, unknown, prevalence)
            assert mixed is not None
            result[name][f"at {prevalence}"] = {
                "OI": round(metrics.omniscience_index(mixed) or 0.0, 2),
                "HR": round(metrics.hallucination_rate(mixed) or 0.0, 4),
                "ACC": round(metrics.accuracy(mixed) or 0.0, 4),
            }
    result["oracle OI"] = round(oracle or 0.0, 2)
    return result


def held_out(c: Exam, t: Exam, calls: dict[int, int]) -> Iterator[dict[str, Any]]:
    """A6: calibrate and set thresholds without one unknown class, then ask it; HR_U and RET on test."""
    for kind in ("U-near", "U-attr", "U-novel"):
        without = c.only(c.kind != kind)
        calibrator = fitted(without)
        for known in ("K-clean", "K-graded"):
            mix = without.mix(known)
            first = metrics.fit_threshold(calibrator.p(without.only(mix).signals), without.right[mix], 0.05)
            cascade = Cascade.plan(calibrator, first, calls)
            cal_p, test_p = cascade.run(without.signals)[0], cascade.run(t.signals)[0]
            threshold = metrics.fit_threshold(cal_p[mix], without.right[mix], 0.05)
            here, others = t.kind == kind, t.kind == known
            point = metrics.gate_point(test_p[others], t.right[others], threshold)
            answered = round(float((test_p[here] >= threshold).mean()), 4)
            yield {"row": "A6", "held_out": kind, "known": known, "HR_U": answered,
                   "n": int(here.sum()), "RET": point.ret}  # fmt: skip


def calibration_rows(calibrator: Calibrator, cascade: Cascade, t: Exam, plots: Path) -> Iterator[dict[str, Any]]:
    """A9: ECE, Brier and log loss before (the answer's probability) and after, in all and in held-out wordings."""
    p, raw = cascade.run(t.signals)[0], np.exp(t.column("mean_logprob"))
    for name, where in (
        ("all", np.ones(len(p), dtype=np.bool_)),
        ("trained wordings", ~t.is_new),
        ("new wordings", t.is_new),
    ):
        for label, s in (("raw", raw[where]), ("cascade", p[where])):
            y = t.right[where]
            yield {"row": "A9", "questions": name, "score": label, "ECE": metrics.expected_calibration_error(s, y),
                   "Brier": metrics.brier(s, y), "log_loss": metrics.log_loss(s, y)}  # fmt: skip


def conformal_rows(cascade: Cascade, t: Exam) -> Iterator[dict[str, Any]]:
    """The conformal promise over 50 random splits of test entities, none of which the calibrator saw."""
    p = cascade.run(t.signals)[0]
    names = np.unique(t.entity)

    def split(seed: int, once: bool, shifted: bool, alpha: float) -> tuple[float, float]:
        rng = np.random.default_rng(seed)
        first = np.isin(t.entity, rng.permutation(names)[: len(names) // 2])
        wrong = ~t.right
        if once:  # one wrong answer of each entity, so that what is left is exchangeable
            order = rng.permutation(len(p))
            order = order[wrong[order]]
            _, at = np.unique(t.entity[order], return_index=True)
            wrong = np.isin(np.arange(len(p)), order[at])
        a, b = first & wrong, ~first & wrong
        if shifted:
            a, b = a & ~t.is_new, b & t.is_new
        made = promise(p[a].tolist(), alpha)
        return float((p[b] > made.threshold).mean()), made.spread

    for alpha in (0.05, 0.10):
        for label, once, shifted in (
            ("one question an entity", True, False),
            ("all questions", False, False),
            ("new wordings", True, True),
        ):
            found = [split(seed, once, shifted, alpha) for seed in range(SPLITS)]
            rates = np.array([rate for rate, _ in found])
            yield {
                "row": "conformal", "alpha": alpha, "questions": label, "splits": SPLITS,
                "mean": round(float(rates.mean()), 4),
                "sd": round(float(rates.std(ddof=1)), 4), "max": round(float(rates.max()), 4),
                "sd the theory gives for calibration alone": round(float(np.mean([s for _, s in found])), 4),
                "splits above alpha + 1 point": int((rates > alpha + 0.01).sum()),
            }  # fmt: skip


SHOWN = ("max_prob", "mean_logprob", "familiarity", "shared_logprob", "tier 0", "cascade")


def draw(t: Exam, scores: dict[str, tuple[Vector, Vector]], folder: Path) -> None:
    """Two figures: risk over coverage of both mixes, and reliability before and after calibration."""
    plots = pyplot()
    figure, both = plots.subplots(1, 2, figsize=(10.5, 4.0))
    for axes, known in zip(both, ("K-clean", "K-graded"), strict=True):
        where = t.mix(known)
        for colour, name in zip(COLOURS, SHOWN, strict=False):
            risks = metrics.risk_coverage(scores[name][1][where], t.right[where])
            axes.plot(np.arange(1, len(risks) + 1) / len(risks), risks, color=colour, label=name)
        best = metrics.risk_coverage(t.right[where].astype(float), t.right[where])
        axes.plot(np.arange(1, len(best) + 1) / len(best), best, ":", color="black", label="perfect order")
        axes.set(
            xlabel="coverage (share answered)",
            ylabel="risk (share wrong among them)",
            xlim=(0, 1),
            title=f"{known} and unknown",
        )
    both[0].legend(frameon=False)
    figure.savefig(folder / "abstention_risk.png", dpi=110, bbox_inches="tight")
    plots.close(figure)
    figure, axes = plots.subplots(figsize=(5.2, 4.2))
    axes.plot([0, 1], [0, 1], ":", color="black")
    for colour, (label, p) in zip(
        COLOURS,
        (("answer's probability", np.exp(t.column("mean_logprob"))), ("calibrated", scores["cascade"][1])),
        strict=False,
    ):
        bins = metrics.reliability(p, t.right)
        axes.plot([b.confidence for b in bins], [b.right for b in bins], "o-", color=colour, label=label)
    axes.set(xlabel="confidence", ylabel="share right (test)", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(folder / "abstention_reliability.png", dpi=110, bbox_inches="tight")
    plots.close(figure)
