"""Answers drawn ahead of a GRPO run's trainer: phases to come are drawn while one is trained on.

Phases are trained on in the order of their prompts, and one is begun only when it can still be trained on within the
bound, so nothing has to be dropped (`rollouts_stream`). Every token keeps the log probability and the version of the
policy that drew it, which the importance ratio is taken to. Source: training specification, sections 13.1 and 13.4.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from rorqual.engine import SamplingParams
from rorqual.posttrain.grpo_config import GRPOConfig
from rorqual.posttrain.grpo_tasks import Question
from rorqual.posttrain.rollouts import Prompt, Rollout, RolloutWorker
from rorqual.posttrain.rollouts_stream import RolloutStream


class Ahead:
    """The rollouts of phase `first` and those behind it.

    questions: of a phase, called when it is begun. prompt: a question of a phase at a place, as the engine gets it,
    with the question as its data.
    """

    def __init__(
        self,
        worker: RolloutWorker,
        config: GRPOConfig,
        first: int,
        questions: Callable[[int], list[Question]],
        prompt: Callable[[int, int, Question], Prompt],
        sampling: Callable[[int], SamplingParams],
    ) -> None:
        assert config.max_staleness is not None
        self._questions, self._prompt = questions, prompt
        self._asked: dict[str, Question] = {}
        self._began, self._waited, self._idle, self._dropped = time.monotonic(), 0.0, 0.0, 0
        self._staleness: Counter[int] = Counter()
        self.stream = RolloutStream(
            worker, self._prompts(first, config.steps), config.group_size, lambda one: sampling(one.data.window),
            batch_groups=config.prompts_per_step, max_staleness=config.max_staleness,
        )  # fmt: skip

    def _prompts(self, first: int, end: int) -> Iterator[Prompt]:
        for phase in range(first, end):
            for place, question in enumerate(self._questions(phase)):
                prompt = self._prompt(phase, place, question)
                self._asked[prompt.id] = question
                yield prompt

    def phase(self, should_stop: Callable[[], bool]) -> list[tuple[Question, list[Rollout]]] | None:
        """The groups of the next phase in their order; None when asked to stop. Raises: what any rollout did."""
        groups = self.stream.batch(should_stop)
        return [(self._asked.pop(group[0].prompt_id), group) for group in groups] or None

    def check(self) -> None:
        """Raises: the first failure of a rollout, if there was one."""
        self.stream.check()

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Give the engine the weights after a phase; what runs goes on with them at its next token."""
        self.stream.publish(weights, version)

    def figures(self) -> dict[str, Any]:
        """Of the time since the last call.

        staleness: tokens trained on by their age in phases; trainer_idle_share: of the seconds, those in which the
        trainer waited for answers; engine_idle_share: those in which no group was under way; dropped: groups too old.
        """
        now, stream = time.monotonic(), self.stream
        ages = stream.staleness - self._staleness
        seconds = max(now - self._began, 1e-9)
        tokens = sum(ages.values())
        found = {
            "staleness": {str(age): ages[age] for age in sorted(ages)},
            "staleness_mean": sum(age * count for age, count in ages.items()) / tokens if tokens else float("nan"),
            "dropped": stream.dropped - self._dropped,
            "trainer_idle_share": (stream.waited_s - self._waited) / seconds,
            "engine_idle_share": min(1.0, (stream.engine_idle_s - self._idle) / seconds),
        }
        self._began, self._waited, self._idle, self._dropped = (
            now,
            stream.waited_s,
            stream.engine_idle_s,
            stream.dropped,
        )
        self._staleness = stream.staleness.copy()
        return found

    def close(self) -> None:
        """End what runs; what was drawn of it is in the log."""
        self.stream.close()
