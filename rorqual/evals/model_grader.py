"""A model that grades short answers which strings could not: right, partly right, wrong, not attempted.

It sees the question, the gold answer and the answer, not the reasoning and not whose they are. What it says that is no
grade leaves the item undecided (X); it never becomes a grade.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal

from rorqual.data.tasks.base import Grade
from rorqual.errors import RequestError
from rorqual.referee.judge_url import JudgeServer

_WORDS: Final = {"correct": "C", "partial": "P", "incorrect": "I", "declined": "A"}
_SAID = re.compile(r"\b(correct|partial|incorrect|declined)\b", re.IGNORECASE)
_PROMPT = """Grade an answer against the gold answer. The gold answer is right whatever you know.

Question: {question}
Gold answer: {gold}
Answer: {answer}

correct: it says what the gold answer says, whole, and nothing that contradicts it.
partial: a part of the gold answer is missing, and nothing contradicts it.
incorrect: anything in it contradicts the gold answer, even when it hedges.
declined: it does not answer.
Reply with one of these four words and nothing else."""
_MOST = 4000


class ModelGrader:
    """The grader behind a server."""

    def __init__(self, server: JudgeServer) -> None:
        self.server = server

    @property
    def name(self) -> str:
        return f"{self.server.model} of {self.server.url}"

    def grade(self, question: str, gold: str, answer: str) -> Grade:
        """The grade; X where the grader fails or says none."""
        text = _PROMPT.format(question=question[:_MOST], gold=gold[:_MOST], answer=answer[:_MOST])
        body: dict[str, Any] = {
            "model": self.server.model, "messages": [{"role": "user", "content": text}], "temperature": 0, "seed": 1,
            **self.server.fields,
        }  # fmt: skip
        try:
            said = self.server.send(body).content or ""
        except RequestError as error:
            return Grade("X", 0.0, answer[:200], f"grader: {error.message}")
        words = {word.lower() for word in _SAID.findall(said)}
        if len(words) != 1:
            return Grade("X", 0.0, answer[:200], f"grader: it said {said[:80]!r}, which is no one grade")
        letter: Literal["C", "P", "I", "A"] = _WORDS[words.pop()]  # type: ignore[assignment]  # of that table
        return Grade(letter, {"C": 1.0, "P": 0.5}.get(letter, 0.0), answer[:200], f"graded by {self.name}")

    def close(self) -> None:
        self.server.close()
