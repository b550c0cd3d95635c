"""Code reward: the written function runs in a sandbox against the item's tests.

What a policy writes is code nobody has read, and a policy that is paid for passing tests will find what passes them:
each call runs in a fresh process of a `rorqual.Sandbox`, and values are compared outside of it (`code_execution.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from rorqual.data.tasks.answers import final_answer
from rorqual.data.tasks.code import extract_code
from rorqual.posttrain.rewards.base import Answer, Score
from rorqual.posttrain.rewards.code_execution import CodeRunner


class Code:
    """1 when every test of `item.meta["tests"]` holds for the function `item.meta["name"]`, 0 otherwise.

    `item.meta["tests"]` are [arguments, expected value] pairs. sandbox: the kind, made at first use. An answer the
    sandbox failed on is undecided.
    """

    def __init__(self, *, sandbox: str = "function") -> None:
        self._kind = sandbox
        self._runner: CodeRunner | None = None
        self._making = threading.Lock()

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> Score:
        source = extract_code(final_answer(answer.text, answer.item.thinking_mode))
        if source is None:
            return Score(0.0, False, False, "the answer is not exactly one block of code")
        with self._making:
            if self._runner is None:
                self._runner = CodeRunner(self._kind)
        grade = self._runner.grade(source, answer.item.meta["name"], answer.item.meta["tests"])
        if grade.grade == "X":
            return Score(None, note=grade.reason)
        return Score(float(grade.passed), grade.passed, False, grade.reason)

    def close(self) -> None:
        """End the sandbox."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
