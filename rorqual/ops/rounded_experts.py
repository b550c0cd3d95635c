"""Routed experts whose products read FP8: inputs and hidden values rounded 1 x 128, as the released weights expect.

Source: checkpoint behaviour (the input of every FP8 and FP4 matrix is rounded; the routing weight is already inside the
input of the down projection). Slower than `grouped_experts`, which it follows in everything else.

T tokens, D hidden, E experts, A active experts per token, I expert width.
"""

import torch
from torch import Tensor

from rorqual.ops.fake_quant import fake_fp8_input
from rorqual.ops.linear import linear
from rorqual.ops.swiglu import swiglu


def rounded_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float
) -> Tensor:
    """Shapes as in `grouped_experts`: x [T, D], experts int64 [T, A], weights [T, A] -> fp32 [T, D]."""
    w1, w3, w2 = (w if w.dtype == x.dtype else w.to(x.dtype) for w in (w1, w3, w2))
    tokens, active = experts.shape
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=w1.shape[0]).tolist()
    xs = fake_fp8_input(x)[order // active].split(counts)
    gates = weights.flatten()[order].float().unsqueeze(-1).split(counts)
    parts = []
    for inputs, gate, up, side, down in zip(xs, gates, w1.unbind(), w3.unbind(), w2.unbind(), strict=True):
        if len(inputs):
            hidden = swiglu(linear(inputs, up), linear(inputs, side), limit) * gate
            parts.append(linear(fake_fp8_input(hidden.to(x.dtype)), down))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    slots = inverse.view(tokens, active).sort(-1).values  # fixed order of the sum: ascending expert id
    return torch.cat(parts)[slots.flatten()].view(tokens, active, -1).float().sum(1)
