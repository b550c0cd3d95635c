"""Verifiable rewards: the deterministic graders of the task families, and a price for guessing.

An abstention earns 0 whether or not the question had an answer (recipe R4 of the evaluation specification, section
7.4): with +1 for a right answer and -penalty for a wrong one, answering pays exactly when the chance of being right is
above penalty / (1 + penalty). The penalty is fixed, or drawn for each prompt and announced in it (`announce_penalty`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rorqual.data.tasks.base import Grade, Item, TaskFamily
from rorqual.errors import ConfigError
from rorqual.posttrain.rewards.base import Answer, Score

Grader = Callable[[Item, str], Grade]

PENALTIES = (1.0, 3.0, 9.0)
"""What recipe R4 draws from."""


def grader_of(families: Mapping[str, TaskFamily]) -> Grader:
    """The grader of an item's own family. Raises (when called): ConfigError for an item of no family given."""

    def grade(item: Item, text: str) -> Grade:
        if item.family not in families:
            raise ConfigError(
                f"No grader knows the item {item.id!r} of {item.family!r}; there are graders for "
                f"{', '.join(sorted(families))}. Give the task a reward of its own, by a dotted path."
            )
        return families[item.family].grade(item, text)

    return grade


class Graded:
    """1 for what the grader passes, 0 for all else (so a right abstention on a question without answer earns 1)."""

    def __init__(self, grade: Grader) -> None:
        self._grade = grade

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [self._score(self._grade(a.item, a.text)) for a in answers]

    @staticmethod
    def _score(grade: Grade) -> Score:
        value = None if grade.grade == "X" else float(grade.passed)
        return Score(value, is_correct=grade.passed, is_abstention=grade.grade == "A", note=grade.reason)


class Abstention:
    """correct / abstain / wrong = +1 / 0 / -penalty. The item's own penalty, when one was announced, goes first."""

    def __init__(self, grade: Grader, *, penalty: float = 1.0) -> None:
        if penalty < 0:
            raise ConfigError(f"penalty is {penalty}, but a wrong answer must not earn points. Give 0 or more.")
        self._grade, self.penalty = grade, penalty

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [self._score(a, self._grade(a.item, a.text)) for a in answers]

    def _score(self, answer: Answer, grade: Grade) -> Score:
        if grade.grade == "X":
            return Score(None, note=grade.reason)
        if grade.grade == "A":
            return Score(0.0, is_correct=False, is_abstention=True, note=grade.reason)
        if grade.grade == "C":
            return Score(1.0, is_correct=True, is_abstention=False)
        penalty = float(answer.item.meta.get("penalty", self.penalty))
        return Score(-penalty, is_correct=False, is_abstention=False, note=grade.reason)


def announce(item: Item, text: str, **meta: Any) -> Item:  # Any: what a grader is to know
    """The item with a sentence added to its last user message, and with `meta` added."""
    messages = [dict(message) for message in item.messages]
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[last]["content"] = f"{messages[last]['content']}\n\n{text}"
    return replace(item, messages=messages, meta={**item.meta, **meta})


def announce_penalty(item: Item, penalty: float) -> Item:
    """The item with the price of a wrong answer in its prompt, as `Abstention` will charge it."""
    text = f'A right answer earns 1 point, "I don\'t know." earns 0, a wrong answer costs {penalty:g}.'
    return announce(item, text, penalty=penalty)
