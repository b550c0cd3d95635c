"""What every reward shares: the answers of one prompt in, one score each out.

A reward is any callable that takes the answers to one prompt and returns as many scores; it sees the whole group,
since some rewards compare (`length.py`). A plain function of the user's own may return numbers instead of scores, see
`registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.data.tasks.base import Item


@dataclass(frozen=True)
class Answer:
    """One response as a reward sees it.

    item: what was asked; `item.meta` holds what a grader needs, a dataset row's columns among it.
    text: everything the policy wrote, reasoning and control tokens included. num_tokens: as many tokens it chose.
    finish: `stop`, or `length` when the window cut it. mode: the effort mode it was asked in; window: the most tokens
    that mode has. seed: for rewards that draw (a judge). ids: the text's tokens.
    """

    item: Item
    text: str
    num_tokens: int
    finish: str = "stop"
    mode: str = "off"
    window: int = 1
    seed: int = 0
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Score:
    """What an answer is worth. value: None when nobody could decide (a sandbox that failed, a judge that gave no
    score); such an answer trains nothing. is_correct, is_abstention: where the reward knows.
    """

    value: float | None
    is_correct: bool | None = None
    is_abstention: bool | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)


Reward = Callable[[Sequence[Answer]], Sequence[Score]]


def total(rewards: Sequence[tuple[float, Reward]], answers: Sequence[Answer]) -> list[Score]:
    """Weighted sums of several rewards over one group.

    Undecided in one is undecided in all. Whether an answer is right or abstains is said by the first reward that
    knows. `more` holds each part's own value by its place.
    """
    parts = [(weight, list(reward(answers))) for weight, reward in rewards]
    return [_sum([(weight, scores[i]) for weight, scores in parts]) for i in range(len(answers))]


def _sum(parts: Sequence[tuple[float, Score]]) -> Score:
    values = [(weight, score.value) for weight, score in parts]
    is_decided = all(value is not None for _, value in values)
    correct = next((score.is_correct for _, score in parts if score.is_correct is not None), None)
    abstained = next((score.is_abstention for _, score in parts if score.is_abstention is not None), None)
    return Score(
        value=sum(weight * value for weight, value in values if value is not None) if is_decided else None,
        is_correct=correct,
        is_abstention=abstained,
        note="; ".join(score.note for _, score in parts if score.note),
        more={str(i): value for i, (_, value) in enumerate(values)},
    )
