"""The training loss: next-token cross-entropy, MTP cross-entropy, router balance and the indexers' own loss.

    loss = CE + w_mtp * mean of CE_mtp + w_balance * sum of balance losses + w_index * sum of index losses + w_z * z^2

z is the log of the softmax's denominator; its loss is off unless asked for, its figures are always kept.
Source: V4 report (MTP and balance unchanged from V3); the index loss is V3.2's, the z loss PaLM's.

Logits are the largest tensor of a training step: tokens x vocabulary. The cross-entropy here makes them a
chunk of tokens at a time and computes the gradient in the same pass, so no more than one chunk of logits ever
exists.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.config import CSA_RATIO
from rorqual.ops.cross_entropy import cross_entropy
from rorqual.train.feed import Rows

Figure = tuple[float, float, float]
"""Sum, count and largest of something measured; those of several micro-batches merge."""

IGNORE = -100
"""Label of a position that is not predicted (padding, masked prompts, the end of a document)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; the gradients are formed in the forward pass and scaled in the backward one."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, dtype: torch.dtype, z_weight: float
    ) -> tuple[Tensor, Tensor]:
        counted = labels != IGNORE
        rows = counted.nonzero().squeeze(1)
        loss, z, gradient, weight_grad = cross_entropy(
            hidden.detach()[rows].to(dtype), weight.detach().to(dtype), labels[rows], chunk, z_weight
        )
        total, squares = loss.sum(), z.square().sum()
        largest = z.max() if len(rows) else torch.tensor(-math.inf, device=hidden.device)
        z_figures = torch.stack([z.sum(), counted.sum().float(), largest, squares])
        hidden_grad = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        hidden_grad[rows] = gradient
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(z_figures)
        return total + z_weight * squares if z_weight else total, z_figures

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        upstream = grads[0]
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            (hidden_grad * upstream).to(hidden_dtype),
            (weight_grad * upstream).to(weight_dtype),
            None,
            None,
            None,
            None,
        )


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, loss: Tensor) -> Tensor:
        return streams.view_as(streams)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), device=grads[0].device)


def carry(streams: Tensor, loss: Tensor) -> Tensor:
    """`streams` unchanged; when their gradient arrives, from whatever loss, that of the scalar `loss` sets off too."""
    result: Tensor = _Carry.apply(streams, loss.float())
    return result


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int = 1024,
    dtype: torch.dtype = torch.float32,
    z_weight: float = 0.0,
    z_figures: list[Tensor] | None = None,
) -> Tensor:
    """Sum over positions of -log softmax(hidden @ weight.T)[label], in nats, never holding more than a chunk
    of logits.

    Shapes: hidden [..., D], weight [V, D], labels [...] int64 (`IGNORE` = not counted) -> scalar float32.
    `dtype` is the precision of the three matrix products; sums and softmax are float32 throughout. `z_weight` times the
    sum of squared log-normalisers z is added. `z_figures` receives [sum z, count, largest z, sum z^2] over the
    counted positions, without gradient.
    """
    result, figures = _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), chunk, dtype, z_weight
    )
    if z_figures is not None:
        z_figures.append(figures)
    total: Tensor = result
    return total


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


def mtp_targets(rows: Rows, depth: int) -> list[Tensor]:
    """Labels of each of `depth` chained MTP modules: token i+2, i+3, ... of the same document, [B, S] each."""
    targets, labels = [], rows.labels
    for _ in range(depth):
        labels = mtp_labels(labels, rows.segment_ids)
        targets.append(labels)
    return targets


