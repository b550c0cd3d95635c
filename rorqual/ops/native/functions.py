"""Autograd around the C kernels of `kernels.c`, one class per operation, registered beside the references.

Shapes and meaning stand with the references (`hyper_connections.py`, `norms.py`, `rope.py`, `swiglu.py`,
`index_topk.py`); here tensors are only made contiguous and passed on.
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.ops.native.library import call


class HcPre(torch.autograd.Function):
    """`hyper_connections.hc_pre_reference` in one pass over the streams."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        streams = streams.contiguous()
        *lead, n, d = streams.shape
        tokens = streams.numel() // (n * d)
        raw = streams.view(tokens, n * d) @ fn.t()
        y, rs = streams.new_empty(*lead, d), streams.new_empty(tokens)
        post, comb = streams.new_empty(*lead, n), streams.new_empty(*lead, n, n)
        call("hc_pre_forward", streams, raw, base, scale, tokens, n, d, iters, norm_eps, eps, y, post, comb, rs)
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
            "hc_pre_backward", streams, raw, base, scale, rs, dy, dpost, dcomb, tokens, n, d, ctx.iters, ctx.eps,
            draw, dlogit, dmixed, dx,
        )  # fmt: skip
        dx.view(tokens, n * d).addmm_(draw, fn)
        dscale = torch.stack([part.sum() for part in dmixed.sum(0).split([n, n, n * n])])
        return dx, draw.t() @ streams.view(tokens, n * d), dlogit.sum(0), dscale, None, None, None


class HcPost(torch.autograd.Function):
    """`hyper_connections.hc_post_reference` in one pass."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        streams, y, post, comb = (t.contiguous() for t in (streams, y, post, comb))
        n, d = streams.shape[-2:]
        out = torch.empty_like(streams)
        call("hc_post_forward", streams, y, post, comb, streams.numel() // (n * d), n, d, out)
        ctx.save_for_backward(streams, y, post, comb)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        streams, y, post, comb = ctx.saved_tensors
        n, d = streams.shape[-2:]
        out = [torch.empty_like(t) for t in (streams, y, post, comb)]
        call("hc_post_backward", streams, y, post, comb, grads[0].contiguous(), streams.numel() // (n * d), n, d, *out)
        return tuple(out)


class RmsNorm(torch.autograd.Function):
    """`norms.rms_norm` with one pass forward and one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        d = x.shape[-1]
        y, rs = torch.empty_like(x), x.new_empty(x.numel() // d)
        call("rms_norm_forward", x, weight, rs.numel(), d, eps, y, rs)
        ctx.save_for_backward(x, weight, rs)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rs = ctx.saved_tensors
        dy, d = grads[0].contiguous(), x.shape[-1]
        dx = torch.empty_like(x)
        call("rms_norm_backward", x, weight, rs, dy, rs.numel(), d, dx)
        if weight is None:
            return dx, None, None
        dw = torch.empty_like(weight)
        call("rms_norm_weight_backward", x, rs, dy, rs.numel(), d, dw)
        return dx, dw, None


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


def _rotate(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    x, flat = x.contiguous(), torch.view_as_real(table).contiguous()
    k, r = x.shape[-1], 2 * table.shape[-1]
    rows, table_rows = x.numel() // k, table.numel() * 2 // r
    heads = x.shape[-2] if table.ndim == x.ndim and table.shape[-2] == 1 and x.ndim == 4 else 1
    out = torch.empty_like(x)
    call("rope_rotate", x, flat, rows, heads, table_rows, k, r, -1.0 if inverse else 1.0, out)
    return out


def swiglu_forward(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    """`swiglu.weighted_reference` without a graph: [rows, I] -> [rows, I]."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    call("swiglu_forward", gate, up, weight, gate.numel() // gate.shape[-1], gate.shape[-1], limit, out)
    return out


def swiglu_backward(
    gate: Tensor, up: Tensor, weight: Tensor | None, dout: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate, up and weight."""
    gate, up, dout = gate.contiguous(), up.contiguous(), dout.contiguous()
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
        b, t, j, c = dots.shape
        out = dots.new_empty(b, t, c)
        call("index_reduce", dots, weights, b * t, j, c, out)
        ctx.save_for_backward(dots, weights)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dots, weights = ctx.saved_tensors
        b, t, j, c = dots.shape
        ddots, dweights = torch.empty_like(dots), torch.empty_like(weights)
        call("index_reduce_backward", dots, weights, grads[0].contiguous(), b * t, j, c, ddots, dweights)
        return ddots, dweights
