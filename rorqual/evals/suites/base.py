"""What a suite is: graded items, trivial programs to compare with, and the figures of a set of answers.

The same code makes the figures of a model and of a baseline, so both stand in one table.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from rorqual.data.tasks import World
from rorqual.data.tasks.answers import IDK, MAX_ANSWER_WORDS, abstention_start, final_answer
from rorqual.data.tasks.base import Grade, Item, Size, Split, TaskFamily, completion
from rorqual.evals import economy, metrics
from rorqual.evals.context_metrics import cells
from rorqual.evals.records import Record, Sampling, Usage
from rorqual.evals.statistics import Interval, miss_bound, wilson
from rorqual.evals.targets.base import Answer, Prompt, Target
from rorqual.seeds import derive

if TYPE_CHECKING:
    from rorqual.evals.model_grader import ModelGrader

Program = Callable[[Item, random.Random], str]
"""A baseline: from an item to a raw completion, without a model."""


@dataclass(frozen=True)
class Row:
    """An answered item: from a record, or from a baseline (which uses no tokens)."""

    item: Item
    text: str
    grade: str
    score: float
    usage: Usage = Usage()
    confidence: float | None = None
    signals: Mapping[str, float] = field(default_factory=dict)
    finish: str = "stop"

    @property
    def passed(self) -> bool:
        return self.score >= 1

    @property
    def answer(self) -> str:
        return final_answer(self.text, self.item.thinking_mode)

    @staticmethod
    def of(item: Item, record: Record) -> Row:
        return Row(
            item, record.output_text, record.grade, record.score, record.usage, record.confidence,
            record.signals or {}, record.finish_reason,
        )  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval where it has one; None where it is not defined."""

    value: float | None
    interval: Interval | None = None

    @staticmethod
    def of_share(rows: Iterable[bool]) -> Figure:
        """Share of true ones, with Wilson's interval."""
        flags = list(rows)
        interval = wilson(sum(flags), len(flags))
        return Figure(None if interval is None else interval.value, interval)


Figures = dict[str, Figure]


@dataclass(frozen=True)
class Setting:
    """What items depend on besides the seed. count_tokens: of the target's tokenizer, where it is known here."""

    world: World
    size: Size = "small"
    count_tokens: Callable[[str], int] | None = None
    lengths: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Suite(ABC):
    """One suite over one setting.

    answer_words: an answer of more words fails whatever follows, so a longer one that was cut off is decided; None
    where no length decides. wants_forced: figures need a run with abstentions masked.
    """

    name: str
    answer_words: int | None = MAX_ANSWER_WORDS
    wants_forced = False
    max_tokens = 256
    sizes: Mapping[Size, int] = {"tiny": 24, "small": 240, "full": 2400}
    strata: tuple[str, ...] = ()
    grader: ModelGrader | None = None
    """Grades what `takes_grader` suites cannot decide by strings."""
    takes_grader = False
    confidence_ids: tuple[str, ...] = ()
    """Metrics of the forced run's confidence, which say nothing about a baseline."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.family = self.build_family()

    @abstractmethod
    def build_family(self) -> TaskFamily:
        """The family that makes and grades the items."""

    @abstractmethod
    def programs(self) -> dict[str, Program]:
        """Trivial baselines by name."""

    @property
    def version(self) -> str:
        return self.family.version

    def spec(self) -> dict[str, Any]:
        """What, with a seed and a split, defines the items."""
        return {"suite": self.name, "size": self.setting.size, **self.family.spec()}

    def items(self, split: Split, seed: int, count: int | None = None) -> list[Item]:
        """The first `count` items, or as many as the size says."""
        return list(islice(self.family.items(split, seed), self.sizes[self.setting.size] if count is None else count))

    def grade(self, item: Item, text: str) -> Grade:
        return self.family.grade(item, text)

    def ask(
        self, item: Item, prompt: Prompt, target: Target, sampling: Sampling, *, is_forced: bool
    ) -> tuple[Answer, Grade]:
        """The target's answer and its grade. Raises: TransportError."""
        if is_forced:
            find = partial(abstention_start, mode=item.thinking_mode, reasoning=self.family.abstains_in_reasoning)
            answer = target.force(prompt, sampling, find)
        else:
            answer = target.answer(prompt, sampling)
        return answer, self.settle(item, answer)

    def settle(self, item: Item, answer: Answer) -> Grade:
        """Grade an answer; what our own limit cut off is undecided, unless no continuation could make it right."""
        if answer.finish_reason not in ("stop", "tool_calls"):
            words = len(final_answer(answer.text, item.thinking_mode).split())
            if self.answer_words is None or words <= self.answer_words:
                return Grade("X", 0.0, None, f"cut off: {answer.finish_reason}")
        return self.grade(item, answer.text)

    def run_program(self, name: str, items: Sequence[Item], seed: int) -> list[Row]:
        """Answer all items with a baseline."""
        program, rows = self.programs()[name], []
        for item in items:
            text = program(item, random.Random(derive(seed, "baseline", name, item.id)))
            grade = self.grade(item, text)
            rows.append(Row(item, text, grade.grade, grade.score))
        return rows

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: economy.PriceVector) -> Figures:
        """The headline by metric ids. `rows` hold no undecided item."""
        return {"ACC": Figure.of_share(row.passed for row in rows), **spent(rows, price)}

    def mapped(self, rows: Sequence[Row]) -> list[Row]:
        """The rows whose share right a map over length and depth may mix."""
        return list(rows)

    def cells(self, rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
        """Share of full scores with its interval for each value of each stratum."""
        keys = self.strata or tuple(rows[0].item.stratum if rows else ())
        return {
            key: {
                str(value): interval_dict(interval, sum(r.item.stratum.get(key) == value for r in rows))
                for value, interval in sorted(
                    cells((r.item.stratum.get(key), r.passed) for r in rows).items(), key=lambda pair: _order(pair[0])
                )
            }
            for key in keys
        }


def interval_dict(interval: Interval, n: int) -> dict[str, Any]:
    """A cell for JSON. A share of 1 tells the upper bound on its misses, 3/n."""
    out = {"n": n, "value": interval.value, "low": interval.low, "high": interval.high}
    return out | ({"miss_bound": miss_bound(n)} if interval.value == 1 else {})


def spent(rows: Sequence[Row], price: economy.PriceVector) -> Figures:
    """Tokens and money: TPS and WASTE; CPS with prices, VER with a referee."""
    figures = {"TPS": Figure(economy.tokens_per_solved(rows)), "WASTE": Figure(economy.waste(rows))}
    if price != economy.PriceVector():
        figures["CPS"] = Figure(economy.cost_per_solved(rows, price))
    if any(row.usage.referee_completion for row in rows):
        figures["VER"] = Figure(economy.verification_ratio(rows))
    return figures


def counts(rows: Iterable[Row]) -> metrics.Counts:
    return metrics.Counts.of(row.grade for row in rows)


def say(item: Item, answer: str) -> str:
    """A raw completion that answers without any reasoning."""
    return completion(item.thinking_mode, "", answer)


def abstain(item: Item, rng: random.Random) -> str:
    """The baseline that declines everything."""
    return say(item, IDK)


def question_of(item: Item) -> str:
    """The last line of what the user asks."""
    return str(item.messages[-1]["content"]).rsplit("\n", 1)[-1]


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))
