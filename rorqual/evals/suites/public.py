"""The suites facts and mrcr over a public set that the user has (`--set FILE`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rorqual.data.tasks.answers import final_answer
from rorqual.data.tasks.base import Grade, Item, Split, TaskFamily
from rorqual.evals import metrics as m
from rorqual.evals.economy import PriceVector
from rorqual.evals.public import MOST_WORDS, PublicMrcr, PublicQuestions
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, counts, question_of, say, spent
from rorqual.evals.suites.facts import FactsSuite
from rorqual.evals.suites.mrcr import MrcrSuite
from rorqual.evals.targets.base import Answer


class _FromFile(Suite):
    def items(self, split: Split, seed: int, count: int | None = None) -> list[Item]:
        """All rows of the file, unless a count says less."""
        return list(self.family.items(split, seed))[:count]


class PublicFactsSuite(_FromFile, FactsSuite):
    """OI, HR and the rest by the same formulas; answers are judged by strings, the rest by a grader if any.

    Baselines are judged by strings alone.
    """

    takes_grader = True
    max_tokens = 1024
    answer_words = MOST_WORDS
    strata = ("domain",)

    def build_family(self) -> TaskFamily:  # type: ignore[override]
        return PublicQuestions(Path(str(self.setting.options["set"])))

    def spec(self) -> dict[str, Any]:
        return super().spec() | ({} if self.grader is None else {"judge": f"strings, then {self.grader.name}"})

    def settle(self, item: Item, answer: Answer) -> Grade:
        grade = super().settle(item, answer)
        if self.grader is None or grade.grade != "I":
            return grade
        said = final_answer(answer.text, item.thinking_mode)
        return self.grader.grade(str(item.messages[-1]["content"]), str(item.meta["value"]), said)

    def programs(self) -> dict[str, Program]:
        return {
            "echo": lambda item, rng: say(item, question_of(item)),
            "yes": lambda item, rng: say(item, "yes"),
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        c = counts(rows)
        out: Figures = {
            "ACC": Figure.of_share(r.grade == "C" for r in rows),
            "OI": Figure(m.omniscience_index(c)),
            "HR": Figure(m.hallucination_rate(c)),
            "CGA": Figure(m.correct_given_attempted(c)),
            "F1": Figure(m.f1_of_attempts(c)),
        }
        if forced is not None:
            by_id = {r.item.id: r.grade for r in forced}
            both = [(by_id[r.item.id], r.grade) for r in rows if r.item.id in by_id]
            before, after = [f for f, _ in both], [g for _, g in both]
            out |= {"RET": Figure(m.retention(before, after)), "RESCUE": Figure(m.rescue(before, after))}
        out |= self.confidence(forced if forced is not None else [r for r in rows if r.grade != "A"])
        return out | spent(rows, price)

    def cells(self, rows: Sequence[Row]) -> dict[str, dict[str, dict[str, object]]]:
        return Suite.cells(self, rows)


class PublicMrcrSuite(_FromFile, MrcrSuite):
    """PREFIX and BODY by number of needles and length (characters / 4, next power of two)."""

    max_tokens = 4096
    strata = ("needles", "length")

    def build_family(self) -> TaskFamily:  # type: ignore[override]
        return PublicMrcr(Path(str(self.setting.options["set"])))

    def programs(self) -> dict[str, Program]:
        def last(item: Item) -> str:
            replies = [str(message["content"]) for message in item.messages if message["role"] == "assistant"]
            return item.meta["prefix"] + (replies[-1] if replies else "")

        def by_chance(item: Item) -> list[str]:
            return [str(message["content"]) for message in item.messages if message["role"] == "assistant"] or [""]

        return {
            "recency": lambda item, rng: say(item, last(item)),
            "random": lambda item, rng: say(item, item.meta["prefix"] + rng.choice(by_chance(item))),
            "always-abstain": abstain,
        }
