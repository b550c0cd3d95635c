"""Generative reward model: a model writes an analysis by a rubric and scores; the mean of its scores is the reward.

V4 has no scalar reward model. The evaluator is generative, and it is the actor itself: what it writes as a judge earns
its own reward, agreement with labels that are known (`Agreement`), in the same batch as everything else. The prompt and
the scale are ours. Source: training specification, section 12.3.

Within a step the judge is one frozen copy: the actor judges through the engine, whose weights change between steps only
(`grpo_run.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rorqual.chat.markers import BOS, EOS, THINK_END
from rorqual.data.tasks.answers import final_answer
from rorqual.data.tasks.base import Item, Message, Mode
from rorqual.errors import ConfigError
from rorqual.posttrain.rewards.base import Answer, Score
from rorqual.seeds import derive

TOP = 10
FAMILY = "judging"
_SCORE = re.compile(r"^\s*Score (\d+):\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Rubric:
    """What an answer is judged by: (criterion, weight) pairs. Raises: ConfigError without any, or weights below 0."""

    criteria: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if not self.criteria or any(weight < 0 for _, weight in self.criteria) or not self._weight:
            raise ConfigError(
                f"A rubric of {len(self.criteria)} criteria with the weights {[w for _, w in self.criteria]} judges "
                "nothing. Give at least one criterion with a weight above 0, and none below."
            )

    @property
    def _weight(self) -> float:
        return sum(weight for _, weight in self.criteria)

    def mean(self, scores: Sequence[float]) -> float:
        """Weighted mean of one score from 0 to 10 a criterion, as a reward from 0 to 1."""
        return sum(s * w for s, (_, w) in zip(scores, self.criteria, strict=True)) / self._weight / TOP


def judging_messages(task: str, rubric: Rubric, candidate: str) -> list[Message]:
    """The judge's prompt. Names of control tokens in the candidate are taken out, so it cannot end its own turn."""
    for marker in (BOS, EOS, THINK_END):
        candidate = candidate.replace(marker, "")
    criteria = "\n".join(f"{i}. {text}" for i, (text, _) in enumerate(rubric.criteria, 1))
    lines = "\n".join(f"Score {i}: N" for i in range(1, len(rubric.criteria) + 1))
    text = (
        f"Judge an answer to a task.\n\nTask:\n{task}\n\nAnswer:\n{candidate}\n\nCriteria:\n{criteria}\n\n"
        f"Write a short analysis, then one line for each criterion, with N from 0 to {TOP}:\n{lines}"
    )
    return [{"role": "user", "content": text}]


def parse_scores(text: str, rubric: Rubric) -> list[float] | None:
    """One score a criterion out of what a judge said after its reasoning.

    None unless each criterion has exactly one score from 0 to 10.

    >>> parse_scores("Right, but long.\\nScore 1: 9", Rubric((("Is it right?", 1.0),)))
    [9.0]
    """
    found = [(int(number), float(score)) for number, score in _SCORE.findall(text)]
    if sorted(number for number, _ in found) != list(range(1, len(rubric.criteria) + 1)):
        return None
    if any(score > TOP for _, score in found):
        return None
    return [score for _, score in sorted(found)]


class JudgeModel(Protocol):
    """Whatever answers prompts: the actor's engine, or a server (`judge_models.py`)."""

    def answer(self, prompts: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[str]:
        """What a user would see of the answer to each prompt. Raises: RequestError when the model fails."""
        ...


class Judge:
    """Reward from 0 to 1: the mean of `samples` judgements by a rubric; undecided when none of them can be read."""

    def __init__(self, model: JudgeModel, rubric: Rubric, *, samples: int = 1) -> None:
        self._model, self._rubric, self._samples = model, rubric, samples

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        prompts, seeds = [], []
        for answer in answers:
            candidate = final_answer(answer.text, answer.item.thinking_mode)
            messages = judging_messages(task_text(answer.item), self._rubric, candidate)
            for sample in range(self._samples):
                prompts.append(messages)
                seeds.append(derive(answer.seed, "judge", sample))
        said = self._model.answer(prompts, seeds)
        return [self._score(said[i * self._samples : (i + 1) * self._samples]) for i in range(len(answers))]

    def _score(self, texts: Sequence[str]) -> Score:
        read = [scores for text in texts if (scores := parse_scores(text, self._rubric)) is not None]
        if not read:
            return Score(None, note="the judge gave no readable scores")
        return Score(sum(self._rubric.mean(scores) for scores in read) / len(read))


class Agreement:
    """The judge's own reward: 1 - |score - label|, and 0 for a judgement that cannot be read.

    The label stands in `item.meta["label"]` (from 0 to 1) beside the rubric, see `judging_item`.
    """

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [self._score(answer) for answer in answers]

    @staticmethod
    def _score(answer: Answer) -> Score:
        rubric = Rubric(tuple((text, float(weight)) for text, weight in answer.item.meta["rubric"]))
        scores = parse_scores(final_answer(answer.text, answer.item.thinking_mode), rubric)
        if scores is None:
            return Score(0.0, False, False, "no readable scores")
        distance = abs(rubric.mean(scores) - float(answer.item.meta["label"]))
        return Score(1.0 - distance, distance < 0.5, False)


def judging_item(number: str, task: str, candidate: str, rubric: Rubric, label: float, mode: Mode) -> Item:
    """A prompt that asks the actor to judge `candidate`, whose true worth `label` (0 to 1) is known."""
    return Item(
        family=FAMILY,
        id=f"{FAMILY}-{number}",
        messages=judging_messages(task, rubric, candidate),
        tools=None,
        thinking_mode=mode,
        gold="",
        stratum={},
        meta={"label": label, "rubric": [list(pair) for pair in rubric.criteria]},
        split="train",
    )


def task_text(item: Item) -> str:
    """The conversation an answer was given to, for a judge to read."""
    if item.prompt is not None:
        return item.prompt
    return "\n\n".join(str(m["content"]) for m in item.messages if m["role"] in ("system", "user") and m.get("content"))
