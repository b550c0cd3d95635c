"""Generating first must not spoil training in the same process: no table made in inference mode is kept."""

import torch
from small_models import build, config, some_tokens

from rorqual.ops import hadamard


def test_inference_mode_first_then_training() -> None:
    """Tables remembered between calls must be usable by autograd, whoever asked for them first."""
    hadamard.hadamard_matrix.cache_clear()
    hadamard._scaled.cache_clear()
    model = build(config())
    tokens = some_tokens(model, 1, 40)
    with torch.inference_mode():
        model(tokens, state=model.new_state())
    model(tokens).square().mean().backward()
