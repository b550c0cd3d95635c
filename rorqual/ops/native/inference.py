"""The C kernels of inference: no gradients, and every token's numbers the same whatever tokens come with it.

Each output element is added up in one order that no number of rows, threads or chunks changes; several kernels for the
same numbers do not exist. Shapes and meaning stand with the references (`linear.py`, `sparse_attention.py`,
`compress.py`, `rope.py`, `experts.py`).
"""

import torch
from torch import Tensor

from rorqual.ops.native.assignments import assign
from rorqual.ops.native.library import call


def linear(x: Tensor, weight: Tensor, groups: int = 1, *, exact: bool = False) -> Tensor:
    """`linear.linear_reference`; `exact` leaves the sums in fp32. x and weight have one dtype."""
    x, weight = x.contiguous(), weight.contiguous()
    out, inner = weight.shape[0] // groups, weight.shape[1]
    rows = x.numel() // (groups * inner)
    y = x.new_empty(*x.shape[:-1], out, dtype=torch.float32 if exact else x.dtype)
    call("linear", x, weight, rows, groups, out, inner, None if exact else y, y if exact else None)
    return y


def attend(
    q: Tensor, kv: Tensor, sink: Tensor, positions: Tensor, window: int, scale: float, entries: Tensor | None,
    start: Tensor | None, end: Tensor | None, picks: Tensor | None, table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sparse_attention.attention_reference`; also the log-sum-exp. With `table` the entries are pages [P, R, K]."""
    q, kv = q.contiguous(), kv.contiguous()
    b, t, h, k = q.shape
    out, lse = torch.empty_like(q), q.new_empty(b, t, h, dtype=torch.float32)
    num_entries = stride = rows = 0
    if entries is not None:
        if entries.stride(-1) != 1 or entries.stride(-2) != k:
            entries = entries.contiguous()
        rows, stride = entries.shape[1], 0 if table is not None else entries.stride(0)
        num_entries = rows if table is None else rows * table.numel()
    call(
        "attend", q, kv, sink.float(), positions.contiguous(), entries, table,
        None if start is None else start.contiguous(), None if end is None else end.contiguous(),
        None if picks is None else picks.contiguous(), b, t, h, k, window, num_entries, stride, rows,
        positions.shape[0], 1 if end is None else end.shape[0], 0 if picks is None else picks.shape[-1], scale,
        out, lse,
    )  # fmt: skip
    return out, lse


def compress_pool(kv: Tensor, score: Tensor, index: Tensor, skip: Tensor) -> Tensor:
    """`compress.pool` of rows: kv and score fp32 [any, K], index int64 [B, E, slots], skip int64 [B, E] -> [B, E, K].

    The first `skip` slots of an entry do not count.
    """
    b, e, slots = index.shape
    out = kv.new_empty(b, e, kv.shape[-1])
    call(
        "compress_pool", kv.contiguous(), score.contiguous(), index.contiguous(), skip.contiguous(), b * e, slots,
        kv.shape[-1], out,
    )  # fmt: skip
    return out


def rope_table(positions: Tensor, frequencies: Tensor) -> Tensor:
    """`rope.rope_table_reference`."""
    out = frequencies.new_empty(*positions.shape, frequencies.numel(), 2)
    call("rope_angles", positions.contiguous(), frequencies, positions.numel(), frequencies.numel(), out)
    return torch.view_as_complex(out)


def router(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, active: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts int64 [T, A], weights fp32 [T, A] and scores fp32 [T, E] of x [T, D]; `chosen` instead of a bias."""
    x, weight = x.contiguous(), weight.contiguous()
    (tokens, d), experts = x.shape, weight.shape[0]
    scores, weights = torch.empty(tokens, experts), torch.empty(tokens, active)
    bias = bias if chosen is None else None
    chosen = torch.empty(tokens, active, dtype=torch.int64) if chosen is None else chosen.contiguous()
    call("router", x, weight, bias, tokens, d, experts, active, scale, scores, chosen, weights)
    return chosen, weights, scores


def experts_apply(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float, shared: Tensor | None
) -> Tensor:
    """`experts.grouped_experts`; weights have x's dtype."""
    x, w1, w3, w2 = (t.contiguous() for t in (x, w1, w3, w2))
    num_experts, inner, d = w1.shape
    to = assign(experts, weights, num_experts)
    hidden, out = x.new_empty(experts.numel(), inner), x.new_empty(experts.numel(), d)
    call("experts_apply", x, to.token, to.bounds, to.gate, w1, w3, w2, num_experts, d, inner, limit, hidden, out)
    if shared is None:
        return to.combine(out)
    y = torch.empty_like(x)
    call("experts_join", out, to.slots, shared.contiguous(), *to.slots.shape, d, y)
    return y


def sigmoid(x: Tensor) -> Tensor:
    """`pointwise.sigmoid`, fp32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    call("sigmoid_each", x, x.numel(), y)
    return y


def silu(x: Tensor) -> Tensor:
    """`pointwise.silu`, fp32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    call("silu_each", x, x.numel(), y)
    return y
