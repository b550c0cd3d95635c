"""S-CODE: functions from one sentence, executed in a sandbox against inputs that catch near misses."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Sequence

from rorqual.data.tasks.answers import final_answer
from rorqual.data.tasks.base import Grade, Item, wrong
from rorqual.data.tasks.code import CodeFamily, extract_code
from rorqual.evals.economy import PriceVector
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, say, spent
from rorqual.posttrain.rewards.code_execution import CodeRunner

_SIGNATURE = re.compile(r"\b([a-z_]+\([a-z_, ]*\))")


class CodeSuite(Suite):
    """PASS stands beside the share of faults (mutants of the right code) that the tests catch.

    The option `sandbox` names the kind that runs the code, or `none`: then the tree of the code is evaluated without
    running it, which decides less (X for what is outside its language).
    """

    name = "code"
    answer_words = None
    max_tokens = 320
    sizes = {"tiny": 12, "small": 200, "full": 2000}
    strata = ("kind", "function", "mode")

    def build_family(self) -> CodeFamily:
        self._runner: CodeRunner | None = None
        self._making = threading.Lock()  # answers are graded by many threads, in one sandbox
        return CodeFamily()

    @property
    def sandbox(self) -> str:
        return str(self.setting.options.get("sandbox", "function"))

    def grade(self, item: Item, text: str) -> Grade:
        if self.sandbox == "none":
            return self.family.grade(item, text)
        code = extract_code(final_answer(text, item.thinking_mode))
        if code is None:
            return wrong(None, "the answer is not exactly one block of code")
        with self._making:
            if self._runner is None:
                self._runner = CodeRunner(self.sandbox)
        return self._runner.grade(code, item.meta["name"], item.meta["tests"])

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def programs(self) -> dict[str, Program]:
        def written(item: Item, body: str) -> str:
            found = _SIGNATURE.search(str(item.messages[-1]["content"]))
            return say(item, f"```python\ndef {found[1] if found else 'f(x)'}:\n    return {body}\n```")

        def argument(item: Item) -> str:
            found = _SIGNATURE.search(str(item.messages[-1]["content"]))
            return (found[1].partition("(")[2].rstrip(")").split(",")[0] if found else "") or "None"

        def table(item: Item, rng: random.Random) -> str:
            return written(item, rng.choice(("0", "True", "[]", "''", argument(item))))

        return {
            "majority": lambda item, rng: written(item, "0"),
            "random": table,
            "recency": lambda item, rng: written(item, argument(item)),
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        scores = [float(r.item.meta["mutation_score"]) for r in rows]
        return {
            "PASS": Figure.of_share(r.passed for r in rows),
            "MUTATION": Figure(sum(scores) / len(scores) if scores else None),
            **spent(rows, price),
        }
