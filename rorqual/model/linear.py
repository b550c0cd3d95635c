"""The model's only dense layer and its norm: no biases anywhere, weights [out, in]."""

from typing import Any

import torch
from torch import Tensor, nn

from rorqual.ops.linear import linear, linear_exact, linear_reference
from rorqual.ops.norms import rms_norm


class Linear(nn.Module):
    """y = x W^T; the weight is cast to x's dtype when they differ (fp32 inputs keep fp32 arithmetic)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight)

    def grouped(self, x: Tensor, groups: int) -> Tensor:
        """Each group with its own rows of the weight: [..., G, in] -> [..., G, out / G]."""
        return linear(x, self.weight, groups)

    def exact(self, x: Tensor) -> Tensor:
        """The product in fp32 whatever x is: [..., in] -> fp32 [..., out]. Gradients take x's precision."""
        if x.dtype == torch.float32 or not torch.is_grad_enabled():
            return linear_exact(x, self.weight)
        return _Exact.apply(x, self.weight)


class _Exact(torch.autograd.Function):
    """fp32 forward for low-precision x; the two products of the backward pass are done in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_reference(x, weight, exact=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dy = grads[0].to(x.dtype)
        dweight = dy.flatten(0, -2).T @ x.flatten(0, -2)
        return dy @ weight.to(x.dtype), dweight.to(weight.dtype)


class RMSNorm(nn.Module):
    """Weighted RMS norm in fp32 (see `ops/norms.py`)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)
