"""RMS normalisation, with and without weight. Source: checkpoint behaviour."""

import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import registry, triton
from rorqual.ops.native import functions, usable_typed


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, in fp32, cast once to x's dtype.

    Shapes: x [..., D], weight [D] or None. Casting before the weight (Llama style) would be a mismatch.
    """
    return F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`rms_norm_reference`, by the fastest implementation at hand."""
    return registry.pick("rms_norm", x)(x, weight, eps)


def _native(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return functions.rms_norm(x, None if weight is None else weight.float(), eps)


registry.register("rms_norm", "reference", rms_norm_reference)
registry.register("rms_norm", "native", _native, usable_typed)
registry.register("rms_norm", "triton", triton.later("rows", "rms_norm"), triton.usable)
