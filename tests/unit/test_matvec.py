"""Products with packed weights: against exact sums, one row against many, and experts made of them."""

import math

import pytest
import torch
from torch import Tensor

from rorqual.errors import CheckpointError, ConfigError
from rorqual.ops import packed_weight, quant
from rorqual.ops.matvec import packed_linear, packed_linear_reference
from rorqual.ops.native import load
from rorqual.ops.packed_experts import packed_experts, packed_experts_reference
from rorqual.ops.packed_weight import FORMATS, PackedFormat, from_codes, pack

needs_compiler = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")
DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def spread(*shape: int) -> Tensor:
    """Rows and columns of different magnitude, so that a scale in the wrong place shows."""
    rows = 2.0 ** (torch.arange(shape[-2]) % 7 - 3)
    columns = 2.0 ** (torch.arange(shape[-1]) // 32 % 5 - 2)
    return randn(*shape) * rows[:, None] * columns


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), [(40, 256), (7, 128), (33, 96), (130, 200), (5, 34), (3, 1030)])
@needs_compiler
def test_products_are_exact_up_to_rounding(kind: PackedFormat, dtype: torch.dtype, out: int, width: int) -> None:
    """Against sums in fp64 of the dequantised weights, for few rows and for many."""
    weight, x = pack(spread(out, width), kind), randn(61, width).to(dtype)
    numbers = weight.dequantise().double()
    wanted, scale = x.double() @ numbers.T, x.double().abs() @ numbers.abs().T
    for rows in (1, 3, 61):
        found = packed_linear(x[:rows], weight)
        assert found.dtype == dtype and found.shape == (rows, out)
        rounding = wanted[:rows].abs() * 2.0**-8 if dtype == torch.bfloat16 else 0.0
        assert ((found.double() - wanted[:rows]).abs() <= 1e-6 * scale[:rows] + rounding).all()
        reference = packed_linear_reference(x[:rows], weight).double()
        assert ((reference - wanted[:rows]).abs() <= 3e-6 * scale[:rows] + rounding).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@needs_compiler
def test_a_row_does_not_depend_on_the_others(kind: PackedFormat, dtype: torch.dtype) -> None:
    """The same bits alone, among few (unpacked in registers), among many (unpacked in cache), with 1 or 2 threads."""
    weight, x = pack(spread(70, 2400), kind), randn(101, 2400).to(dtype)
    together = packed_linear(x, weight)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for first, last in [(0, 1), (1, 3), (3, 6), (6, 11), (11, 19), (19, 28), (28, 101), (100, 101)]:
                assert torch.equal(packed_linear(x[first:last], weight), together[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp4"])
@needs_compiler
def test_sums_that_are_exact_have_one_value(kind: PackedFormat) -> None:
    """Whole numbers: whatever the order of additions, and in fp32 and bf16, the result is the integer."""
    weight = pack(torch.randint(-6, 7, (20, 320)).float().clamp(-4, 4), kind)
    x = torch.randint(-3, 4, (9, 320)).float()
    wanted = x @ weight.dequantise().T
    if kind != "int8":
        assert torch.equal(packed_linear(x, weight), wanted)
        assert torch.equal(packed_linear(x.bfloat16(), weight), wanted.bfloat16())
    else:
        assert torch.allclose(packed_linear(x, weight), wanted, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@needs_compiler
def test_every_code_is_read_right(dtype: torch.dtype) -> None:
    """Unit vectors pick single weights out: all 256 codes of FP8 and INT8, all 16 of FP4 in both nibbles."""
    one = torch.eye(512, dtype=dtype)
    bytes_ = torch.arange(256, dtype=torch.uint8).repeat(1, 2)
    fp8 = from_codes(bytes_.view(torch.float8_e4m3fn), torch.full((1, 4), 2.0))
    int8 = from_codes(bytes_.view(torch.int8), torch.tensor([0.5]), is_int8=True)
    fp4 = from_codes(bytes_[:, :256], torch.arange(120, 136, dtype=torch.uint8)[None])
    for weight in (fp8, int8, fp4):
        numbers = weight.dequantise()
        broken = numbers.isnan().any()  # a NaN meets every row as 0 * NaN
        rows = packed_linear(one, weight)[:, 0]
        if broken:
            assert rows.isnan().all()
            numbers = numbers.nan_to_num(0.0)
            codes = torch.where(bytes_ & 0x7F == 0x7F, 0, bytes_)
            rows = packed_linear(one, from_codes(codes.view(torch.float8_e4m3fn), torch.full((1, 4), 2.0)))[:, 0]
        assert torch.equal(rows, numbers[0].to(dtype))


@needs_compiler
def test_scales_at_the_ends_of_their_range() -> None:
    """e8m0 bytes 0 (a subnormal), 254 and 255 (NaN) of single groups."""
    codes = pack(torch.full((4, 128), 1.0), "fp4").codes
    scale = torch.full((4, 4), 127, dtype=torch.uint8)
    scale[0, 1], scale[1, 3], scale[2, 2] = 0, 254, 255
    weight = from_codes(codes, scale)
    x = torch.ones(1, 128)
    for rows in (1, 9):
        found = packed_linear(x.expand(rows, -1), weight)[0]
        wanted = weight.dequantise().sum(-1)
        assert found[2].isnan() and torch.equal(found[[0, 1, 3]], wanted[[0, 1, 3]])
    lone = torch.zeros(1, 128)
    lone[0, 40] = 1.0
    scale[2, 2] = 127
    assert packed_linear(lone, from_codes(codes, scale))[0, 0] == codes_value(weight) * 2.0**-127


def codes_value(weight: packed_weight.PackedWeight) -> float:
    return float(quant.unpack_fp4(weight.codes)[0, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@needs_compiler
def test_activations_that_are_not_finite_show_in_their_row_only(bad: float) -> None:
    weight, x = pack(spread(12, 160).abs() + 0.5, "fp4"), randn(10, 160)
    x[4, 7] = bad
    found = packed_linear(x, weight)
    assert not found[4].isfinite().any()
    assert found[[0, 1, 2, 3, 5, 9]].isfinite().all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "inner", "limit"), [(64, 96, 10.0), (50, 34, 0.0)])
@needs_compiler
def test_experts(kind: PackedFormat, dtype: torch.dtype, d: int, inner: int, limit: float) -> None:
    """Against `experts_reference` on the dequantised weights, tokens that share experts and tokens that do not."""
    x = randn(40, d).to(dtype)
    w1, w3 = (pack(randn(6, inner, d, seed=s) / d**0.5 * 3, kind) for s in (1, 2))
    w2 = pack(randn(6, d, inner, seed=3) / inner**0.5, kind)
    chosen = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i))[:3] for i in range(40)])
    weights = randn(40, 3).softmax(-1)
    wanted = packed_experts_reference(x, chosen, weights, w1, w3, w2, limit)
    found = packed_experts(x, chosen, weights, w1, w3, w2, limit)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == torch.float32 and ((found - wanted).abs().max() / wanted.abs().max()) < tolerance
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for first, last in [(0, 1), (1, 4), (4, 40)]:
                rows = slice(first, last)
                alone = packed_experts(x[rows], chosen[rows], weights[rows], w1, w3, w2, limit)
                assert torch.equal(alone, found[rows])
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_an_expert_listed_twice_adds_up() -> None:
    x, chosen, weights = randn(2, 32), torch.tensor([[1, 1], [0, 1]]), torch.tensor([[0.25, 0.5], [0.5, 0.5]])
    w1, w3, w2 = (
        pack(randn(2, 32, 32), "fp4"),
        pack(randn(2, 32, 32, seed=1), "fp4"),
        pack(randn(2, 32, 32, seed=2), "fp4"),
    )
    found = packed_experts(x, chosen, weights, w1, w3, w2, 0.0)
    once = packed_experts(x[:1], chosen[:1, :1], weights[:1].sum(-1, keepdim=True), w1, w3, w2, 0.0)
    assert torch.allclose(found[:1], once, rtol=1e-5, atol=1e-5)
    assert packed_experts(x[:0], chosen[:0], weights[:0], w1, w3, w2, 0.0).shape == (0, 32)


