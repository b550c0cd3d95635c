"""Partial, interleaved rotary embedding and its inverse.

Rope acts on the last `r` channels of a vector. Channels (2i, 2i+1) of that slice form one complex number, multiplied by
exp(j * position * f_i). Angles, cosines and sines are fp32, as in DeepSeek's inference code (fp64 differs by up to
0.04 rad near position 10^6). Source: V4 report section 2.3; checkpoint behaviour for YaRN without amplitude factor.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rorqual.ops import registry, triton
from rorqual.ops.native import functions, inference, infers, usable_typed
from rorqual.ops.norms import rms_norm_reference


def rope_frequencies(rope_dim: int, base: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Frequencies f_i = base^(-2i/r), fp32 [r/2]; with YaRN `scaling`, slow pairs are divided by its factor.

    YaRN here is unconditional (it does not look at the length) and changes no amplitude.
    """
    frequencies = 1.0 / (base ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim))
    if scaling is None:
        return frequencies
    original = scaling["original_max_position_embeddings"]

    def pair_at(turns: float) -> float:  # the pair that makes `turns` full turns over the original length
        return rope_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(pair_at(scaling["beta_fast"])), 0)
    high: float = min(math.ceil(pair_at(scaling["beta_slow"])), rope_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling["factor"] * ramp + frequencies * (1 - ramp)


def rope_table_reference(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Unit complex numbers exp(j * position * f): positions [...] and frequencies [r/2] -> complex64 [..., r/2]."""
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    return torch.complex(angles.cos(), angles.sin())


def rope_table(positions: Tensor, frequencies: Tensor) -> Tensor:
    """`rope_table_reference`, by the fastest implementation at hand."""
    return registry.pick("rope_table", frequencies)(positions, frequencies)


def apply_rope_reference(x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last 2 * table.shape[-1] channels of `x`, computed in fp32, returned in x's dtype.

    Shapes: x [..., K] with an even K, table complex64 broadcastable to [..., r/2]. `inverse` rotates back, which makes
    the value's rope part relative to the query when applied to the attention output.
    """
    r = 2 * table.shape[-1]
    pairs = torch.view_as_complex(x[..., -r:].float().unflatten(-1, (-1, 2)).contiguous())
    rotated = torch.view_as_real(pairs * (table.conj() if inverse else table)).flatten(-2)
    return torch.cat([x[..., :-r], rotated.to(x.dtype)], -1)


def apply_rope(x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """`apply_rope_reference`, by the fastest implementation at hand."""
    return registry.pick("rope", x)(x, table, inverse)


def norm_rope_reference(x: Tensor, weight: Tensor | None, eps: float, table: Tensor) -> Tensor:
    """RMS norm over the last axis, then rope: queries (no weight) and keys go through both."""
    return apply_rope_reference(rms_norm_reference(x, weight, eps), table)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, table: Tensor) -> Tensor:
    """`norm_rope_reference`, by the fastest implementation at hand."""
    return registry.pick("norm_rope", x)(x, weight, eps, table)


registry.register("rope_table", "reference", rope_table_reference)
registry.register("rope_table", "native", inference.rope_table, infers)
registry.register("norm_rope", "reference", norm_rope_reference)
registry.register("norm_rope", "native", functions.norm_rope, usable_typed)
registry.register("rope", "reference", apply_rope_reference)
registry.register("rope", "native", functions.rope, usable_typed)
registry.register("norm_rope", "triton", triton.later("rows", "norm_rope"), triton.usable)
registry.register("rope", "triton", triton.later("rows", "rope"), triton.usable)
