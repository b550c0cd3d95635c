"""Whole sub-layers in one C call for a handful of tokens, without gradients: what a decode step is made of."""

import torch
from torch import Tensor

from rorqual.ops.native.library import call


def attend_small(
    q: Tensor, kv: Tensor, sink: Tensor, positions: Tensor, window: int, scale: float, entries: Tensor | None,
    start: Tensor | None, end: Tensor | None, picks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sparse_attention.attention_reference` for a handful of queries, without gradients; also the log-sum-exp."""
    q, kv = q.contiguous(), kv.contiguous()
    b, t, h, k = q.shape
    out, lse = torch.empty_like(q), q.new_empty(b, t, h)
    if entries is not None and entries.stride(1) != k:
        entries = entries.contiguous()
    rows = 1 if end is None else end.shape[0]
    call(
        "attend_small", q, kv, sink, positions.contiguous(), entries, None if start is None else start.contiguous(),
        None if end is None else end.contiguous(), None if picks is None else picks.contiguous(), b, t, h, k, window,
        0 if entries is None else entries.stride(0), positions.shape[0], rows, 0 if picks is None else picks.shape[-1],
        scale, out, lse,
    )  # fmt: skip
    return out, lse


def moe_small(
    x: Tensor, router: Tensor, bias: Tensor | None, experts: Tensor | None, stacked: tuple[Tensor, Tensor, Tensor],
    shared: tuple[Tensor, Tensor, Tensor], active: int, scale: float, limit: float,
) -> Tensor:  # fmt: skip
    """A whole MoE layer for a handful of tokens, without gradients: x [T, D] -> [T, D].

    `stacked` and `shared` are (w1, w3, w2); `experts` [T, A] names them (hash routing), or `bias` [E] joins the top-k.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    num_experts, width, d = stacked[0].shape
    call(
        "moe_small",
        x,
        router,
        bias,
        experts,
        *stacked,
        *shared,
        x.shape[0],
        d,
        num_experts,
        active,
        width,
        scale,
        limit,
        y,
    )
    return y


def index_select_small(
    q: Tensor, weights: Tensor, keys: Tensor, start: Tensor | None, end: Tensor, top_k: int
) -> Tensor:
    """Scores and choice of the indexer for a handful of queries, without gradients: -> picks int64 [B, T, top_k]."""
    q, weights = q.contiguous(), weights.contiguous()
    b, t, j, k = q.shape
    if keys.stride(1) != k:
        keys = keys.contiguous()
    picks = torch.empty(b, t, top_k, dtype=torch.int64)
    call(
        "index_select_small", q, weights, keys, None if start is None else start.contiguous(), end.contiguous(),
        b, t, j, k, keys.stride(0), end.shape[0], top_k, picks,
    )  # fmt: skip
    return picks
