"""Prices on length: one for each effort mode, and one for being longer than the group needs to be.

* `LengthPrice`, r = -min(most, k * length / window): the three modes of V4 are specialists with their own price and
  window (V4 report; the form is V4.1's, the direction of the prices and three fixed k are inferred, Think Max near 0).
* `Brevity`: right answers longer than the group's median right one lose up to `most`; wrong ones have no length term,
  so nothing is ever gained by being wrong in few words. The same share solved in fewer tokens.
* `BudgetAdherence`: a budget of about B tokens stands in the prompt; r = -alpha * |B - length| / B (LCPO).

Source: training specification, section 12.2, and evaluation specification, section 9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from rorqual.data.tasks.base import Item
from rorqual.errors import ConfigError
from rorqual.posttrain.rewards.base import Answer, Reward, Score
from rorqual.posttrain.rewards.graded import announce

PRICES = {"off": 0.3, "high": 0.1, "max": 0.0}
"""k of each effort mode. Source: training specification, section 17.5."""


class LengthPrice:
    """-min(most, k * length / window), with the k of the answer's mode; its window comes with the answer."""

    def __init__(self, *, k: Mapping[str, float] = PRICES, most: float = 1.0) -> None:
        self._k, self._most = dict(k), most

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [Score(-min(self._most, self._price(a.mode) * a.num_tokens / a.window)) for a in answers]

    def _price(self, mode: str) -> float:
        if mode not in self._k:
            raise ConfigError(
                f"The length reward has no price for the mode {mode!r}, only for {', '.join(self._k)}. Add it to k."
            )
        return self._k[mode]


class Brevity:
    """-most * clip((length - L) / L, 0, 1) for right answers, L the median length of the group's right ones; else 0.

    solved: the reward that says which answers are right.
    """

    def __init__(self, solved: Reward, *, most: float = 0.5) -> None:
        self._solved, self._most = solved, most

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        is_right = [bool(score.is_correct) for score in self._solved(answers)]
        lengths = [a.num_tokens for a, right in zip(answers, is_right, strict=True) if right]
        if not lengths:
            return [Score(0.0)] * len(answers)
        usual = max(median(lengths), 1)
        return [
            Score(-self._most * min(max((a.num_tokens - usual) / usual, 0.0), 1.0) if right else 0.0)
            for a, right in zip(answers, is_right, strict=True)
        ]


class BudgetAdherence:
    """-alpha * |B - length| / B for answers to a prompt with an announced budget, at most alpha; 0 without one."""

    def __init__(self, *, alpha: float = 0.5) -> None:
        self._alpha = alpha

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [Score(self._value(a.item.meta.get("budget"), a.num_tokens)) for a in answers]

    def _value(self, budget: int | None, length: int) -> float:
        return -self._alpha * min(abs(budget - length) / budget, 1.0) if budget else 0.0


def announce_budget(item: Item, budget: int) -> Item:
    """The item with a budget of about so many tokens in its prompt."""
    return announce(item, f"Use about {budget} tokens.", budget=budget)
