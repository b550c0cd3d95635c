"""FP8 e4m3 and FP4 e2m1 against torch's float8 and ml_dtypes: every code, every halfway case, what is not finite."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from rorqual.ops import quant

ONE = torch.tensor(127, dtype=torch.uint8)
"""e8m0 of the scale 1."""


def e4m3_of(x: Tensor) -> Tensor:
    """Codes by ml_dtypes, as bytes."""
    return torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def e2m1_of(x: Tensor) -> Tensor:
    """Codes by ml_dtypes, one a byte."""
    return torch.from_numpy(x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def unpacked(packed: Tensor) -> Tensor:
    """The codes of packed FP4, one a byte, low nibble first."""
    byte = packed.view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), -1).flatten(-2)


def around(values: Tensor) -> Tensor:
    """The numbers of a list, those halfway between neighbours, and one step of fp32 to either side of each."""
    ordered = values.unique()
    points = torch.cat([ordered, (ordered[1:] + ordered[:-1]) / 2])
    big = torch.tensor(torch.inf)
    return torch.cat([points, torch.nextafter(points, big), torch.nextafter(points, -big)])


def test_all_256_codes_of_e4m3_are_read_alike():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    found = quant.dequantize_weight_fp8(codes.view(torch.float8_e4m3fn), ONE.view(1, 1))
    other = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    for wanted in (codes.view(torch.float8_e4m3fn).float(), other):
        assert torch.equal(
            found.view(torch.int32).eq(wanted.view(torch.int32)) | wanted.isnan(), torch.ones(2, 128) > 0
        )
        assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().sum() == 2 and bool(found[0, 127].isnan()) and bool(found[1, 127].isnan())  # 0x7F, 0xFF
    assert found.nan_to_num(0).abs().max() == 448  # no infinities


def test_all_16_codes_of_e2m1_are_read_alike_in_both_nibbles():
    packed = torch.arange(256, dtype=torch.uint8)[None]
    found = quant.unpack_fp4(packed)
    wanted = torch.from_numpy(unpacked(packed).numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))  # signs of zeros too
    assert len(found.view(torch.int32).unique()) == 16


@pytest.mark.parametrize("seed", range(3))
def test_e4m3_codes_are_those_of_others(seed: int):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = around(every[every.isfinite()])
    random = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * 2.0 ** (4 * seed - 6)
    for numbers in (halfway, random, random.bfloat16().float(), torch.tensor([0.0, -0.0, 1e-30, -1e-30])):
        inside = numbers.clamp(
            -quant.FP8_MAX, quant.FP8_MAX
        )  # beyond it e4m3fn has only NaN: the rule is to clamp first
        scales = torch.ones(1, -(-len(numbers) // 128))
        codes = quant.quantize_weight_fp8(numbers[None], scale=scales)[0].view(torch.uint8)[0]
        assert torch.equal(codes, e4m3_of(inside))
        assert torch.equal(codes, inside.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("seed", range(3))
def test_e2m1_codes_are_those_of_another(seed: int):
    halfway = around(torch.tensor(quant.FP4_VALUES))
    random = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * 2.0 ** (2 * seed - 1)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6.5, -7.0, 1e30, -1e30, torch.inf, -torch.inf])
    for numbers in (halfway, random, random.bfloat16().float(), special):
        even = torch.nn.functional.pad(numbers, (0, len(numbers) % 2))
        assert torch.equal(unpacked(quant.pack_fp4(even)), e2m1_of(even))
        rounded = torch.from_numpy(even.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
        assert torch.equal(quant.round_e2m1(even).view(torch.int32), rounded.view(torch.int32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(bad: float):
    """e4m3 and e2m1 have no infinity and e2m1 no NaN: the scale byte 255 says it for the group."""
    weight = torch.ones(256, 256)
    weight[3, 200] = bad
    codes, scale = quant.quantize_weight_fp8(weight)
    assert scale.view(torch.uint8).tolist() == [[127 - 8, 255], [127 - 8, 127 - 8]]
    found = quant.dequantize_weight_fp8(codes, scale)
    assert found[:128, 128:].isnan().all() and found.isnan().sum() == 128 * 128
    values, scales = quant.quantize_act_fp4(weight)
    back = quant.dequantize_groups(values, scales, 32)
    assert back[3, 192:224].isnan().all() and back.isnan().sum() == 32
    acts, scales = quant.quantize_act_fp8(weight)
    back = quant.dequantize_groups(acts, scales)
    assert back[3, 128:].isnan().all() and back.isnan().sum() == 128


def test_scales_are_those_of_another():
    """e8m0 against ml_dtypes: every byte, and the least power of two that is not below a number."""
    every = torch.arange(256, dtype=torch.uint8)
    wanted = torch.from_numpy(every.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    found = quant.decode_e8m0(every)
    assert torch.equal(found[:255], wanted[:255]) and bool(found[255].isnan()) and bool(wanted[255].isnan())
    numbers = torch.rand(1000, generator=torch.Generator().manual_seed(1)).exp2() * 2.0 ** torch.arange(-50, 50).repeat(
        10
    )
    least = torch.tensor([2.0 ** int(np.ceil(np.log2(x))) for x in numbers.double().tolist()])
    assert torch.equal(quant.power_of_two_ceil(numbers), least)
