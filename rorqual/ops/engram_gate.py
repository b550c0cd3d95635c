"""Engram's gate: how far what was read agrees with the residual stream, per token and stream.

    z = sum_d w_d hhat_d khat_d / sqrt(D),  hhat = h / rms(h),  khat = k / rms(k)
    gate = sigmoid(sign(z) sqrt(max(|z|, 1e-6)))

The weights of the two norms enter only by their product w. Source: Engram paper, section 2; the signed square root is
that of the released code (the paper's text has none). fp32 inside, whatever the inputs are.

N streams, D hidden.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rorqual.ops.pointwise import sigmoid

FLOOR = 1e-6
"""Below it |z| counts as this much, and has no gradient: a square root's slope is infinite at zero."""


def signed_sqrt(z: Tensor) -> Tensor:
    """sign(z) sqrt(max(|z|, FLOOR)); zero at zero."""
    return z.sign() * z.abs().clamp_min(FLOOR).sqrt()


def engram_gate_reference(h: Tensor, k: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h and k [..., N, D], weight [N, D] -> gate fp32 [..., N]; derived by autograd."""
    h, k = h.float(), k.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + eps)
    return torch.sigmoid(signed_sqrt((h * k * weight.float()).sum(-1) / math.sqrt(h.shape[-1])))


class _Gate(torch.autograd.Function):
    """Saves its inputs and three numbers a stream instead of every intermediate of size D."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, k: Tensor, weight: Tensor, eps: float) -> Tensor:
        rh = torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)
        rk = torch.rsqrt(k.float().square().mean(-1, keepdim=True) + eps)
        z = (h.float() * rh * (k.float() * rk) * weight.float()).sum(-1) / math.sqrt(h.shape[-1])
        gate = sigmoid(signed_sqrt(z))
        ctx.save_for_backward(h, k, weight, rh, rk, z, gate)
        return gate

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        h, k, weight, rh, rk, z, gate = ctx.saved_tensors
        w, size = weight.float(), h.shape[-1]
        hn, kn = h.float() * rh, k.float() * rk
        slope = torch.where(z.abs() > FLOOR, 0.5 * z.abs().clamp_min(FLOOR).rsqrt(), 0.0)
        gz = (grads[0] * gate * (1 - gate) * slope).unsqueeze(-1)
        common, shrink = gz / math.sqrt(size), gz * z.unsqueeze(-1) / size
        gh = rh * (common * w * kn - shrink * hn)
        gk = rk * (common * w * hn - shrink * kn)
        gw = (common * hn * kn).reshape(-1, *weight.shape).sum(0)
        return gh.to(h.dtype), gk.to(k.dtype), gw.to(weight.dtype), None


def engram_gate(h: Tensor, k: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`engram_gate_reference` with its derivative written out (second derivatives are not provided)."""
    result: Tensor = _Gate.apply(h, k, weight, eps)
    return result
