"""Autograd around the C kernels, one class per operation, registered beside the references.

Shapes and meaning stand with the references (`hyper_connections.py`, `norms.py`, `rope.py`, `swiglu.py`,
`index_topk.py`); here tensors are only made contiguous and passed on.
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.ops.native.library import call


def hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`hyper_connections.hc_pre_reference`; without gradients no autograd node is made."""
    if torch.is_grad_enabled():
        return HcPre.apply(streams, fn, base, scale, iters, norm_eps, eps)
    return _hc_pre(streams.contiguous(), fn, base, scale, iters, norm_eps, eps)[:3]


def _hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *lead, n, d = streams.shape
    tokens = streams.numel() // (n * d)
    y, raw, rs = streams.new_empty(*lead, d), base.new_empty(tokens, base.numel()), base.new_empty(tokens)
    post, comb = base.new_empty(*lead, n), base.new_empty(*lead, n, n)
    call("hc_pre_forward", streams, fn, base, scale, tokens, n, d, iters, norm_eps, eps, y, post, comb, raw, rs)
    return y, post, comb, raw, rs


def hc_post(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """`hyper_connections.hc_post_reference`."""
    if torch.is_grad_enabled():
        return HcPost.apply(streams, y, post, comb)
    return _hc_post(streams, y, post, comb)


def _hc_post(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    streams, y, post, comb = streams.contiguous(), y.contiguous(), post.contiguous(), comb.contiguous()
    n, d = streams.shape[-2:]
    out = torch.empty_like(streams)
    call("hc_post_forward", streams, y, post, comb, streams.numel() // (n * d), n, d, out)
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`norms.rms_norm_reference`."""
    if torch.is_grad_enabled():
        return RmsNorm.apply(x, weight, eps)
    return _rms_norm(x.contiguous(), weight, eps)[0]


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    d = x.shape[-1]
    y, rs = torch.empty_like(x), x.new_empty(x.numel() // d, dtype=torch.float32)
    call("rms_norm_forward", x, weight, rs.numel(), d, eps, y, rs)
    return y, rs


def rope(x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """`rope.apply_rope_reference`."""
    if torch.is_grad_enabled():
        return Rope.apply(x, table, inverse)
    return _rotate(x, table, inverse)


def index_reduce(dots: Tensor, weights: Tensor) -> Tensor:
    """`index_topk.reduce_heads_reference`."""
    if torch.is_grad_enabled():
        return IndexReduce.apply(dots, weights)
    return _index_reduce(dots.contiguous(), weights.contiguous())


def _index_reduce(dots: Tensor, weights: Tensor) -> Tensor:
    b, t, j, c = dots.shape
    out = weights.new_empty(b, t, c)
    call("index_reduce", dots, weights, b * t, j, c, out)
    return out


class HcPre(torch.autograd.Function):
    """`hyper_connections.hc_pre_reference` in one pass over the streams."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        iters: int,
        norm_eps: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        streams = streams.contiguous()
        y, post, comb, raw, rs = _hc_pre(streams, fn, base, scale, iters, norm_eps, eps)
        ctx.save_for_backward(streams, fn, base, scale, raw, rs)
        ctx.iters, ctx.eps = iters, eps
        return y, post, comb

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, raw, rs = ctx.saved_tensors
        dy, dpost, dcomb = (g.contiguous() for g in grads)
        n, d = streams.shape[-2:]
        tokens = raw.shape[0]
        draw, dlogit, dmixed = torch.empty_like(raw), torch.empty_like(raw), torch.empty_like(raw)
        dx = torch.empty_like(streams)
        call(
            "hc_pre_backward", streams, fn, raw, base, scale, rs, dy, dpost, dcomb, tokens, n, d, ctx.iters, ctx.eps,
            draw, dlogit, dmixed, dx,
        )  # fmt: skip
        dscale = torch.stack([part.sum() for part in dmixed.sum(0).split([n, n, n * n])])
        dfn = (draw.to(streams.dtype).t() @ streams.view(tokens, n * d)).to(fn.dtype)
        return dx, dfn, dlogit.sum(0), dscale, None, None, None


class HcPost(torch.autograd.Function):
    """`hyper_connections.hc_post_reference` in one pass."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        streams, y, post, comb = (t.contiguous() for t in (streams, y, post, comb))
        ctx.save_for_backward(streams, y, post, comb)
        return _hc_post(streams, y, post, comb)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        streams, y, post, comb = ctx.saved_tensors
        n, d = streams.shape[-2:]
        out = [torch.empty_like(t) for t in (streams, y, post, comb)]
        call(
            "hc_post_backward",
            streams,
            y,
            post,
            comb,
            grads[0].contiguous(),
            streams.numel() // (n * d),
            n,
            d,
            *out,
        )
        return tuple(out)


class HcHead(torch.autograd.Function):
    """`hyper_connections.hc_head_reference` in one pass."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float
    ) -> Tensor:
        streams = streams.contiguous()
        *lead, n, d = streams.shape
        tokens = streams.numel() // (n * d)
        y, rs = streams.new_empty(*lead, d), base.new_empty(tokens)
        pre, raw = base.new_empty(tokens, n), base.new_empty(tokens, n)
        call("hc_head_forward", streams, fn, base, scale, tokens, n, d, norm_eps, eps, y, pre, raw, rs)
        ctx.save_for_backward(streams, fn, scale, pre, raw, rs)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, scale, pre, raw, rs = ctx.saved_tensors
        n, d = streams.shape[-2:]
        tokens, dx = raw.shape[0], torch.empty_like(streams)
        draw, dlogit, dmixed = torch.empty_like(raw), torch.empty_like(raw), torch.empty_like(raw)
        dy = grads[0].contiguous()
        call("hc_head_backward", streams, fn, scale, pre, raw, rs, dy, tokens, n, d, ctx.eps, draw, dlogit, dmixed, dx)
        dfn = (draw.to(streams.dtype).t() @ streams.view(tokens, n * d)).to(fn.dtype)
        return dx, dfn, dlogit.sum(0), dmixed.sum().reshape(1), None, None


class RmsNorm(torch.autograd.Function):
    """`norms.rms_norm_reference` with one pass forward and one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        y, rs = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rs)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rs = ctx.saved_tensors
        return *_rms_norm_backward(x, weight, rs, grads[0].contiguous()), None


def _rms_norm_backward(x: Tensor, weight: Tensor | None, rs: Tensor, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    d, dx = x.shape[-1], torch.empty_like(x)
    call("rms_norm_backward", x, weight, rs, dy, rs.numel(), d, dx)
    if weight is None:
        return dx, None
    dw = torch.empty_like(weight)
    call("rms_norm_weight_backward", x, rs, dy, rs.numel(), d, dw)
    return dx, dw


class Rope(torch.autograd.Function):
    """`rope.apply_rope_reference`: copy and rotation in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.inverse = inverse
        return _rotate(x, table, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (table,) = ctx.saved_tensors
        return _rotate(grads[0], table, not ctx.inverse), None, None


def _rope_shape(x: Tensor, table: Tensor) -> tuple[int, int, int, int, int]:
    """Width, rope channels, rows, consecutive rows that share a table row, and rows of the table."""
    k, r = x.shape[-1], 2 * table.shape[-1]
    heads = x.shape[-2] if table.ndim == x.ndim == 4 and table.shape[-2] == 1 else 1
    return k, r, x.numel() // k, heads, table.numel() * 2 // r


def _rotate(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    x, flat = x.contiguous(), torch.view_as_real(table).contiguous()
    k, r, rows, heads, table_rows = _rope_shape(x, table)
    out = torch.empty_like(x)
    call("rope_rotate", x, flat, rows, heads, table_rows, k, r, -1.0 if inverse else 1.0, out)
    return out


class NormRope(torch.autograd.Function):
    """`rope.norm_rope_reference`: both in one pass forward; backward turns the gradient back, then the norm's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, table: Tensor) -> Tensor:
        x = x.contiguous()
        out, rs = _norm_rope(x, weight, eps, table)
        ctx.save_for_backward(x, weight, rs, table)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rs, table = ctx.saved_tensors
        dx, dweight = _rms_norm_backward(x, weight, rs, _rotate(grads[0], table, True))
        return dx, dweight, None, None


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, table: Tensor) -> Tensor:
    """`rope.norm_rope_reference`."""
    weight = None if weight is None else weight.float()
    if torch.is_grad_enabled():
        return NormRope.apply(x, weight, eps, table)
    return _norm_rope(x.contiguous(), weight, eps, table)[0]


def _norm_rope(x: Tensor, weight: Tensor | None, eps: float, table: Tensor) -> tuple[Tensor, Tensor]:
    k, r, rows, heads, table_rows = _rope_shape(x, table)
    out, rs = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    flat = torch.view_as_real(table).contiguous()
    call("norm_rope_forward", x, weight, flat, rows, heads, table_rows, k, r, eps, out, rs)
    return out, rs


def swiglu_forward(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    """`swiglu.forward_reference` without a graph: [rows, I] -> [rows, I]."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    call("swiglu_forward", gate, up, weight, gate.numel() // gate.shape[-1], gate.shape[-1], limit, out)
    return out


def swiglu_backward(
    gate: Tensor, up: Tensor, weight: Tensor | None, dout: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate, up and weight."""
    gate, up, dout = gate.contiguous(), up.contiguous(), dout.to(gate.dtype).contiguous()
    da, du = torch.empty_like(gate), torch.empty_like(up)
    dweight = None if weight is None else torch.empty_like(weight)
    rows, d = gate.numel() // gate.shape[-1], gate.shape[-1]
    call("swiglu_backward", gate, up, weight, dout, rows, d, limit, da, du, dweight)
    return da, du, dweight


class IndexReduce(torch.autograd.Function):
    """sum_j w_j relu(dots_j): dots [B, T, J, C], weights [B, T, J] -> [B, T, C]."""

    @staticmethod
    def forward(ctx: Any, dots: Tensor, weights: Tensor) -> Tensor:
        dots, weights = dots.contiguous(), weights.contiguous()
        ctx.save_for_backward(dots, weights)
        return _index_reduce(dots, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dots, weights = ctx.saved_tensors
        b, t, j, c = dots.shape
        ddots, dweights = torch.empty_like(dots), torch.empty_like(weights)
        call("index_reduce_backward", dots, weights, grads[0].contiguous(), b * t, j, c, ddots, dweights)
        return ddots, dweights


class Attention(torch.autograd.Function):
    """`sparse_attention.attention_reference` without its score tensor; also the log-sum-exp (no gradient)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, entries: Tensor | None, sink: Tensor, positions: Tensor, start: Tensor | None,
        end: Tensor | None, picks: Tensor | None, window: int, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, kv, sink, positions = (t.contiguous() for t in (q, kv, sink, positions))
        entries, start, end, picks = (None if t is None else t.contiguous() for t in (entries, start, end, picks))
        b, t, h, k = q.shape
        out, lse = torch.empty_like(q), q.new_empty(b, t, h, dtype=torch.float32)
        numbers = (
            b, t, h, k, window, 0 if entries is None else entries.shape[1], positions.shape[0],
            1 if end is None else end.shape[0], 0 if picks is None else picks.shape[-1], scale,
        )  # fmt: skip
        call("attention_forward", q, kv, sink.float(), positions, entries, start, end, picks, *numbers, out, lse)
        ctx.save_for_backward(q, kv, entries, sink, positions, start, end, picks, out, lse)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sink, positions, start, end, picks, out, lse = ctx.saved_tensors
        b = q.shape[0]
        parts = 1 if b >= torch.get_num_threads() else torch.get_num_threads()
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        dkv = torch.zeros(parts, *kv.shape, dtype=torch.float32)
        dentries = None if entries is None else torch.zeros(parts, *entries.shape, dtype=torch.float32)
        call(
            "attention_backward", q, kv, sink.float(), positions, entries, start, end, picks, *ctx.numbers, out, lse,
            grads[0].to(q.dtype).contiguous(), parts, dq, delta, dkv, dentries,
        )  # fmt: skip
        dsink = -((sink.float() - lse).exp() * delta).sum((0, 1)).to(sink.dtype)
        dkv = dkv[0] if parts == 1 else dkv.sum(0)
        if dentries is not None and entries is not None:
            dentries = (dentries[0] if parts == 1 else dentries.sum(0)).to(entries.dtype)
        return dq, dkv.to(kv.dtype), dentries, dsink, None, None, None, None, None, None


class Experts(torch.autograd.Function):
    """`experts.experts_reference`, forward and backward in one call each; weight gradients are fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float
    ) -> Tensor:
        x = x.contiguous()
        matrices = [w.to(x.dtype).contiguous() for w in (w1, w3, w2)]
        (tokens, active), (num_experts, inner, d) = experts.shape, w1.shape
        rows = tokens * active
        token, choice, slots = (torch.empty(rows, dtype=torch.int64) for _ in range(3))
        bounds = torch.empty(num_experts + 1, dtype=torch.int64)
        call("experts_sort", experts.contiguous(), tokens, active, num_experts, token, choice, bounds, slots)
        gate = weights.flatten()[choice].float()
        a, u, out = x.new_empty(rows, inner), x.new_empty(rows, inner), x.new_empty(rows, d)
        call("experts_forward", x, token, bounds, gate, *matrices, num_experts, d, inner, limit, a, u, out)
        y = x.new_empty(tokens, d, dtype=torch.float32)
        call("experts_combine", out, slots, tokens, active, d, y)
        ctx.save_for_backward(x, token, choice, bounds, slots, gate, *matrices, a, u)
        ctx.limit, ctx.dtypes = limit, (weights.dtype, w1.dtype, w3.dtype, w2.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, token, choice, bounds, slots, gate, w1, w3, w2, a, u = ctx.saved_tensors
        num_experts, inner, d = w1.shape
        dy, dxs, dgate = grads[0].to(x.dtype).contiguous(), x.new_empty(token.numel(), d), torch.empty_like(gate)
        dw1, dw3, dw2 = (torch.empty(w.shape, dtype=torch.float32) for w in (w1, w3, w2))
        call(
            "experts_backward", x, token, bounds, gate, w1, w3, w2, a, u, dy, num_experts, d, inner, ctx.limit,
            dxs, dgate, dw1, dw3, dw2,
        )  # fmt: skip
        dx, active = x.new_empty(x.shape, dtype=torch.float32), token.numel() // max(x.shape[0], 1)
        call("experts_combine", dxs, slots, x.shape[0], active, d, dx)
        dweights = torch.empty_like(gate)
        dweights[choice] = dgate
        kinds = ctx.dtypes
        return (
            dx.to(x.dtype), None, dweights.view(-1, active).to(kinds[0]), dw1.to(kinds[1]), dw3.to(kinds[2]),
            dw2.to(kinds[3]), None,
        )  # fmt: skip


class IndexLoss(torch.autograd.Function):
    """`index_loss.index_loss_reference`; the gradients come with the value, since only a factor is missing to them."""

    @staticmethod
    def forward(
        ctx: Any, index_q: Tensor, weights: Tensor, keys: Tensor, q: Tensor, lse: Tensor, entries: Tensor,
        start: Tensor | None, end: Tensor, picks: Tensor | None, valid: Tensor | None, top_k: int, scale: float,
    ) -> Tensor:  # fmt: skip
        index_q, weights, keys, q, lse, entries, end = (
            t.contiguous() for t in (index_q, weights, keys, q, lse, entries, end)
        )
        start, picks = (None if t is None else t.contiguous() for t in (start, picks))
        b, t, j, k = index_q.shape
        parts = 1 if b >= torch.get_num_threads() else torch.get_num_threads()
        sums = torch.zeros(parts * b, 4)
        dq, dweights = torch.empty_like(index_q), torch.empty_like(weights)
        dkeys = torch.zeros(parts, *keys.shape, dtype=torch.float32)
        call(
            "index_loss", index_q, weights, keys, q, lse, entries, start, end, picks,
            None if valid is None else valid.long().contiguous(), b, t, j, k, keys.shape[1], end.shape[0], top_k,
            0 if picks is None else picks.shape[-1], q.shape[2], q.shape[3], scale, parts, sums, dq, dweights, dkeys,
        )  # fmt: skip
        ctx.save_for_backward(dq, dweights, (dkeys[0] if parts == 1 else dkeys.sum(0)).to(keys.dtype))
        return sums.sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0][0]
        dq, dweights, dkeys = ctx.saved_tensors
        return (dq * factor).to(dq.dtype), dweights * factor, (dkeys * factor).to(dkeys.dtype), *[None] * 9


def index_select(q: Tensor, weights: Tensor, keys: Tensor, start: Tensor | None, end: Tensor, top_k: int) -> Tensor:
    """`index_topk.index_scores` and `select_entries` in one pass, without gradients: -> picks int64 [B, T, top_k]."""
    q, weights, keys, end = q.contiguous(), weights.float().contiguous(), keys.contiguous(), end.contiguous()
    b, t, j, k = q.shape
    picks = torch.empty(b, t, min(top_k, keys.shape[1]), dtype=torch.int64)
    call(
        "index_select", q, weights, keys, None if start is None else start.contiguous(), end, b, t, j, k, keys.shape[1],
        end.shape[0], picks.shape[-1], picks,
    )  # fmt: skip
    return picks


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cross_entropy.cross_entropy_reference`."""
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    (rows, d), vocabulary, parts = hidden.shape, weight.shape[0], torch.get_num_threads()
    log_norm, loss, dhidden = torch.empty(rows), torch.empty(rows), torch.empty(rows, d)
    dweight = torch.zeros(parts, vocabulary, d)
    call(
        "cross_entropy", hidden, weight, labels, rows, d, vocabulary, z_weight, parts, log_norm, loss, dhidden, dweight
    )
    return loss, log_norm, dhidden, dweight[0] if parts == 1 else dweight.sum(0)


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
