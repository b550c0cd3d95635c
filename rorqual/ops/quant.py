"""FP8 and FP4 numerics: block-scaled weights, activation rounding, e8m0 scale bytes.

Source: DeepSeek-V4's published inference numerics (block-scaled e4m3 weights, MXFP4 experts, ue8m0 scales).
Every scale is a power of two, so a value rounded here is exactly representable in bf16 as well.

Formats:
    e8m0   one unsigned byte b = 2^(b - 127); 255 is NaN; there is no zero and no sign
    e4m3   torch.float8_e4m3fn: largest 448, subnormal step 2^-9, no infinities
    e2m1   four bits: sign, then a code 0..7 for the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6

All functions are plain torch on any device and are the reference for faster versions. They round to nearest,
ties to the even code. Left out: gradients (`ops/fake_quant.py`) and the files themselves (`checkpoint/`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rorqual.errors import CheckpointError, ConfigError

FP8_MAX = 448.0
FP4_MAX = 6.0
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = FP4_MAX * 2.0**-126
FP8_BLOCK = (128, 128)
FP4_GROUP = 32
FP4_SCALE_RATIO = 2.0**11
"""Largest over smallest FP4 scale within an FP8 block of a weight that is quantised here (the released kernels assert
it); with it every value recast to FP8 is a normal number or zero."""
FP8_SCALE_RATIO = 2.0**14
"""The same ratio up to which the recast loses nothing, e4m3 subnormals included."""

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


# ---------------------------------------------------------------- scales


def decode_e8m0(scale: Tensor) -> Tensor:
    """e8m0 bytes -> fp32 powers of two, same shape. Accepts uint8, int8 (reread as unsigned) or
    float8_e8m0fnu.

    Byte 0 is 2^-127 (an fp32 subnormal), byte 255 is NaN.
    """
    if scale.dtype not in (torch.uint8, torch.int8, torch.float8_e8m0fnu):
        raise ConfigError(
            f"e8m0 scales have dtype {scale.dtype}; a scale is one exponent byte, so its bits cannot be read "
            "from that. Pass uint8, int8 or float8_e8m0fnu."
        )
    exponent = scale.view(torch.uint8).to(torch.int32)
    bits = torch.where(exponent == 0, torch.full_like(exponent, 1 << 22), exponent << 23)
    value = bits.view(torch.float32)
    return torch.where(exponent == 255, torch.full_like(value, torch.nan), value)


def encode_e8m0(scale: Tensor) -> Tensor:
    """fp32 powers of two -> e8m0 (float8_e8m0fnu), same shape; non-finite values become byte 255.

    Raises: ConfigError when a finite value is not a power of two in 2^-127 .. 2^127.
    """
    mantissa, exponent = torch.frexp(scale.float())  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
    byte = exponent + 126
    finite = torch.isfinite(scale)
    wrong = finite & ((mantissa != 0.5) | (byte < 0) | (byte > 254))
    if bool(wrong.any()):
        value = scale[wrong].flatten()[0].item()
        raise ConfigError(
            f"scale {value!r} is not a power of two between 2^-127 and 2^127, so an e8m0 byte cannot hold "
            "it. Make scales with power_of_two_ceil, or keep them in fp32."
        )
    byte = torch.where(finite, byte, torch.full_like(byte, 255))
    return byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def power_of_two_ceil(x: Tensor) -> Tensor:
    """2^ceil(log2 x) of positive normal fp32 numbers, exact (from their bits); NaN where x is not finite."""
    bits = x.float().contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    value = (exponent << 23).view(torch.float32)
    return torch.where(torch.isfinite(x), value, torch.full_like(value, torch.nan))


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 value of each element of x [any shape] as fp32; ties to the even code, saturates at 6.

    The codes are evenly spaced inside [0, 2], [2, 4] and [4, 6], and even codes fall on even multiples of the
    spacing, so `torch.round` (half to even) decides ties as the format wants.
    """
    value = x.float().clamp(-FP4_MAX, FP4_MAX)
    binade = value.abs().clamp_(min=1.0).view(torch.int32).bitwise_and_(0x7F800000)  # exponent bits alone: 1, 2 or 4
    step = binade.view(torch.float32).mul_(0.5)
    return value.div_(step).round_().mul_(step)


