"""The formulas of result tables, held to definitions that share no code with them."""

import itertools
import math
import random

import numpy as np
import pytest

from rorqual.evals import metrics as m


def sample(seed: int, n: int, levels: int | None = None) -> tuple[list[float], list[bool]]:
    """Scores and labels that agree somewhat; `levels` makes ties."""
    rng = random.Random(seed)
    labels = [rng.random() < 0.6 for _ in range(n)]
    scores = [min(1.0, max(0.0, rng.gauss(0.7 if y else 0.4, 0.25))) for y in labels]
    return ([round(s * levels) / levels for s in scores] if levels else scores), labels


def by_pairs(scores: list[float], labels: list[bool]) -> float:
    items = list(zip(scores, labels, strict=True))
    pairs = [(a > b) + 0.5 * (a == b) for a, x in items for b, y in items if x and not y]
    return sum(pairs) / len(pairs)


def risks_of_order(order: tuple[int, ...], labels: list[bool]) -> list[float]:
    return [sum(not labels[i] for i in order[: k + 1]) / (k + 1) for k in range(len(order))]


def sorted_orders(scores: list[float]) -> list[tuple[int, ...]]:
    """Every order of the items with falling scores."""
    items = range(len(scores))
    return [o for o in itertools.permutations(items) if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))]


# -- 3.1 --


def test_formulas_on_counts_where_every_letter_differs():
    c = m.Counts.of("CCCCCCCPPIIIAAAAAXX")
    assert (c.C, c.P, c.I, c.A, c.X, c.n) == (7, 2, 3, 5, 2, 17)
    assert m.accuracy(c) == 7 / 17
    assert m.omniscience_index(c) == pytest.approx(100 * (7 - 3) / 17)
    assert m.hallucination_rate(c) == 3 / (3 + 2 + 5)
    assert m.answered_share(c) == 12 / 17
    assert m.correct_given_attempted(c) == 7 / 10
    assert m.f1_of_attempts(c) == pytest.approx(2 * (7 / 17) * 0.7 / (7 / 17 + 0.7))
    assert m.utility(c, 3.0) == (7 - 9) / 17
    assert c.undecided_rate == 2 / 19


def test_undecided_items_are_neither_right_nor_wrong_until_the_worst_case():
    c = m.Counts.of("CIXX")
    assert m.accuracy(c) == 1 / 2 and m.accuracy(c.worst()) == 1 / 4
    assert m.omniscience_index(c.worst()) == -50 and c.worst().n == 4


def test_a_model_that_refuses_everything_has_hr_0_and_is_shown_by_its_counter_metrics():
    refuses, forced = "A" * 8, "CCCCCIII"
    assert m.hallucination_rate(m.Counts.of(refuses)) == 0
    assert m.omniscience_index(m.Counts.of(refuses)) == 0
    assert m.retention(forced, refuses) == 0 and m.over_refusal(forced, refuses) == 1
    assert m.rescue(forced, refuses) == 1


def test_what_is_not_defined_is_none_and_no_number():
    empty, right = m.Counts(), m.Counts.of("CCC")
    for metric in (m.accuracy, m.omniscience_index, m.hallucination_rate, m.answered_share, m.f1_of_attempts):
        assert metric(empty) is None
    assert m.hallucination_rate(right) is None
    assert m.correct_given_attempted(m.Counts.of("AA")) is None and m.f1_of_attempts(m.Counts.of("AA")) is None
    assert m.f1_of_attempts(m.Counts.of("II")) == 0
    assert m.retention("II", "AI") is None and m.rescue("CC", "CA") is None
    assert empty.undecided_rate is None


def test_retention_counts_only_what_the_forced_run_had_right():
    forced, gated = "CCCCIIIX", "CCAIACIC"
    assert m.retention(forced, gated) == 2 / 4
    assert m.rescue(forced, gated) == 1 / 3
    with pytest.raises(ValueError, match="same items"):
        m.retention("CC", "C")


