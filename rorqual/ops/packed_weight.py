"""Weights kept as they are stored: FP4, FP8, INT8, bf16 or fp32, with their scales.

Source: DeepSeek-V4's published formats (numerics in `ops/quant.py`); INT8 is ours: one fp32 scale a row, symmetric.

    fp4    codes uint8 [..., out, in/2], low nibble first; scale e8m0 [..., out, ceil(in/32)]
    fp8    codes uint8 [..., out, in] (e4m3 bits); scale fp32 [..., ceil(out/128), ceil(in/128)]
    int8   codes uint8 [..., out, in] (two's complement); scale fp32 [..., out]
    bf16   codes uint8 [..., out, 2 in], fp32 [..., out, 4 in]: the numbers' own bytes; no scale
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rorqual.errors import CheckpointError, ConfigError
from rorqual.ops import quant

PackedFormat = Literal["fp32", "bf16", "int8", "fp8", "fp4"]
FORMATS: tuple[PackedFormat, ...] = ("fp32", "bf16", "int8", "fp8", "fp4")
"""In the order of the C side's numbers."""

INT8_MAX = 127


@dataclass(frozen=True)
class PackedWeight:
    """A matrix, or a stack of them, in one of the formats."""

    format: PackedFormat
    codes: Tensor
    """uint8, contiguous."""
    scale: Tensor | None
    shape: tuple[int, ...]
    """[..., out, in]."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: what a product reads."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __getitem__(self, index: int) -> "PackedWeight":
        """One matrix of a stack."""
        scale = None if self.scale is None else self.scale[index]
        return PackedWeight(self.format, self.codes[index], scale, self.shape[1:])

    def dequantise(self) -> Tensor:
        """fp32 [..., out, in]."""
        if self.format == "fp4":
            assert self.scale is not None
            return quant.dequantize_weight_fp4(self.codes, self.scale)
        if self.format == "fp8":
            assert self.scale is not None
            return quant.dequantize_weight_fp8(self.codes.view(torch.float8_e4m3fn), self.scale)
        if self.format == "int8":
            assert self.scale is not None
            return self.codes.view(torch.int8).float() * self.scale.unsqueeze(-1)
        return self.codes.view(torch.bfloat16 if self.format == "bf16" else torch.float32).float()


def packed_nbytes(shape: tuple[int, ...], kind: PackedFormat) -> int:
    """Bytes of codes and scales of weights [..., out, in] in format `kind`."""
    *stack, out, width = shape
    rows, columns = (-(-size // block) for size, block in zip((out, width), quant.FP8_BLOCK, strict=True))
    each = {
        "fp32": 4 * out * width, "bf16": 2 * out * width, "int8": out * width + 4 * out,
        "fp8": out * width + 4 * rows * columns, "fp4": out * (width // 2) + out * -(-width // quant.FP4_GROUP),
    }  # fmt: skip
    return math.prod(stack) * each[kind]


def quantize_weight_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., out, in] -> codes int8, scale fp32 [..., out]: largest magnitude over 127, ties to even.

    A row of zeros has scale 1; a row with a number that is not finite has the scale NaN.
    """
    amax = weight.float().abs().amax(-1)
    scale = torch.where(amax == 0, 1.0, amax / INT8_MAX)
    scale = torch.where(torch.isfinite(amax), scale, torch.nan)
    codes = (weight.float() / scale.unsqueeze(-1)).round().clamp(-INT8_MAX, INT8_MAX).nan_to_num(0.0)
    return codes.to(torch.int8), scale


def pack(weight: Tensor, kind: PackedFormat) -> PackedWeight:
    """Matrix or stack [..., out, in] -> the same in format `kind`, rounded by that format's rule.

    Raises: ConfigError for FP4 rows of odd length or an unknown format.
    """
    shape = tuple(weight.shape)
    if kind == "fp4":
        return from_codes(*quant.quantize_weight_fp4(weight))
    if kind == "fp8":
        return from_codes(*quant.quantize_weight_fp8(weight))
    if kind == "int8":
        return from_codes(*quantize_weight_int8(weight), is_int8=True)
    if kind not in ("bf16", "fp32"):
        raise ConfigError(f"weight format {kind!r} is not one of {', '.join(FORMATS)}. Choose one of these.")
    numbers = weight.to(torch.bfloat16 if kind == "bf16" else torch.float32).contiguous()
    return PackedWeight(kind, numbers.view(torch.uint8), None, shape)


def from_codes(codes: Tensor, scale: Tensor, *, is_int8: bool = False) -> PackedWeight:
    """Tensors of a file as they are: FP4 (int8 or uint8 pairs), FP8 (float8_e4m3fn) or INT8 with their scales.

    Nothing is rounded; scales of FP4 may be e8m0 or fp32 powers of two, those of FP8 e8m0 or fp32.
    Raises: CheckpointError when codes and scales do not fit each other, ConfigError for other scales.
    """
    *stack, out, last = codes.shape
    if is_int8:
        kind, shape, wanted = "int8", (*stack, out, last), (*stack, out)
        factors = scale.float()
    elif codes.dtype == torch.float8_e4m3fn:
        kind, shape = "fp8", (*stack, out, last)
        wanted = (*stack, -(-out // quant.FP8_BLOCK[0]), -(-last // quant.FP8_BLOCK[1]))
        factors = scale if scale.dtype == torch.float32 else quant.decode_e8m0(scale)
    else:
        kind, shape = "fp4", (*stack, out, 2 * last)
        wanted = (*stack, out, -(-2 * last // quant.FP4_GROUP))
        factors = (quant.encode_e8m0(scale) if scale.dtype == torch.float32 else scale).view(torch.uint8)
    if tuple(scale.shape) != wanted:
        raise CheckpointError(
            f"scales have shape {tuple(scale.shape)} but {kind} codes {tuple(codes.shape)} need {wanted}, so values "
            "and scales cannot be matched. Check that both tensors come from the same checkpoint."
        )
    return PackedWeight(kind, codes.contiguous().view(torch.uint8), factors.contiguous(), shape)  # type: ignore[arg-type]
