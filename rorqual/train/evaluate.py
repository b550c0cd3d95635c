"""Held-out loss in nats per token and bits per byte, and greedy continuations of a few prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.train import losses
from rorqual.train.feed import Feed, Rows
from rorqual.train.workers import Numerics, autocast


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
) -> dict[str, HeldOut]:
    """Score the held-out rows of a feed, by group (e.g. `python`, `tasks`)."""
    byte_lengths = feed.token_byte_lengths()
    results: dict[str, HeldOut] = {}
    model.eval()
    try:
        for name, rows in feed.held_out(num_tokens, seq_len):
            result = results.setdefault(name, HeldOut())
            for start in range(0, rows.tokens.shape[0], rows_at_once):
                part = rows.part(start, start + rows_at_once)
                _score(model, part, result, byte_lengths, dense=dense, numerics=numerics)
    finally:
        model.train()
    return results


def _score(
    model: Any, rows: Rows, result: HeldOut, byte_lengths: Tensor | None, *, dense: bool, numerics: Numerics
) -> None:
    from rorqual.model import Trace

    device = model.embed.weight.device
    there = rows.to(device)
    trace = Trace(dense=dense)
    with autocast(device.type, numerics.dtype):
        streams = model.forward_streams(there.tokens, segment_ids=there.segment_ids, lengths=there.lengths, trace=trace)
        nats = losses.cross_entropy_sum(
            model.final_hidden(streams),
            model.head.weight,
            there.labels,
            chunk=numerics.loss_chunk,  # and in float32, whatever training uses: these figures are published
        )
    learned = rows.labels[rows.labels != losses.IGNORE]
    result.nats += nats.item()
    result.tokens += learned.numel()
    if byte_lengths is not None:
        result.num_bytes += int(byte_lengths[learned].sum().item())


@torch.no_grad()
def continue_greedily(model: Any, prompt: Sequence[int], num_tokens: int, eos: int, vocab_size: int) -> list[int]:
    """The `num_tokens` likeliest next tokens below `vocab_size`, one after the other, up to `eos`."""
    model.eval()
    try:
        state = model.new_state(batch_size=1)
        device = model.embed.weight.device
        tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
        out: list[int] = []
        while len(out) < num_tokens:
            token = int(model(tokens, state=state)[0, -1, :vocab_size].argmax())
            out.append(token)
            if token == eos:
                break
            tokens = torch.tensor([[token]], dtype=torch.int64, device=device)
        return out
    finally:
        model.train()
