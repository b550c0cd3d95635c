"""The model's only dense layer and its norm: no biases anywhere, weights [out, in]."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.ops.norms import rms_norm


class Linear(nn.Module):
    """y = x W^T; the weight is cast to x's dtype when they differ (fp32 inputs keep fp32 arithmetic)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight = self.weight
        return F.linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Weighted RMS norm in fp32 (see `ops/norms.py`)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)
