"""Evaluations within a run: held-out items answered greedily, and how much of what was known is still known.

Abstention training is told to stop when it destroys knowledge, which shows on entities that no training touched only.
Source: evaluation specification, sections 4.1 (rule 1) and 7.4.
"""

from __future__ import annotations

from typing import Any

from rorqual.engine import Engine, SamplingParams
from rorqual.posttrain.grpo_config import GRPOConfig
from rorqual.posttrain.grpo_rewards import Graders
from rorqual.posttrain.grpo_tasks import Question, TaskStream
from rorqual.posttrain.rewards.base import Answer, Score

RETAINED = ("K-clean", "K-graded")
"""Classes of facts that no tuning asks about."""


class Evaluation:
    """`run` answers and grades; `last` holds its latest figures."""

    def __init__(self, config: GRPOConfig, engine: Engine, stream: TaskStream, graders: Graders) -> None:
        self._config, self._engine, self._stream, self._graders = config, engine, stream, graders
        self._known: list[str] | None = None
        self.last: dict[str, Any] = {}

    def run(self, phase: int) -> dict[str, Any]:
        """Figures over all tasks, and of each task by its number and source where there are several."""
        figures: dict[str, Any] = {}
        right: dict[str, bool] = {}
        everything: list[tuple[Question, Answer, Score]] = []
        for task, section in enumerate(self._config.tasks):
            questions = self._stream.held_out(task, self._config.eval_items)
            graded = self._graded(questions)
            everything += graded
            right |= {q.item.id: bool(s.is_correct) for q, _, s in graded if q.item.stratum.get("class") in RETAINED}
            if len(self._config.tasks) > 1:
                figures[f"task{task}_{section.source}"] = _means(graded)
        figures = {**_means(everything), "retention": self._retention(right), **figures}
        self.last = figures
        return figures

    def _graded(self, questions: list[Question]) -> list[tuple[Question, Answer, Score]]:
        tokenizer: Any = self._engine.tokenizer  # the protocol asks for less than ours has
        prompts = [tokenizer.encode(question.text) for question in questions]
        params = [SamplingParams(temperature=0.0, max_tokens=question.window) for question in questions]
        out = []
        for question, done in zip(questions, self._engine.generate(prompts, params), strict=True):
            answer = Answer(
                question.item, tokenizer.decode(done.ids), len(done.ids), str(done.finish_reason), question.mode,
                question.window, ids=tuple(done.ids),
            )  # fmt: skip
            out.append((question, answer, self._graders.score(question, [answer])[0]))
        return out

    def _retention(self, right: dict[str, bool]) -> float | None:
        """Of what was answered right at the start, the share that still is; None where nothing was."""
        if self._known is None:
            self._known = [name for name, is_right in right.items() if is_right]
        kept = [right[name] for name in self._known if name in right]
        return sum(kept) / len(kept) if kept else None

    @property
    def is_retention_lost(self) -> bool:
        """Whether the latest evaluation lies too far below the start."""
        limit, retention = self._config.stop_at_retention_drop, self.last.get("retention")
        return bool(limit) and retention is not None and 1.0 - retention > limit

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: JSON."""
        return {"known": self._known, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._known, self.last = state["known"], state["last"]


def _means(graded: list[tuple[Question, Answer, Score]]) -> dict[str, float | None]:
    scores = [score for _, _, score in graded]
    values = [score.value for score in scores if score.value is not None]
    count = max(len(graded), 1)
    tokens = sum(answer.num_tokens for _, answer, _ in graded)
    solved = sum(bool(score.is_correct) for score in scores)
    return {
        "reward": sum(values) / len(values) if values else None,
        "accuracy": solved / count,
        "abstention_share": sum(bool(score.is_abstention) for score in scores) / count,
        "tokens": tokens / count,
        "tokens_per_solved": tokens / solved if solved else None,
    }
