"""Clamped SwiGLU. Source: V4 report, stability section; checkpoint behaviour.

I expert width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.native import functions, usable_typed


def forward_reference(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) * weight, in fp32: [rows, I], [rows, I], [rows] -> [rows, I].

    The gate is clamped only from above, before silu. `limit` 0 switches the clamp off; `weight` None means 1.
    """
    top = limit if limit > 0 else math.inf
    g, u = gate.float().clamp(max=top), up.float().clamp(-top, top)
    out = torch.nn.functional.silu(g) * u
    return out if weight is None else out * weight.unsqueeze(-1)


def backward_reference(
    gate: Tensor, up: Tensor, weight: Tensor | None, dout: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate, up and weight, in fp32; zero where a bound is active."""
    top = limit if limit > 0 else math.inf
    a, u = gate.float(), up.float()
    g, v, dout = a.clamp(max=top), u.clamp(-top, top), dout.float()
    sig = torch.sigmoid(g)
    silu = g * sig
    dweight = None
    if weight is not None:
        dweight = (dout * silu * v).sum(-1)
        dout = dout * weight.unsqueeze(-1)
    da = (dout * v * (sig + silu * (1 - sig))).masked_fill(a > top, 0)
    return da, (dout * silu).masked_fill(u.abs() > top, 0), dweight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return registry.pick("swiglu", gate)(gate, up, None, limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        da, du, _ = registry.pick("swiglu_backward", gate)(gate, up, None, grads[0], ctx.limit)
        return da.to(gate.dtype), du.to(up.dtype), None


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) in fp32: [..., I], [..., I] -> fp32 [..., I]."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate, up, limit)
    return registry.pick("swiglu", gate)(gate, up, None, limit)


registry.register("swiglu", "reference", forward_reference)
registry.register("swiglu", "native", functions.swiglu_forward, usable_typed)
registry.register("swiglu_backward", "reference", backward_reference)
registry.register("swiglu_backward", "native", functions.swiglu_backward, usable_typed)