def test_gate_of_a_loss_and_the_loss_of_a_promise_are_inverse():
    assert m.answer_threshold(1) == 0.5 and m.answer_threshold(9) == pytest.approx(0.9)
    for t in (0.0, 0.5, 0.75, 0.9):
        assert m.answer_threshold(m.loss_of_confidence(t)) == pytest.approx(t)
    with pytest.raises(ValueError, match="loss"):
        m.answer_threshold(-1)
    with pytest.raises(ValueError, match="encodes no loss"):
        m.loss_of_confidence(1.0)


def test_reweighting_to_a_prevalence_equals_a_set_built_at_that_prevalence():
    known, unknown = m.Counts.of("CCCIA"), m.Counts.of("IIIA")
    built = m.Counts.of("CCCIA" * 4 * 43 + "IIIA" * 5 * 57)
    mixed = m.at_prevalence(known, unknown, 0.43)
    assert mixed is not None
    assert m.omniscience_index(mixed) == pytest.approx(m.omniscience_index(built))
    assert m.hallucination_rate(mixed) == pytest.approx(m.hallucination_rate(built))
    assert m.at_prevalence(known, m.Counts(), 0.43) is None
    only = m.at_prevalence(known, m.Counts(), 1.0)
    assert only is not None and m.accuracy(only) == pytest.approx(0.6)


# -- 3.2 --


@pytest.mark.parametrize("levels", [None, 10, 3, 1])
def test_auroc_is_the_chance_of_a_right_order_with_ties_half(levels):
    for seed in range(5):
        scores, labels = sample(seed, 60, levels)
        assert m.auroc(scores, labels) == pytest.approx(by_pairs(scores, labels), abs=1e-12)
    assert m.auroc([0.1, 0.2], [True, True]) is None


@pytest.mark.parametrize("levels", [None, 3, 1])
def test_risk_is_the_mean_over_all_orders_of_tied_items(levels):
    for seed in range(4):
        scores, labels = sample(seed, 7, levels)
        orders = sorted_orders(scores)
        expected = np.mean([risks_of_order(order, labels) for order in orders], axis=0)
        assert np.allclose(m.risk_coverage(scores, labels), expected)
        assert m.aurc(scores, labels) == pytest.approx(expected.mean())
        best = min(np.mean(risks_of_order(o, labels)) for o in itertools.permutations(range(7)))
        assert m.excess_aurc(scores, labels) == pytest.approx(expected.mean() - best)


def test_perfect_ordering_has_no_excess_and_its_area_is_near_the_limit_formula():
    labels = [True] * 7000 + [False] * 3000
    scores = np.linspace(1, 0, 10_000)
    assert m.excess_aurc(scores, labels) == pytest.approx(0, abs=1e-12)
    assert m.aurc(scores, labels) == pytest.approx(0.3 + 0.7 * math.log(0.7), abs=1e-3)


@pytest.mark.parametrize("levels", [None, 6])
@pytest.mark.parametrize("risk", [0.01, 0.05, 0.2])
def test_coverage_at_risk_is_the_best_any_threshold_reaches(levels, risk):
    for seed in range(5):
        scores, labels = sample(seed, 50, levels)
        covered = [0.0]
        for threshold in set(scores):
            given = [y for s, y in zip(scores, labels, strict=True) if s >= threshold]
            if given.count(False) <= risk * len(given):
                covered.append(len(given) / 50)
        assert m.coverage_at_risk(scores, labels, risk) == pytest.approx(max(covered))


@pytest.mark.parametrize("levels", [None, 6])
def test_fitted_threshold_retains_most_among_all_that_keep_the_rate(levels):
    for seed in range(6):
        scores, labels = sample(seed, 80, levels)
        fitted = m.gate_point(scores, labels, m.fit_threshold(scores, labels, 0.1))
        others = [m.gate_point(scores, labels, t) for t in (*set(scores), math.inf)]
        kept = [p.ret for p in others if p.hr is None or p.hr <= 0.1]
        assert fitted.ret == max(kept) and (fitted.hr is None or fitted.hr <= 0.1)