# ---------------------------------------------------------------- activations


def fp8_scale(amax: Tensor) -> Tensor:
    """Scale of groups of largest magnitude `amax`: 2^ceil(log2(max(amax, 1e-4) / 448)), fp32, same shape."""
    return power_of_two_ceil(amax.float().clamp(min=FP8_AMAX_FLOOR) * (1 / FP8_MAX))


def fp4_scale(amax: Tensor) -> Tensor:
    """Scale of groups of largest magnitude `amax`: 2^ceil(log2(max(amax, 6 * 2^-126) / 6)), fp32."""
    return power_of_two_ceil(amax.float().clamp(min=FP4_AMAX_FLOOR) * (1 / FP4_MAX))


def quantize_act_fp8(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Round activations to e4m3 with one scale per `group` consecutive channels of the last axis.

    Shapes: x [..., C] -> codes [..., C] float8_e4m3fn, scales [..., ceil(C / group)] fp32 powers of two.
    A last group shorter than `group` has a scale of its own. `group` is 128 before a matrix product and 64
    for cached keys.
    """
    grouped = split_groups(x, group)
    scale = fp8_scale(grouped.abs().amax(-1))
    codes = (grouped / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return join_groups(codes, x.shape[-1]), scale


def dequantize_groups(codes: Tensor, scale: Tensor, group: int = 128) -> Tensor:
    """Codes [..., C] (e4m3, or e2m1 unpacked) times scales [..., ceil(C / group)] -> fp32 [..., C]."""
    grouped = split_groups(codes.float(), group) * scale[..., None]
    return join_groups(grouped, codes.shape[-1])


def round_act_fp8(x: Tensor, group: int = 128) -> Tensor:
    """What x [..., C] is after a round trip through FP8: same shape and dtype. See `quantize_act_fp8`."""
    codes, scale = quantize_act_fp8(x, group)
    return dequantize_groups(codes, scale, group).to(x.dtype)


def quantize_act_fp4(x: Tensor, group: int = FP4_GROUP) -> tuple[Tensor, Tensor]:
    """Round activations to e2m1 with one scale per `group` channels of the last axis.

    Shapes: x [..., C] -> values [..., C] fp32 (each one of the sixteen e2m1 values; `pack_fp4` makes bytes of
    them), scales [..., ceil(C / group)] fp32 powers of two. Used for the indexer's queries and keys.
    """
    grouped = split_groups(x, group)
    scale = fp4_scale(grouped.abs().amax(-1))
    return join_groups(round_e2m1(grouped / scale[..., None]), x.shape[-1]), scale


def round_act_fp4(x: Tensor, group: int = FP4_GROUP) -> Tensor:
    """What x [..., C] is after a round trip through FP4: same shape and dtype. See `quantize_act_fp4`."""
    values, scale = quantize_act_fp4(x, group)
    return dequantize_groups(values, scale, group).to(x.dtype)


# ---------------------------------------------------------------- FP8 weights


def quantize_weight_fp8(
    weight: Tensor, block: tuple[int, int] = FP8_BLOCK, *, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Matrix (or a stack of them) -> e4m3 codes with one e8m0 scale per block; edge blocks may be smaller than `block`.

    Shapes: weight [..., out, in] -> codes [..., out, in] float8_e4m3fn, scale [..., ceil(out/128), ceil(in/128)]
    float8_e8m0fnu. Scale rule: as for activations, over the block; `scale` gives other ones (fp32 or e8m0).
    """
    blocks = split_blocks(weight, block)
    factors = fp8_scale(blocks.abs().amax(dim=(-3, -1))) if scale is None else _scale_values(scale)
    codes = (blocks / factors[..., :, None, :, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return join_blocks(codes, weight.shape[-2:]).contiguous(), encode_e8m0(factors)


def dequantize_weight_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """codes [..., out, in] e4m3 times its block's scale -> fp32 [..., out, in].

    `scale` [..., ceil(out/128), ceil(in/128)] is e8m0 (bytes or float8_e8m0fnu) or fp32, as in base checkpoints.
    Although some files call it `weight_scale_inv` it is multiplied.
    Raises: CheckpointError when the scale's shape does not fit.
    """
    rows, columns = block
    *stack, out, width = codes.shape
    _expect_scale_shape(
        scale, (*stack, -(-out // rows), -(-width // columns)), codes, f"one per {rows} x {columns} block"
    )
    return codes.float() * _spread(_scale_values(scale), block)[..., :out, :width]


# ---------------------------------------------------------------- FP4 weights


def pack_fp4(values: Tensor) -> Tensor:
    """e2m1 values [..., C] (C even) -> int8 bytes [..., C/2]: channel 2j in the low nibble, 2j+1 in the high
    one.

    Raises: ConfigError for an odd C. A value that is not one of the sixteen is rounded first.
    """
    if values.shape[-1] % 2:
        raise ConfigError(
            f"FP4 row of {values.shape[-1]} channels: two channels share a byte, so an odd row cannot be "
            "packed. Pad the row with a zero channel."
        )
    exact = round_e2m1(values)
    table = torch.tensor(FP4_VALUES[:8], device=values.device)
    code = torch.bucketize(exact.abs(), table).to(torch.uint8)
    code = code | (torch.signbit(exact).to(torch.uint8) << 3)
    return (code[..., 0::2] | (code[..., 1::2] << 4)).view(torch.int8)


def unpack_fp4(packed: Tensor) -> Tensor:
    """int8 or uint8 bytes [..., C/2] -> e2m1 values [..., C] in fp32, low nibble first."""
    if packed.dtype not in (torch.int8, torch.uint8):
        raise ConfigError(
            f"packed FP4 has dtype {packed.dtype}; two codes share a byte, so only int8 or uint8 can hold "
            "them. Pass the tensor as it is stored."
        )
    byte = packed.contiguous().view(torch.uint8)  # unsigned before shifting, or the sign would be smeared
    table = torch.tensor(FP4_VALUES, device=packed.device)
    both = torch.stack((byte & 15, byte >> 4), dim=-1).flatten(-2)
    return table[both.long()]


def fp4_weight_scale(weight: Tensor, group: int = FP4_GROUP) -> Tensor:
    """Scales of FP4 weights [..., out, in]: fp32 powers of two [..., out, ceil(in/group)].

    The rule is that of activations, then scales smaller than 1/2^11 of the largest in their 128 x 128 block are
    raised to that (those groups lose resolution), so that `recast_fp4_to_fp8` is lossless.
    """
    scale = fp4_scale(split_groups(weight, group).abs().amax(-1))
    block = (FP8_BLOCK[0], FP8_BLOCK[1] // group)
    floor = split_blocks(scale, block).amax(dim=(-3, -1)) / FP4_SCALE_RATIO
    return torch.maximum(scale, _spread(floor, block)[..., : scale.shape[-2], : scale.shape[-1]])


def quantize_weight_fp4(
    weight: Tensor, group: int = FP4_GROUP, *, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Matrix (or a stack of them) -> packed e2m1 with one e8m0 scale per row and `group` input channels.

    Shapes: weight [..., out, in] -> packed [..., out, in/2] int8, scale [..., out, ceil(in/group)]
    float8_e8m0fnu. Scale rule: `fp4_weight_scale`; `scale` gives other ones (fp32 or e8m0).
    """
    factors = fp4_weight_scale(weight, group) if scale is None else _scale_values(scale)
    values = round_e2m1(split_groups(weight, group) / factors[..., None])
    return pack_fp4(join_groups(values, weight.shape[-1])), encode_e8m0(factors)


def dequantize_weight_fp4(packed: Tensor, scale: Tensor, group: int = FP4_GROUP) -> Tensor:
    """packed [..., out, in/2] int8 times its group's scale -> fp32 [..., out, in].

    `scale` [..., out, ceil(in/group)] is e8m0 (bytes or float8_e8m0fnu) or fp32.
    Raises: CheckpointError when the scale's shape does not fit.
    """
    values = unpack_fp4(packed)
    wanted = (*values.shape[:-1], -(-values.shape[-1] // group))
    _expect_scale_shape(scale, wanted, packed, f"one per row and {group} channels")
    return dequantize_groups(values, _scale_values(scale), group)


def recast_fp4_to_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """FP4 weights with 1 x 32 scales -> the same values as FP8 with 128 x 128 scales, nothing lost.

    Shapes: packed [..., out, in/2], scale [..., out, ceil(in/32)] -> codes [..., out, in] float8_e4m3fn, scale
    [..., ceil(out/128), ceil(in/128)] float8_e8m0fnu. The block's scale is the largest FP4 scale in it over 2^6, so
    the largest code is 6 * 2^6 = 384 and the differences between FP4 scales move into e4m3's exponent.
    Raises: CheckpointError when scales within a block differ by more than 2^14 where values are not zero.
    """
    block = (FP8_BLOCK[0], FP8_BLOCK[1] // FP4_GROUP)
    values, fine = unpack_fp4(packed), _scale_values(scale)
    used = split_groups(values, FP4_GROUP).any(-1)
    coarse = (split_blocks(fine, block).amax(dim=(-3, -1)) / 2.0**6).clamp_(min=2.0**-126)
    relative = fine / _spread(coarse, block)[..., : fine.shape[-2], : fine.shape[-1]]
    if bool((used & (relative < 2.0**6 / FP8_SCALE_RATIO)).any()):
        raise CheckpointError(
            "FP4 scales within one 128 x 128 block differ by more than 2^14, so FP8 cannot hold all of its values "
            "under one scale. Keep this weight in FP4 or bf16, or quantise it again with quantize_weight_fp4."
        )
    codes = dequantize_groups(values, relative, FP4_GROUP).to(torch.float8_e4m3fn)
    return codes, encode_e8m0(coarse)


# ---------------------------------------------------------------- shared pieces


def split_groups(x: Tensor, group: int) -> Tensor:
    """[..., C] -> fp32 [..., ceil(C/group), group]; zeros fill the last group (they never raise its amax)."""
    if group < 1:
        raise ConfigError(f"group size {group} is not positive; channels cannot be grouped. Use 128, 64 or 32.")
    short = -x.shape[-1] % group
    padded = functional.pad(x.float(), (0, short)) if short else x.float()
    return padded.unflatten(-1, (-1, group))


def join_groups(grouped: Tensor, width: int) -> Tensor:
    """Inverse of `split_groups`; `width` is C."""
    return grouped.flatten(-2)[..., :width].contiguous()


def split_blocks(x: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """[..., R, C] -> fp32 [..., ceil(R/rows), rows, ceil(C/columns), columns]; zeros fill the edge blocks."""
    short = (0, -x.shape[-1] % block[1], 0, -x.shape[-2] % block[0])
    padded = functional.pad(x.float(), short) if any(short) else x.float()
    return padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))


def join_blocks(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `split_blocks`; `shape` is (R, C)."""
    return blocks.flatten(-4, -3).flatten(-2)[..., : shape[0], : shape[1]]


def _spread(per_block: Tensor, block: tuple[int, int]) -> Tensor:
    """One value per block [..., r, c] -> one per element [..., r * rows, c * columns]."""
    return per_block.repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)


def _scale_values(scale: Tensor) -> Tensor:
    return scale if scale.dtype == torch.float32 else decode_e8m0(scale)


def _expect_scale_shape(scale: Tensor, wanted: tuple[int, ...], codes: Tensor, rule: str) -> None:
    if tuple(scale.shape) != wanted:
        raise CheckpointError(
            f"scales have shape {tuple(scale.shape)} but weight codes {tuple(codes.shape)} need {wanted} "
            f"({rule}), so values and scales cannot be matched. Check that both tensors come from the same "
            "checkpoint."
        )
