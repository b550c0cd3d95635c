"""Micro-batches of a GRPO step: rows of about one length, whose heavy fields are tensors one micro-batch at a time.

Source: training specification, sections 13.2 and 13.4.
"""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Places of rollouts, shortest first, in batches of at most `most_tokens` with their padding (one row at least).

    >>> micro_batches([5, 3, 4, 9], 10)
    [[1, 2], [0], [3]]
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if groups and (len(groups[-1]) + 1) * lengths[place] <= most_tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