def test_gate_point_counts_by_the_formulas_of_grades():
    scores, labels = sample(3, 70)
    grades = ["A" if s < 0.55 else "C" if y else "I" for s, y in zip(scores, labels, strict=True)]
    point = m.gate_point(scores, labels, 0.55)
    assert point.hr == m.hallucination_rate(m.Counts.of(grades))
    assert point.ret == m.retention(["C" if y else "I" for y in labels], grades)


def test_bins_have_equal_mass_and_their_error_is_the_weighted_gap():
    scores, labels = sample(5, 1000)
    table = m.reliability(scores, labels)
    assert len(table) == 15 and {b.n for b in table} <= {66, 67}
    ranked = sorted(zip(scores, labels, strict=True))
    start, gap = 0, 0.0
    for b in table:
        part = ranked[start : start + b.n]
        start += b.n
        gap += abs(sum(s for s, _ in part) - sum(y for _, y in part)) / 1000
    assert m.expected_calibration_error(scores, labels) == pytest.approx(gap)


def test_calibrated_scores_have_a_small_error_and_overconfident_ones_a_known_one():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(20_000)]
    labels = [rng.random() < s for s in scores]
    assert m.expected_calibration_error(scores, labels) < 0.02
    assert m.expected_calibration_error([1.0] * 10, [True] * 7 + [False] * 3) == pytest.approx(0.3)


def test_nothing_depends_on_the_order_of_items():
    scores, labels = sample(8, 200, 7)
    mixed = random.Random(1).sample(range(200), 200)
    again = [scores[i] for i in mixed], [labels[i] for i in mixed]
    for metric in (m.auroc, m.aurc, m.excess_aurc, m.expected_calibration_error, m.brier, m.log_loss):
        assert metric(scores, labels) == pytest.approx(metric(*again), rel=1e-12)


def test_proper_scores():
    assert m.brier([0.8, 0.3], [True, False]) == pytest.approx((0.04 + 0.09) / 2)
    assert m.log_loss([0.8, 0.3], [True, False]) == pytest.approx(-(math.log(0.8) + math.log(0.7)) / 2)
    assert m.log_loss([1.0], [False]) == pytest.approx(-math.log(1e-12), rel=1e-3)
    assert m.brier([], []) is None and m.log_loss([], []) is None


def test_inputs_that_are_no_confidences_are_refused():
    with pytest.raises(ValueError, match="do not pair"):
        m.auroc([0.1], [True, False])
    with pytest.raises(ValueError, match="not finite"):
        m.aurc([float("nan")], [True])
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        m.brier([0.5], [0.5])


def test_retention_at_hr_of_two_halves_pools_what_each_threshold_gives() -> None:
    draw = random.Random(3)
    right = [draw.random() < 0.6 for _ in range(400)]
    scores = [draw.gauss(1.0 if one else 0.0, 0.8) for one in right]
    halves = [draw.random() < 0.5 for _ in right]
    counted = [draw.random() < 0.7 for _ in right]
    found = m.crossed_retention_at_hr(scores, right, halves, 0.1, counted)
    assert found is not None
    given = [False] * len(right)
    for half in (True, False):
        fitting = [i for i, h in enumerate(halves) if h != half]
        best = min(
            t for t in [*(scores[i] for i in fitting), float("inf")]
            if (point := m.gate_point([scores[i] for i in fitting], [right[i] for i in fitting], t)).hr is None
            or point.hr <= 0.1
        )  # fmt: skip
        for i, h in enumerate(halves):
            given[i] |= h == half and scores[i] >= best
    kept = [g for g, y, c in zip(given, right, counted, strict=True) if y and c]
    wrong = sum(g and not y for g, y in zip(given, right, strict=True))
    assert found.ret == pytest.approx(sum(kept) / len(kept))
    assert found.hr == pytest.approx(wrong / (wrong + given.count(False)))
    assert m.crossed_retention_at_hr(scores, right, [True] * 400, 0.1) is None