def forward_mtp(model: Any, streams: Tensor, rows: Rows, trace: Any) -> Iterator[Tensor]:
    """Streams [B, S, N, D] of each MTP module in turn: module k reads those of module k - 1 (the first the trunk's) and
    the embedding of token i + 1 + k.
    """
    from rorqual.model import next_tokens

    tokens = rows.tokens
    for depth in range(len(model.mtp)):
        tokens = next_tokens(tokens)
        streams = model.mtp_streams(
            streams, tokens, segment_ids=rows.segment_ids, lengths=rows.lengths, trace=trace, depth=depth
        )
        yield streams


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
    num_deeper_targets: tuple[int, ...] = ()
    """As `num_mtp_targets`, for the second MTP module on."""
    z: float = 0.0
    """Weight of the squared log-normaliser of the output head's softmax."""
    watch: bool = False
    """Whether this micro-batch also keeps the figures of `model/health.py`."""


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
    z_loss: float = 0.0
    """Share in the step's mean squared log-normaliser."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """`z` (log-normalisers of the head), and with `LossWeights.watch` what `model/health.py` measures."""


def compute(
    model: Any,  # rorqual.model.Transformer, or anything with its training methods
    rows: Rows,
    weights: LossWeights,
    *,
    dense: bool,
    chunk: int = 1024,
    dtype: torch.dtype = torch.float32,
    streams: Tensor | None = None,
) -> tuple[Tensor, LossParts]:
    """Forward one micro-batch and return its share of the step's loss, ready for `backward()`.

    `rows` lie on the model's device. `dense` lets compressed sparse attention read every visible
    entry (the first stage of training). Router counts are returned by the router's module path
    ("layers.3.ffn.gate"), hash layers too.

    A pipeline stage takes the `streams` of the stage before (the first one None); one that is not the last returns
    streams instead of a loss, whose gradient sets off that of the losses within the stage.
    """
    from rorqual.model import Trace
    from rorqual.model.health import watch_composite

    labels, where = rows.labels, {"segment_ids": rows.segment_ids, "lengths": rows.lengths}
    trace = Trace(dense=dense, index_loss=weights.index > 0, router=True, forced=rows.experts, health=weights.watch)
    if streams is not None and not model.reference.requires_grad:  # only indexers learn, each from its own loss
        streams = streams.detach()
    streams = model.forward_streams(rows.tokens, **where, trace=trace, streams=streams)
    watch_composite(trace)
    z_figures: list[Tensor] = []
    loss = lm = mtp = torch.zeros((), device=streams.device)
    if model.is_last:
        head: nn.Parameter = model.head.weight
        lm = cross_entropy_sum(
            model.final_hidden(streams), head, model.own(labels), chunk=chunk, dtype=dtype,
            z_weight=weights.z, z_figures=z_figures,
        ) / max(weights.num_targets, 1)  # fmt: skip
        loss = lm
    if model.is_last and weights.mtp > 0 and weights.num_mtp_targets > 0:
        counts = (weights.num_mtp_targets, *weights.num_deeper_targets)
        targets = mtp_targets(rows, len(counts))
        parts = [
            cross_entropy_sum(model.mtp_hidden(s, depth), head, model.own(target), chunk=chunk, dtype=dtype)
            / max(count, 1)
            for depth, (count, target, s) in enumerate(
                zip(counts, targets, forward_mtp(model, streams, rows, trace), strict=False)
            )
        ]
        mtp = torch.stack(parts).sum() / len(parts)
        loss = loss + weights.mtp * mtp
    balance = _total([r.balance_loss for r in trace.routers if r.balance_loss is not None]) * weights.row_share
    index = _total(trace.index_losses) * weights.index_share
    loss = loss + weights.balance * balance + weights.index * index
    z = z_figures[0].tolist() if z_figures else [0.0, 0.0, 0.0, 0.0]
    z_loss = z[3] / max(weights.num_targets, 1)
    if not model.is_last:
        loss = carry(streams, loss)
    return loss, LossParts(
        lm=lm.item() - weights.z * z_loss,
        mtp=mtp.item(),
        balance=balance.item(),
        index=index.item(),
        index_recall=[float(value) for value in trace.index_recall],
        router_counts={record.name: record.counts.tolist() for record in trace.routers},
        z_loss=z_loss,
        figures={**({"z": (z[0], z[1], z[2])} if z_figures else {}), **_plain(trace.figures)},
    )


def _plain(figures: dict[str, Tensor]) -> dict[str, Figure]:
    """All figures in one transfer from the device."""
    rows = torch.stack(list(figures.values())).tolist() if figures else []
    return {name: (row[0], row[1], row[2]) for name, row in zip(figures, rows, strict=True)}


def _total(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum() if losses else torch.zeros(())
