"""Figures of long contexts, and of tokens and money, on tables small enough to check by hand."""

from dataclasses import dataclass

import pytest

from rorqual.evals import context_metrics as cm
from rorqual.evals import economy
from rorqual.evals.economy import PriceVector
from rorqual.evals.records import Usage
from rorqual.evals.statistics import wilson


@dataclass(frozen=True)
class Spent:
    score: float
    usage: Usage


def table(shares: dict[int, tuple[int, int]]) -> dict[int, object]:
    return {key: wilson(*counts) for key, counts in shares.items()}


def test_cells_count_by_key() -> None:
    found = cm.cells([(1, True), (1, False), (2, True)])
    assert found[1] == wilson(1, 2) and found[2] == wilson(1, 1) and len(found) == 2


def test_reliable_length_ends_at_the_first_doubt() -> None:
    by_length = table({1024: (400, 400), 2048: (390, 400), 4096: (200, 400), 8192: (400, 400)})
    assert cm.reliable_length(by_length, 0.9) == 2048  # type: ignore[arg-type]
    assert cm.reliable_length(by_length, 0.4) == 8192  # type: ignore[arg-type]
    assert cm.reliable_length(by_length, 0.999) is None  # type: ignore[arg-type]
    few = table({1024: (4, 4)})
    assert cm.reliable_length(few, 0.9) is None, "four of four do not show 90 %"  # type: ignore[arg-type]


def test_area_is_over_the_logarithm_of_length() -> None:
    by_length = table({1024: (10, 10), 4096: (5, 10), 8192: (0, 10)})
    assert cm.area_over_log_length(by_length) == pytest.approx((2 * 0.75 + 1 * 0.25) / 3)  # type: ignore[arg-type]
    assert cm.area_over_log_length(table({512: (3, 4)})) == 0.75 and cm.area_over_log_length({}) is None  # type: ignore[arg-type]


def test_flatness_and_repetition() -> None:
    assert cm.flatness(table({0: (9, 10), 1: (6, 10), 2: (8, 10)})) == pytest.approx(0.3)  # type: ignore[arg-type]
    assert cm.flatness(table({0: (9, 10)})) is None  # type: ignore[arg-type]
    assert cm.repeat_rate([["a", "a"], ["a", "b"], ["c", "c", "c"]]) == pytest.approx(1 / 3)
    assert cm.repeat_rate([]) is None


def test_tokens_and_money_of_solved_items() -> None:
    rows = [
        Spent(1.0, Usage(prompt=100, cached=40, completion=10)),
        Spent(0.0, Usage(prompt=50, completion=30, referee_prompt=20, referee_completion=5)),
        Spent(1.0, Usage(prompt=10, completion=5)),
    ]
    price = PriceVector(hit=1, miss=10, output=100)
    assert economy.tokens_per_solved(rows) == (10 + 35 + 5) / 2
    cost = (40 * 1 + (60 + 50 + 20 + 10) * 10 + 50 * 100) / 1e6
    assert economy.cost_per_solved(rows, price) == pytest.approx(cost / 2)
    assert economy.waste(rows) == 35 / 50 and economy.verification_ratio(rows) == 5 / 45
    assert economy.tokens_per_solved(rows[1:2]) is None and economy.waste([]) is None


def test_overthinking_and_adherence() -> None:
    assert economy.overthinking([(10, 5), (9, 3), (4, 4)]) == 2
    assert economy.overthinking([]) is None
    assert economy.adherence([95, 111, 100], [100, 100, 100]) == pytest.approx(2 / 3)
    assert economy.adherence([], []) is None
