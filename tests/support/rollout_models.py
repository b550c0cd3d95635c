"""What tests of rollouts share: a tiny network whose answers end by themselves, prompts, and what is compared."""

from typing import Any

import torch
from mock_model import byte_tokenizer
from small_models import config

from rorqual.engine import Engine, SamplingParams
from rorqual.model import Transformer
from rorqual.posttrain.rollouts import Prompt, Rollout

VOCAB = 288
"""A few ids more than the tokenizer has, as real heads do."""
SAMPLING = SamplingParams(max_tokens=48)


def tiny_policy(seed: int = 1, ends_at: float = 2.0) -> Transformer:
    """A random network that ends an answer after some ten tokens. ends_at: how much it favours the end."""
    model = Transformer(config(vocab_size=VOCAB), seed=seed)
    eos = byte_tokenizer().eos_token_id
    with torch.no_grad():
        model.head.weight.mul_(3.0)
        hidden = [model.final_hidden(model.forward_streams(torch.tensor([[t, t + 1, t + 2]])))[0, -1] for t in range(99)]
        mean = torch.stack(hidden).mean(0)
        model.head.weight[eos] = ends_at * mean / mean.norm()
    return model


def tiny_engine(model: Transformer | None = None, **options: Any) -> Engine:
    return Engine(model or tiny_policy(), byte_tokenizer(), **options)


def tiny_prompts(count: int, tag: str = "p") -> list[Prompt]:
    return [Prompt(f"{tag}{n}", tuple(range(5 + n, 9 + 2 * n)), data=n) for n in range(count)]


def told(rollouts: list[Rollout]) -> dict[str, Any]:
    """All of them by id, in a form that compares every bit."""
    return {
        one.id: (
            one.trajectory.ids, one.trajectory.logprobs, one.trajectory.mask, one.versions, one.truncated,
            None if one.routing is None else {name: rows.tolist() for name, rows in one.routing.items()},
            None
            if one.sampling_masks is None
            else [None if ids is None else ids.tolist() for ids in one.sampling_masks],
        )
        for one in rollouts
    }  # fmt: skip


def flat(groups: Any) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]
