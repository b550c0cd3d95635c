"""Autograd around the C kernels that walk over rows, one class per operation, registered beside the references.

Shapes and meaning stand with the references (`hyper_connections.py`, `norms.py`, `rope.py`, `swiglu.py`,
`index_topk.py`); here tensors are only made contiguous and passed on.
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.ops.native.library import call

LANES = 16
"""The kernels' vectors are whole ones of this many floats."""


def hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`hyper_connections.hc_pre_reference`; without gradients no autograd node is made."""
    if torch.is_grad_enabled():
        return HcPre.apply(streams, fn, base, scale, iters, norm_eps, eps)
    return _hc_pre(streams.contiguous(), fn, base, scale, iters, norm_eps, eps, training=False)[:3]


def _hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float, *, training: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *lead, n, d = streams.shape
    tokens = streams.numel() // (n * d)
    y, raw, rs = streams.new_empty(*lead, d), base.new_empty(tokens, base.numel()), base.new_empty(tokens)
    post, comb = base.new_empty(*lead, n), base.new_empty(*lead, n, n)
    call(
        "hc_pre_forward", streams, fn, base, scale, tokens, n, d, iters, norm_eps, eps, int(training), y, post, comb,
        raw, rs,
    )  # fmt: skip
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
        y, post, comb, raw, rs = _hc_pre(streams, fn, base, scale, iters, norm_eps, eps, training=True)
        ctx.save_for_backward(streams, fn, base, scale, raw, rs)
        ctx.iters, ctx.eps = iters, eps
        return y, post, comb

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, raw, rs = ctx.saved_tensors
        dy, dpost, dcomb = (g.contiguous() for g in grads)
        n, d = streams.shape[-2:]
        (tokens, rows), parts = raw.shape, torch.get_num_threads()
        dlogit, dmixed, dx = torch.empty_like(raw), torch.empty_like(raw), torch.empty_like(streams)
        dfn = torch.zeros(parts, rows, -(-n * d // LANES) * LANES)
        call(
            "hc_pre_backward", streams, fn, raw, base, scale, rs, dy, dpost, dcomb, tokens, n, d, ctx.iters, ctx.eps,
            parts, dlogit, dmixed, dfn, dx,
        )  # fmt: skip
        dscale = torch.stack([part.sum() for part in dmixed.sum(0).split([n, n, n * n])])
        dfn = (dfn[0] if parts == 1 else dfn.sum(0))[:, : n * d]
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
        y, pre, raw, rs = _hc_head(streams, fn, base, scale, norm_eps, eps)
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


def hc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    """`hyper_connections.hc_head_reference`."""
    if torch.is_grad_enabled():
        return HcHead.apply(streams, fn, base, scale, norm_eps, eps)
    return _hc_head(streams.contiguous(), fn, base, scale, norm_eps, eps)[0]


def _hc_head(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *lead, n, d = streams.shape
    tokens = streams.numel() // (n * d)
    y, rs = streams.new_empty(*lead, d), base.new_empty(tokens)
    pre, raw = base.new_empty(tokens, n), base.new_empty(tokens, n)
    call("hc_head_forward", streams, fn, base, scale, tokens, n, d, norm_eps, eps, y, pre, raw, rs)
    return y, pre, raw, rs


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