def test_packing_rounds_as_the_formats_say() -> None:
    weight = spread(3, 64, 256)
    assert torch.equal(
        pack(weight, "fp4").dequantise(), quant.dequantize_weight_fp4(*quant.quantize_weight_fp4(weight))
    )
    assert torch.equal(
        pack(weight, "fp8").dequantise(), quant.dequantize_weight_fp8(*quant.quantize_weight_fp8(weight))
    )
    assert torch.equal(pack(weight, "bf16").dequantise(), weight.bfloat16().float())
    assert torch.equal(pack(weight, "fp32").dequantise(), weight)
    rows = pack(weight, "int8").dequantise()
    assert ((rows - weight).abs() <= weight.abs().amax(-1, keepdim=True) / 127 / 2 * 1.0001).all()
    assert torch.equal(pack(weight, "fp4")[1].dequantise(), pack(weight, "fp4").dequantise()[1])


def test_int8_rows_of_zeros_and_of_numbers_that_are_not_finite() -> None:
    weight = torch.ones(3, 4)
    weight[1], weight[2, 1] = 0.0, math.inf
    found = pack(weight, "int8").dequantise()
    assert torch.allclose(found[0], torch.ones(4)) and torch.equal(found[1], torch.zeros(4)) and found[2].isnan().all()


def test_bytes_at_the_released_size() -> None:
    """One FP4 expert matrix of V4-Flash: 4 bits and an eighth of a byte in scales for every 16 values."""
    weight = from_codes(torch.zeros(2048, 2048, dtype=torch.int8), torch.zeros(2048, 128, dtype=torch.uint8))
    assert weight.shape == (2048, 4096) and weight.nbytes == 2048 * (2048 + 128)


def test_refusals() -> None:
    with pytest.raises(CheckpointError, match=r"scales have shape \(2, 2\) but fp4 codes \(2, 16\) need \(2, 1\)"):
        from_codes(torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="weight format 'fp6' is not one of"):
        pack(torch.zeros(2, 2), "fp6")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="w1, w3 and w2 are in fp4, fp8 and fp4"):
        stacks = [pack(torch.zeros(1, 32, 32), kind) for kind in ("fp4", "fp8", "fp4")]  # type: ignore[arg-type]
        packed_experts(torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), *stacks, 0.0)
