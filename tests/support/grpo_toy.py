"""A task that a network of a few thousand numbers learns in seconds: answer with digits and punctuation."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mock_model import byte_tokenizer
from small_models import config

from rorqual.data.tasks.base import Item
from rorqual.model import Transformer
from rorqual.posttrain.config import OptimConfig, RunConfig
from rorqual.posttrain.grpo_config import GRPOConfig
from rorqual.posttrain.grpo_run import run_grpo
from rorqual.posttrain.rewards.base import Answer, Score
from rorqual.posttrain.stages import Outcome, StageContext

WANTED = frozenset("!#$%&'()*+,-.0123456789")
"""Bytes that stand in no name of a marker, so that a marker is never worth more than a byte."""


def items(seed: int, split: str) -> Iterator[Item]:
    """Prompts of a few letters, endlessly."""
    rng = random.Random(f"{seed} {split}")
    while True:
        text = "".join(rng.choices("xyz", k=rng.randint(1, 4)))
        yield Item("toy", f"toy-{text}", [], None, "chat", "", {}, {"wanted": "digits"}, text, split)  # type: ignore[arg-type]


def digits(answers: Sequence[Answer]) -> list[float]:
    """Share of the window filled with what is wanted."""
    return [sum(letter in WANTED for letter in answer.text) / answer.window for answer in answers]


def digits_as_trl(prompts: list[str], completions: list[str], wanted: list[str], **columns: Any) -> list[float]:
    """The same, as TRL's trainers call a reward."""
    assert set(wanted) == {"digits"} and len(prompts) == len(completions)
    return [sum(letter in WANTED for letter in text) / 6 for text in completions]


def judged(answers: Sequence[Answer]) -> list[Score]:
    """The same, with right and wrong, so that answers can be candidates of judgements."""
    return [Score(value, is_correct=value > 0, is_abstention=False) for value in digits(answers)]


def toy_config(**changes: Any) -> GRPOConfig:
    return GRPOConfig.model_validate(
        {
            "kind": "grpo",
            "steps": 30,
            "group_size": 8,
            "prompts_per_step": 2,
            "beta": 0.0,
            "eval_every": 0,
            "optim": OptimConfig(lr=1e-2, warmup_steps=0, decay="constant").model_dump(),
            "modes": {"off": {"window": 6}},
            "tasks": [{"source": "grpo_toy:items", "rewards": [{"name": "grpo_toy:digits"}]}],
            **changes,
        }
    )


def toy_model(seed: int = 0) -> Transformer:
    cfg = config(num_hidden_layers=2, compress_ratios=[0, 4], vocab_size=byte_tokenizer().vocab_size)
    return Transformer(cfg, seed=seed)


def toy_run(
    folder: Path,
    settings: GRPOConfig,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    model: Transformer | None = None,
) -> Outcome:
    run = RunConfig(folder=str(folder), threads=1, checkpoint_minutes=1e-9)
    context = StageContext(model or toy_model(), byte_tokenizer(), folder, run, resume=resume, should_stop=should_stop)
    return run_grpo(settings, context)


EVERYTHING: dict[str, Any] = {
    "steps": 5,
    "minibatches": 2,
    "epochs": 2,
    "beta": 0.1,
    "refresh_reference_every": 2,
    "keep_routing": True,
    "sampling": {"top_p": 0.9},
    "micro_batch_tokens": 64,
    "eval_every": 2,
    "eval_items": 4,
    "optim": {"lr": 0.03, "decay": "constant", "warmup_steps": 0},
    "judging": {"share": 0.5},
    "tasks": [{"source": "grpo_toy:items", "rewards": [{"name": "grpo_toy:judged"}]}],
    "prompts_per_step": 4,
    "group_size": 4,
}
"""Settings under which a checkpoint has to hold all that it may hold."""
