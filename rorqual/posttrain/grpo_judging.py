"""The actor as its own judge-in-training: answers of the last phase whose worth is known come back to be judged.

Judgements are prompts like others, in the same batch; what they earn is their agreement with the verified label
(`rewards/judge.py`). Source: training specification, section 12.3.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from rorqual.data.tasks.answers import final_answer
from rorqual.posttrain.grpo_config import JudgingSection, ModeSection
from rorqual.posttrain.grpo_tasks import Question, thinking_mode
from rorqual.posttrain.rewards.base import Answer, Score
from rorqual.posttrain.rewards.judge import Rubric, judging_item, task_text
from rorqual.seeds import derive

JUDGEMENT = -1
"""In place of a task's number."""


class Judging:
    """Keeps candidates of the last phase and asks about as many as the share wants, right and wrong ones alike."""

    def __init__(self, config: JudgingSection, modes: dict[str, ModeSection], seed: int) -> None:
        self._share, self._seed = config.share, seed
        self._rubric = Rubric(tuple(config.rubric))
        self._mode = next(iter(modes))
        self._window = modes[self._mode].window
        self._pool: list[dict[str, Any]] = []

    def questions(self, phase: int, prompts_per_step: int) -> list[Question]:
        """This phase's judgements; none in the first, when nothing was answered yet."""
        count = min(int(self._share * prompts_per_step), len(self._pool))
        return [self._question(f"{phase}-{place}", self._pool[place]) for place in range(count)]

    def _question(self, name: str, of: dict[str, Any]) -> Question:
        mode = thinking_mode(self._mode)
        item = judging_item(name, of["task"], of["candidate"], self._rubric, of["label"], mode)
        return Question(item, JUDGEMENT, self._mode, self._window)

    def take(
        self, questions: Sequence[Question], answers: Sequence[Answer], scores: Sequence[Score], groups: Iterable[int]
    ) -> None:
        """Keep one answer a prompt for the next phase, right ones and wrong ones by turns."""
        if not self._share:
            return
        rng = random.Random(derive(self._seed, "judging", answers[0].seed if answers else 0))
        by_prompt: dict[int, list[tuple[bool, str]]] = {}
        for answer, score, group in zip(answers, scores, groups, strict=True):
            if score.is_correct is not None and score.value is not None and questions[group].task != JUDGEMENT:
                candidate = final_answer(answer.text, answer.item.thinking_mode)
                by_prompt.setdefault(group, []).append((score.is_correct, candidate))
        self._pool = []
        for place, (group, candidates) in enumerate(rng.sample(sorted(by_prompt.items()), len(by_prompt))):
            wanted = [c for c in candidates if c[0] == (place % 2 == 0)] or candidates
            is_right, candidate = rng.choice(wanted)
            task = task_text(questions[group].item)
            self._pool.append({"task": task, "candidate": candidate, "label": float(is_right)})

    def state_dict(self) -> list[dict[str, Any]]:
        """For a checkpoint: JSON."""
        return self._pool

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take over what `state_dict` gave."""
        self._pool = list(state)
