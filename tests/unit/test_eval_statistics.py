"""Intervals and paired tests, held to their definitions."""

import math
import random
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from rorqual.evals import statistics as st

Z = NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize("successes,trials", [(1, 10), (5, 10), (9, 10), (37, 412), (9999, 10_000)])
def test_wilson_bounds_are_the_shares_that_the_score_test_just_accepts(successes, trials):
    interval = st.wilson(successes, trials)
    assert interval is not None and interval.value == successes / trials
    for bound in (interval.low, interval.high):
        assert abs(interval.value - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / trials), rel=1e-9)
    assert interval.low < interval.value < interval.high


def test_wilson_at_the_ends_and_without_trials():
    none, every = st.wilson(0, 50), st.wilson(50, 50)
    assert none is not None and every is not None
    assert none.low == 0 and none.high == pytest.approx(Z**2 / (50 + Z**2))
    assert every.high == 1 and every.low == pytest.approx(1 - none.high)
    assert st.wilson(0, 0) is None
    with pytest.raises(ValueError, match="no share"):
        st.wilson(3, 2)


def test_bound_beside_a_perfect_score():
    assert st.miss_bound(3000) == pytest.approx(0.001) and st.miss_bound(2) == 1 and st.miss_bound(0) is None
    assert (1 - st.miss_bound(3000)) ** 3000 == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("lost,gained", [(0, 0), (0, 1), (3, 9), (9, 3), (10, 10), (600, 700)])
def test_mcnemar_is_the_two_sided_sign_test(lost, gained):
    n = lost + gained
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(n + 1) if abs(2 * k - n) >= abs(gained - lost))
    assert st.mcnemar_exact(lost, gained) == pytest.approx(float(tail), rel=1e-12)


def test_comparison_pairs_on_item_ids():
    first = {"a": True, "b": True, "c": False, "d": False, "only": True}
    second = {"d": True, "c": True, "b": False, "a": True, "other": False}
    got = st.compare_right(first, second)
    assert got is not None
    assert (got.first, got.second, got.difference, got.n) == (0.5, 0.75, 0.25, 4)
    assert got.p == st.mcnemar_exact(1, 2)
    assert st.compare_right({"a": True}, {"b": True}) is None


def test_bootstrap_of_many_values_is_near_the_normal_interval():
    x = np.random.default_rng(0).normal(3, 2, 2000)
    got = st.bootstrap_mean(x, seed=1)
    assert got is not None
    half = Z * x.std() / math.sqrt(len(x))
    assert got.value == pytest.approx(x.mean())
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.05)


def test_probes_of_one_document_are_drawn_together():
    rng = random.Random(0)
    level = [rng.random() for _ in range(50)]  # what is shared by the 20 probes of a document
    values = [level[i // 20] for i in range(1000)]
    single = st.bootstrap_mean(values, seed=3)
    blocked = st.bootstrap_mean(values, [i // 20 for i in range(1000)], seed=3)
    documents = st.bootstrap_mean(level, seed=3)
    assert single is not None and blocked is not None and documents is not None
    assert blocked.low == pytest.approx(documents.low) and blocked.high == pytest.approx(documents.high)
    assert (blocked.high - blocked.low) / (single.high - single.low) == pytest.approx(math.sqrt(20), rel=0.1)


def test_paired_bootstrap_takes_what_both_runs_have():
    rng = random.Random(2)
    first = {str(i): rng.random() for i in range(300)}
    second = {i: v + 0.1 for i, v in first.items() if i != "7"} | {"new": 5.0}
    got = st.paired_bootstrap(first, second, seed=0)
    assert got is not None
    assert got.value == pytest.approx(0.1) and got.low == pytest.approx(0.1) and got.high == pytest.approx(0.1)
    assert st.paired_bootstrap({"a": 1.0}, {"b": 1.0}, seed=0) is None


def test_bootstrap_is_a_function_of_its_seed():
    x = [random.Random(i).random() for i in range(40)]
    assert st.bootstrap_mean(x, seed=1) == st.bootstrap_mean(x, seed=1)
    assert st.bootstrap_mean(x, seed=1) != st.bootstrap_mean(x, seed=2)
    with pytest.raises(ValueError, match="do not pair"):
        st.bootstrap_mean(x, ["a"], seed=0)


def test_rank_correlation():
    rng = random.Random(4)
    a = [rng.random() for _ in range(30)]
    b = [v + 0.3 * rng.random() for v in a]
    ranks = [sorted(side).index(v) for side in (a, b) for v in side]
    d2 = sum((x - y) ** 2 for x, y in zip(ranks[:30], ranks[30:], strict=True))
    assert st.spearman(a, b) == pytest.approx(1 - 6 * d2 / (30 * (30**2 - 1)))
    assert st.spearman([1, 2, 3], [9, 8, 1]) == pytest.approx(-1)
    assert st.spearman([1, 1, 1], [1, 2, 3]) is None
    tied = st.spearman([1, 1, 2, 2], [1, 2, 3, 4])
    assert tied == pytest.approx(np.corrcoef([1.5, 1.5, 3.5, 3.5], [1, 2, 3, 4])[0, 1])
