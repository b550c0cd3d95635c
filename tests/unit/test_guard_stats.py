"""The intervals and tests of the needle benchmark, against closed forms."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from guard_stats import chi_square, upper_tail, wilson


@pytest.mark.parametrize("chi2", [0.3, 2.0, 9.5, 40.0])
def test_tails_have_closed_forms(chi2: float) -> None:
    """Of 2, 4 and 6 degrees of freedom by Poisson sums, of 1 by the error function."""
    half = chi2 / 2
    for terms in (1, 2, 3):
        expected = math.exp(-half) * sum(half**i / math.factorial(i) for i in range(terms))
        assert upper_tail(chi2, 2 * terms) == pytest.approx(expected, rel=1e-9)
    assert upper_tail(chi2, 1) == pytest.approx(math.erfc(math.sqrt(half)), rel=1e-9)


def test_even_and_uneven_misses() -> None:
    even = chi_square([[True] * 30 + [False] * 10] * 5)
    assert even["p"] == pytest.approx(1) and even["df"] == 4
    uneven = chi_square([[True] * 40, [True] * 20 + [False] * 20])
    # a table of 2 by 2: n (ad - bc)^2 over the product of the margins
    assert uneven["chi2"] == pytest.approx(80 * (40 * 20 - 0) ** 2 / (40 * 40 * 60 * 20))
    assert uneven["p"] < 1e-6
    assert chi_square([[True], [True]])["p"] == 1


def test_wilson_at_the_ends() -> None:
    low, high = wilson(50, 50)
    assert high == pytest.approx(1) and low == pytest.approx(50 / (50 + 1.959964**2))
    assert wilson(0, 0) == (0.0, 1.0)
