"""Gradients of micro-batches: each is forwarded and its gradients add up on the parameters."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.model import Transformer
from rorqual.parallel.pipeline import Pipeline
from rorqual.train import losses
from rorqual.train.feed import Rows


@dataclass(frozen=True)
class Numerics:
    """How a micro-batch is computed."""

    dtype: torch.dtype
    loss_chunk: int
    threads: int


def accumulate(
    model: Transformer,
    batches: Sequence[Rows],
    weights: Sequence[losses.LossWeights],
    *,
    dense: bool,
    numerics: Numerics,
    pipeline: Pipeline | None = None,
) -> list[losses.LossParts]:
    """Forward and backward each micro-batch; gradients add up on the parameters.

    With a `pipeline` the model is one stage of it, all micro-batches have one shape, and the parts are this stage's.
    """
    device = next(model.parameters()).device
    parts: list[losses.LossParts] = []
    batches = [batch.to(device) for batch in batches]
    model.announce([(batch.tokens, batch.lengths, batch.segment_ids) for batch in batches])

    def compute(number: int, streams: Tensor | None) -> Tensor:
        with precision(model, numerics.dtype):
            loss, part = losses.compute(
                model,
                batches[number],
                weights[number],
                dense=dense,
                chunk=numerics.loss_chunk,
                dtype=numerics.dtype,
                streams=streams,
            )
        parts.append(part)
        return loss

    if pipeline is not None:
        with precision(model, numerics.dtype):
            pipeline.forward_backward(len(batches), batches[0].tokens, compute)
    else:
        for number in range(len(batches)):
            loss = compute(number, None)
            if loss.requires_grad:  # not where only indexers learn and no query sees an entry
                torch.autograd.backward(loss)
    model.collect()
    return parts


@contextlib.contextmanager
def precision(model: Transformer, dtype: torch.dtype) -> Iterator[None]:
    """Activations and matrix products of `model` in `dtype` inside the block; weights, sums and what V4 keeps in fp32
    stay fp32 (see `Transformer.compute_dtype`).
    """
    before = model.compute_dtype
    model.compute_dtype = None if dtype == torch.float32 else dtype
    try:
        yield
    finally:
        model.compute_dtype = before
