"""Held-out loss in nats per token and bits per byte, and greedy continuations of a few prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.model.engram import memories
from rorqual.parallel.mesh import Mesh, sum_over
from rorqual.parallel.pipeline import Pipeline
from rorqual.train import losses
from rorqual.train.feed import Feed, Rows
from rorqual.train.microbatch import Numerics, precision


@dataclass
class HeldOut:
    """Sums over held-out text."""

    nats: float = 0.0
    tokens: int = 0
    num_bytes: int = 0

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy of a token."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float | None:
        """Cross-entropy per byte of text, comparable between tokenizers; None where tokens are not text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None


@torch.no_grad()
def evaluate(
    model: Any,  # rorqual.model.Transformer
    feed: Feed,
    *,
    num_tokens: int,
    seq_len: int,
    rows_at_once: int,
    dense: bool,
    numerics: Numerics,
    mesh: Mesh,
    pipeline: Pipeline | None = None,
) -> dict[str, HeldOut]:
    """Score the held-out rows of a feed, by group (e.g. `python`, `tasks`); replicas take turns and add up."""
    byte_lengths = feed.token_byte_lengths()
    results: dict[str, HeldOut] = {}
    turn, part = 0, None
    model.eval()
    try:
        for name, rows in feed.held_out(num_tokens, seq_len):
            result = results.setdefault(name, HeldOut())
            for start in range(0, rows.tokens.shape[0], rows_at_once):
                part = rows.part(start, start + rows_at_once)
                if turn % mesh.dp == mesh.dp_rank:
                    _score(model, part, result, byte_lengths, dense=dense, numerics=numerics, pipeline=pipeline)
                turn += 1
        exchanges = mesh.ep > 1 or any(memory.is_spread for memory in memories(model))
        if part is not None and exchanges and mesh.dp_rank >= turn % mesh.dp > 0:
            # all ranks must forward equally often, because they exchange tokens or rows
            _score(model, part, HeldOut(), None, dense=dense, numerics=numerics, pipeline=pipeline)
    finally:
        model.train()
    return results if mesh.is_alone else _summed(results, mesh)


def _summed(results: dict[str, HeldOut], mesh: Mesh) -> dict[str, HeldOut]:
    figures = [float(figure) for r in results.values() for figure in (r.nats, r.tokens, r.num_bytes)]
    sums = sum_over(mesh.world_group, figures).view(-1, 3).tolist()
    return {
        name: HeldOut(nats, int(tokens), int(num_bytes))
        for name, (nats, tokens, num_bytes) in zip(results, sums, strict=True)
    }


def _score(
    model: Any,
    rows: Rows,
    result: HeldOut,
    byte_lengths: Tensor | None,
    *,
    dense: bool,
    numerics: Numerics,
    pipeline: Pipeline | None,
) -> None:
    """Add this process's share: its part of the rows, and nothing unless it holds the last layers."""
    from rorqual.model import Trace

    device = model.reference.device
    there = rows.to(device)

    def compute(_: int, streams: Tensor | None) -> Tensor:
        where = {"segment_ids": there.segment_ids, "lengths": there.lengths}
        out: Tensor = model.forward_streams(there.tokens, **where, trace=Trace(dense=dense), streams=streams)
        if not model.is_last:
            return out
        return losses.cross_entropy_sum(
            model.final_hidden(out),
            model.head.weight,
            model.own(there.labels),
            chunk=numerics.loss_chunk,  # and in float32, whatever training uses: these figures are published
        )

    with precision(model, numerics.dtype):
        nats = compute(0, None) if pipeline is None else pipeline.relay(there.tokens, compute)
    if not model.is_last:
        return
    labels = model.own(rows.labels)
    learned = labels[labels != losses.IGNORE]
    result.nats += nats.item()
    result.tokens += learned.numel()
    if byte_lengths is not None:
        result.num_bytes += int(byte_lengths[learned].sum().item())


@torch.no_grad()
def continue_greedily(
    model: Any, prompt: Sequence[int], num_tokens: int, eos: int, vocab_size: int, pipeline: Pipeline | None = None
) -> list[int]:
    """The `num_tokens` likeliest next tokens below `vocab_size`, one after the other, up to `eos`.

    With a `pipeline` all its stages must take part; every one gets the answer.
    """
    model.eval()
    try:
        state = model.new_state(batch_size=1)
        device = model.reference.device
        tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
        out: list[int] = []
        while len(out) < num_tokens:
            logits = _next_logits(model, tokens, state, pipeline)
            token = int(logits[:vocab_size].argmax())
            out.append(token)
            if token == eos:
                break
            tokens = torch.tensor([[token]], dtype=torch.int64, device=device)
        return out
    finally:
        model.train()


def _next_logits(model: Any, tokens: Tensor, state: Any, pipeline: Pipeline | None) -> Tensor:
    """Logits [V] behind the last of `tokens` [1, S], which continue `state`."""

    def compute(_: int, streams: Tensor | None) -> Tensor:
        out = model.forward_streams(tokens, state=state, streams=streams)
        logits: Tensor = model.logits(model.final_hidden(out[:, -1:]))[0, -1] if model.is_last else out
        return logits

    return compute(0, None) if pipeline is None else pipeline.relay(tokens, compute, is_whole=False)
