"""Stated confidence with a proper score: recipe R6 of the evaluation specification, section 7.4.

The answer ends in a line `Confidence: 80%`. With y = 1 for a right answer and p the stated chance, the reward
2 p y - p^2 is highest in the mean when p is the true chance, and 0 for p = 0, which is what an abstention states.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rorqual.chat.markers import EOS
from rorqual.data.tasks.base import Item
from rorqual.posttrain.rewards.base import Answer, Score
from rorqual.posttrain.rewards.graded import Grader, announce

ASK = 'End with a line "Confidence: N%" that says how likely your answer is right.'
_STATED = re.compile(r"\n?^\s*Confidence:\s*(\d{1,3}(?:\.\d+)?)\s*%\s*$", re.MULTILINE)


def announce_confidence(item: Item) -> Item:
    """The item with the request to state a confidence."""
    return announce(item, ASK)


def split_confidence(text: str) -> tuple[str, float | None]:
    """An answer without its confidence line, and the chance in it from 0 to 1.

    None unless the line stands exactly once, last, and holds 0 to 100.

    >>> split_confidence("Velmar.\\nConfidence: 80%")
    ('Velmar.', 0.8)
    """
    text = text.replace(EOS, "").rstrip()
    found = list(_STATED.finditer(text))
    if len(found) != 1 or found[0].end() != len(text) or float(found[0][1]) > 100:
        return text, None
    return text[: found[0].start()].rstrip(), float(found[0][1]) / 100


class Brier:
    """2 p y - p^2; -1, as for certainty in something wrong, without a readable confidence."""

    def __init__(self, grade: Grader) -> None:
        self._grade = grade

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> Score:
        text, p = split_confidence(answer.text)
        grade = self._grade(answer.item, text)
        if grade.grade == "X":
            return Score(None, note=grade.reason)
        is_abstention, is_correct = grade.grade == "A", grade.grade == "C"
        if p is None:
            return Score(-1.0, is_correct, is_abstention, "states no confidence")
        if is_abstention:
            p = 0.0  # what it says about an answer that it does not give means nothing
        return Score(2 * p * is_correct - p * p, is_correct, is_abstention, grade.reason, {"confidence": p})
