"""The training loss: next-token cross-entropy, MTP cross-entropy, router balance and the indexers' own loss.

    loss = CE + w_mtp * CE_mtp + w_balance * sum of balance losses + w_index * sum of index losses

Source: V4 report (MTP and balance unchanged from V3); the index loss is V3.2's. Left out: FP4 (later).

Logits are the largest tensor of a training step: tokens x vocabulary. The cross-entropy here makes them a
chunk of tokens at a time and computes the gradient in the same pass, so no more than one chunk of logits ever
exists.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.config import CSA_RATIO
from rorqual.train.feed import Rows

IGNORE = -100
"""Label of a position that is not predicted (padding, masked prompts, the end of a document)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; the gradients are formed in the forward pass and scaled in the backward one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        weight_c = weight.detach().to(dtype)
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk):
            stop = min(start + chunk, hidden.shape[0])
            label = labels[start:stop]
            is_valid = label != IGNORE
            hidden_c = hidden[start:stop].detach().to(dtype)
            logits = (hidden_c @ weight_c.T).float()
            index = label.clamp(min=0).unsqueeze(1)
            log_norm = torch.logsumexp(logits, dim=1, keepdim=True)
            losses = (log_norm - logits.gather(1, index)).squeeze(1)
            total += torch.where(is_valid, losses, 0.0).sum()
            if not (needs_hidden or needs_weight):
                continue
            # Gradient of the logits: softmax minus one-hot, zero where the label is ignored.
            logits.sub_(log_norm).exp_()
            logits.scatter_add_(1, index, torch.full_like(log_norm, -1.0))
            logits.mul_(is_valid.unsqueeze(1))
            gradient = logits.to(dtype)
            if hidden_grad is not None:
                hidden_grad[start:stop] = gradient @ weight_c
            if weight_grad is not None:
                weight_grad += gradient.T @ hidden_c
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        (upstream,) = grads
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if hidden_grad is None else (hidden_grad * upstream).to(hidden_dtype),
            None if weight_grad is None else (weight_grad * upstream).to(weight_dtype),
            None,
            None,
            None,
        )


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 1024, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sum over positions of -log softmax(hidden @ weight.T)[label], in nats, never holding more than a chunk
    of logits.

    Shapes: hidden [..., D], weight [V, D], labels [...] int64 (`IGNORE` = not counted) -> scalar float32.
    `dtype` is the precision of the three matrix products; sums and softmax are float32 throughout.
    """
    result: Tensor = _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), chunk, dtype
    )
    return result


def mtp_labels(labels: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Label of position i for the MTP block is token i+2, if positions i to i+2 lie in one document, else
    `IGNORE`.

    Shapes: labels [B, S] (next token or `IGNORE`), segment_ids [B, S] -> [B, S]. The block reads token i+1 at
    position i, so the last two positions of a document predict nothing.
    """
    shifted = torch.full_like(labels, IGNORE)
    shifted[:, :-1] = labels[:, 1:]
    if segment_ids is not None:
        shifted[:, :-1].masked_fill_(segment_ids[:, 1:] != segment_ids[:, :-1], IGNORE)
    return shifted


def num_index_queries(rows: Rows) -> int:
    """Queries over which an indexer's loss is a mean: those whose document has completed an entry before or with
    them.
    """
    if rows.segment_ids is None:
        lengths = rows.lengths or (rows.tokens.shape[1],) * rows.tokens.shape[0]
        return sum(max(length - (CSA_RATIO - 1), 0) for length in lengths)
    # Position m - 1 or later in a document: the m - 1 tokens before it have the same segment. Padding has one a token.
    same = rows.segment_ids[:, 1:] == rows.segment_ids[:, :-1]
    windows = same.unfold(1, CSA_RATIO - 1, 1) if same.shape[1] >= CSA_RATIO - 1 else same[:, :0].unsqueeze(-1)
    return int(windows.all(-1).sum())


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts at one moment of training, and the denominators of the whole step."""

    mtp: float
    balance: float
    index: float
    num_targets: int
    """Predicted positions in the whole step (all micro-batches): the mean is over these."""
    num_mtp_targets: int
    row_share: float
    """Rows of this micro-batch over rows of the step: weight of per-sequence losses."""
    index_share: float
    """Share of this micro-batch in the step's queries that see a compressed entry: weight of the index losses."""


@dataclass
class LossParts:
    """Detached shares of this micro-batch in the step's losses (they add up over micro-batches), and router
    counts.
    """

    lm: float
    mtp: float
    balance: float
    index: float
    index_recall: list[float]
    router_counts: dict[str, list[float]]
    """Tokens each expert received, by the router's module path."""


def compute(
    model: Any,  # rorqual.model.Transformer, or anything with its training methods
    rows: Rows,
    weights: LossWeights,
    *,
    dense: bool,
    chunk: int = 1024,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, LossParts]:
    """Forward one micro-batch and return its share of the step's loss, ready for `backward()`.

    `rows` lie on the model's device. `dense` lets compressed sparse attention read every visible
    entry (the first stage of training). Router counts are returned by the router's module path
    ("layers.3.ffn.gate"), hash layers too.
    """
    from rorqual.model import Trace, next_tokens

    labels, where = rows.labels, {"segment_ids": rows.segment_ids, "lengths": rows.lengths}
    trace = Trace(dense=dense, index_loss=weights.index > 0, router=True)
    head: nn.Parameter = model.head.weight
    streams = model.forward_streams(rows.tokens, **where, trace=trace)
    lm = cross_entropy_sum(model.final_hidden(streams), head, labels, chunk=chunk, dtype=dtype)
    lm = lm / max(weights.num_targets, 1)
    loss = lm
    mtp = torch.zeros(())
    if weights.mtp > 0 and weights.num_mtp_targets > 0:
        mtp_streams = model.mtp_streams(streams, next_tokens(rows.tokens), **where, trace=trace)
        mtp_hidden = model.mtp_hidden(mtp_streams)
        mtp = cross_entropy_sum(mtp_hidden, head, mtp_labels(labels, rows.segment_ids), chunk=chunk, dtype=dtype)
        mtp = mtp / weights.num_mtp_targets
        loss = loss + weights.mtp * mtp
    balance = _total([r.balance_loss for r in trace.routers if r.balance_loss is not None]) * weights.row_share
    index = _total(trace.index_losses) * weights.index_share
    loss = loss + weights.balance * balance + weights.index * index
    return loss, LossParts(
        lm=lm.item(),
        mtp=mtp.item(),
        balance=balance.item(),
        index=index.item(),
        index_recall=[float(value) for value in trace.index_recall],
        router_counts={record.name: record.counts.tolist() for record in trace.routers},
    )


def _total(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum() if losses else torch.zeros(())
