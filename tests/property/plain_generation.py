"""Generation without engine, cache or neighbours: what every request must equal."""

import torch

from rorqual.engine import SamplingParams, sampler
from rorqual.model import Transformer


def alone(model: Transformer, ids: list[int], own: SamplingParams, end: int) -> list[int]:
    """The new tokens, up to `end`: the whole prompt in one call, then one token after another."""
    state, known, new = model.new_state(), list(ids), list(ids)
    with torch.inference_mode():
        while len(known) < len(ids) + (own.max_tokens or 0):
            logits = model(torch.tensor([new]), state=state)[0, -1]
            new = [sampler.sample(logits, own, own.seed or 0, len(known))]
            known += new
            if new[0] == end:
                break
    return known[len(ids) :]
