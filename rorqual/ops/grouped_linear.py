"""Grouped product: each group of channels has a matrix of its own. Source: V4 report section 2.3 (grouped output).

T tokens, G groups, I channels in and R channels out of a group.
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.ops import registry


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """z_g = A_g x_g: x [T, G, I], weight [G, R, I] in any precision -> [T, G, R] in x's."""
    return torch.bmm(x.transpose(0, 1), weight.to(x.dtype).transpose(1, 2)).transpose(0, 1)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`reference`, contiguous, in the way that suits x's device."""
    return registry.pick("grouped_linear", x)(x, weight).contiguous()


class _ByGroup(torch.autograd.Function):
    """One product a group, read and written in place: on a CPU the batched product copies its operands first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.dtype = weight.dtype
        z = x.new_empty(*x.shape[:2], weight.shape[1])
        for g, matrix in enumerate(cast):
            torch.mm(x[:, g], matrix.t(), out=z[:, g])
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dz, dx, dweight = grads[0], torch.empty_like(x), torch.empty_like(weight)
        for g, matrix in enumerate(weight):
            torch.mm(dz[:, g], matrix, out=dx[:, g])
            torch.mm(dz[:, g].t(), x[:, g], out=dweight[g])
        return dx, dweight.to(ctx.dtype)


registry.register("grouped_linear", "reference", reference)
registry.register("grouped_linear", "by_group", _ByGroup.apply, lambda x: x.device.type == "cpu" and not x.is_meta)
