"""What must hold of every simulated weight, whatever its shape and numbers: zeros, denormals, huge spreads."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.checkpoint.packed import pack, scale_shape, unpack
from rorqual.ops import quant
from rorqual.ops.fake_quant import fake_fp4_weight, fake_fp8_weight, rounded_weight

torch.set_num_threads(1)


@st.composite
def matrices(draw, *, even: bool = True) -> torch.Tensor:
    """[out, in] or [E, out, in]: normal numbers; elements, rows and columns scaled by powers of two; zero groups."""
    stack = draw(st.sampled_from([(), (2,)]))
    rows, width = draw(st.integers(1, 260)), draw(st.integers(1, 150)) * (2 if even else 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(*stack, rows, width, generator=generator, dtype=torch.float64)
    for shape, most in (((rows, width), 6), ((rows, 1), 20), ((1, width), 20)):
        spread = draw(st.integers(0, most))
        weight = weight * 2.0 ** torch.randint(-spread, spread + 1, shape, generator=generator)
    weight = weight * 2.0 ** draw(st.integers(-150, 70))  # down to fp32 denormals
    zeros = torch.rand(*stack, rows, (width + 31) // 32, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    return weight.float().masked_fill(zeros.repeat_interleave(32, -1)[..., :width], 0.0)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_fp4_weights(weight: torch.Tensor):
    packed, scale = quant.quantize_weight_fp4(weight)
    rounded = rounded_weight(weight, "fp4")
    assert torch.equal(bits(rounded), bits(quant.dequantize_weight_fp4(packed, scale)))
    assert torch.equal(rounded.abs() + 0.0, rounded_weight(rounded, "fp4").abs())  # what is rounded stays
    factors = quant.decode_e8m0(scale)
    step = factors.repeat_interleave(32, -1)[..., : weight.shape[-1]]
    assert bool((weight.abs() <= 6 * step).all())  # nothing saturates
    assert bool(((weight - rounded).abs() <= torch.maximum(weight.abs() / 4, step / 4)).all())
    # the path over FP8 loses nothing, and all of it is normal
    codes, coarse = quant.recast_fp4_to_fp8(packed, scale)
    assert torch.equal(quant.dequantize_weight_fp8(codes, coarse), rounded)
    nonzero = codes.float().abs()
    if float(factors.max()) > 2.0**-110:
        assert bool(((nonzero == 0) | (nonzero >= 2.0**-6)).all())


@settings(max_examples=60, deadline=None)
@given(matrices(even=False))
def test_fp8_weights(weight: torch.Tensor):
    codes, scale = quant.quantize_weight_fp8(weight)
    assert scale.shape == scale_shape(tuple(weight.shape), "fp8")
    rounded = rounded_weight(weight, "fp8")
    assert torch.equal(bits(rounded), bits(quant.dequantize_weight_fp8(codes, scale)))
    assert torch.equal(rounded, rounded_weight(rounded, "fp8"))
    assert torch.equal(rounded, rounded.bfloat16().float())
    step = quant.decode_e8m0(scale).repeat_interleave(128, -2).repeat_interleave(128, -1)
    step = step[..., : weight.shape[-2], : weight.shape[-1]]
    assert bool(((weight - rounded).abs() <= torch.maximum(weight.abs() / 16, step * 2.0**-10)).all())
    alone = [rounded_weight(matrix, "fp8") for matrix in weight.reshape(-1, *weight.shape[-2:])]
    assert torch.equal(rounded, torch.stack(alone).view_as(weight))  # matrices of a stack do not see each other


@settings(max_examples=40, deadline=None)
@given(matrices(), st.sampled_from(["fp4", "fp8"]))
def test_packing_what_was_unpacked_keeps_every_byte(weight: torch.Tensor, kind: str):
    matrix = weight.reshape(-1, weight.shape[-1])
    codes, scale = pack(matrix, kind)
    value = unpack(codes, scale)
    again, same_scale = pack(value, kind, scale)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(same_scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(unpack(*pack(value, kind)), value)  # without the scales: the same numbers
    other, other_scale = pack(matrix, kind, scale)  # scales that do not hold a value exactly are not kept
    assert torch.equal(unpack(other, other_scale), value)


@settings(max_examples=20, deadline=None)
@given(matrices())
def test_gradients_do_not_see_the_rounding(weight: torch.Tensor):
    outside = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for fake in (fake_fp4_weight, fake_fp8_weight):
        master = torch.nn.Parameter(weight)
        (fake(master) * outside).sum().backward()
        assert torch.equal(master.grad, outside)
        master.grad = None
