"""Figures of long contexts: the length that can be relied on, flatness over depth and phase, area over log length.

Source: evaluation specification, section 3.3.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from rorqual.evals.metrics import share
from rorqual.evals.statistics import Interval, wilson

Key = TypeVar("Key", bound=Hashable)


def cells(items: Iterable[tuple[Key, bool]]) -> dict[Key, Interval]:
    """Share right and its Wilson interval for each key."""
    right: defaultdict[Key, int] = defaultdict(int)
    total: defaultdict[Key, int] = defaultdict(int)
    for key, is_right in items:
        right[key] += is_right
        total[key] += 1
    out = {}
    for key in total:
        interval = wilson(right[key], total[key])
        assert interval is not None
        out[key] = interval
    return out


def reliable_length(by_length: Mapping[int, Interval], floor: float) -> int | None:
    """L_eff: the largest length such that it and every shorter one has a lower bound of at least `floor`; else None."""
    reached = None
    for length in sorted(by_length):
        if by_length[length].low < floor:
            break
        reached = length
    return reached


def flatness(by_place: Mapping[Key, Interval]) -> float | None:
    """Largest less smallest share over depths or phases: 0 is flat; None with fewer than two places."""
    shares = [interval.value for interval in by_place.values()]
    return max(shares) - min(shares) if len(shares) > 1 else None


def area_over_log_length(by_length: Mapping[int, Interval]) -> float | None:
    """Mean share over log2 of the length (trapezoids, divided by the width); the share itself at a single length."""
    lengths = sorted(by_length)
    if len(lengths) < 2:
        return by_length[lengths[0]].value if lengths else None
    at = [math.log2(length) for length in lengths]
    values = [by_length[length].value for length in lengths]
    area = sum((at[i + 1] - at[i]) * (values[i] + values[i + 1]) / 2 for i in range(len(at) - 1))
    return area / (at[-1] - at[0])


def repeat_rate(answers: Sequence[Sequence[str]]) -> float | None:
    """REPEAT: of items asked several times with identical greedy calls, the share whose answer changes."""
    return share(sum(len(set(calls)) > 1 for calls in answers), len(answers))
