"""Intervals and tests for the needle benchmark: Wilson's interval, and whether misses are spread evenly."""

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959964


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    if not count:
        return 0.0, 1.0
    share, spread = hits / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def chi_square(cells: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Pearson's test of homogeneity: whether cells miss alike. `p` is 1 where nothing or everything was missed, and
    `smallest` is the smallest count of misses expected in a cell: below 5 the test is rough.
    """
    cells = [cell for cell in cells if len(cell)]
    total, misses = sum(map(len, cells)), sum(len(cell) - sum(cell) for cell in cells)
    if len(cells) < 2 or not 0 < misses < total:
        return {"chi2": 0.0, "df": max(0, len(cells) - 1), "p": 1.0, "smallest": 0.0}
    rate, chi2 = misses / total, 0.0
    for cell in cells:
        expected = rate * len(cell)
        chi2 += (len(cell) - sum(cell) - expected) ** 2 * (1 / expected + 1 / (len(cell) - expected))
    smallest = min(min(rate, 1 - rate) * len(cell) for cell in cells)
    return {"chi2": chi2, "df": len(cells) - 1, "p": upper_tail(chi2, len(cells) - 1), "smallest": smallest}


def upper_tail(chi2: float, df: int) -> float:
    """P(X >= chi2) of a chi-square variable: the regularised upper incomplete gamma function Q(df / 2, chi2 / 2)."""
    a, x = df / 2, chi2 / 2
    if x <= 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:  # by the series of the lower function
        term = total = 1 / a
        n = a
        while term > total * 1e-15:
            n += 1
            term *= x / n
            total += term
        return 1 - total * scale
    tiny = 1e-300  # by Lentz's continued fraction
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    value = d
    for i in range(1, 1000):
        an = -i * (i - a)
        b += 2
        d = 1 / (an * d + b or tiny)
        c = b + an / c or tiny
        step = d * c
        value *= step
        if abs(step - 1) < 1e-14:
            break
    return value * scale
