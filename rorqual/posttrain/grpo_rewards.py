"""The rewards of a run's tasks, made once and asked group by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rorqual.data.tasks.base import TaskFamily
from rorqual.posttrain.grpo_config import GRPOConfig
from rorqual.posttrain.grpo_tasks import Question
from rorqual.posttrain.rewards.base import Answer, Reward, Score, total
from rorqual.posttrain.rewards.judge import Agreement, JudgeModel
from rorqual.posttrain.rewards.registry import RewardSetting, build_reward


class Graders:
    """Scores answers by the task of their question. Raises: ConfigError for a reward that cannot be made."""

    def __init__(self, config: GRPOConfig, known: Mapping[str, TaskFamily], actor: JudgeModel) -> None:
        setting = RewardSetting(known, actor)
        self._terms: list[list[tuple[float, Reward]]] = [
            [(term.weight, build_reward(term.name, term.options, setting)) for term in task.rewards]
            for task in config.tasks
        ]
        self._terms.append([(1.0, Agreement())])  # at -1, where judgements are

    def score(self, question: Question, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer of one group."""
        return total(self._terms[question.task], answers)

    def close(self) -> None:
        """End what rewards hold: sandboxes, connections."""
        for terms in self._terms:
            for _, reward in terms:
                close = getattr(reward, "close", None)
                if close is not None:
                    close()
