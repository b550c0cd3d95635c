"""What must hold of every FP8 and FP4 rounding, whatever the numbers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.ops import quant

torch.set_num_threads(1)


@st.composite
def activations(draw) -> torch.Tensor:
    """Rows of normal numbers, each channel scaled by a power of two, some of them zero."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(rows, width, generator=generator)
    spread = draw(st.integers(0, 12))
    x = x * 2.0 ** torch.randint(-spread, spread + 1, (rows, width), generator=generator)
    x = x * 2.0 ** draw(st.integers(-30, 30))
    return torch.where(torch.rand(rows, width, generator=generator) < 0.2, 0.0, x)


def per_channel(scale: torch.Tensor, group: int, width: int) -> torch.Tensor:
    return scale.repeat_interleave(group, -1)[..., :width]


@settings(max_examples=60, deadline=None)
@given(activations(), st.sampled_from([32, 64, 128]))
def test_fp8_rounding(x: torch.Tensor, group: int):
    once = quant.round_act_fp8(x, group)
    assert torch.equal(once, quant.round_act_fp8(once, group))  # what is rounded stays
    assert torch.equal(once, once.bfloat16().float())  # and is exact in bf16
    assert torch.equal(quant.round_act_fp8(-x, group), -once)
    step = per_channel(quant.quantize_act_fp8(x, group)[1], group, x.shape[-1])
    # half a unit of a 3-bit mantissa, or half the subnormal step
    assert bool(((x - once).abs() <= torch.maximum(x.abs() / 16, step * 2.0**-10)).all())


@settings(max_examples=60, deadline=None)
@given(activations(), st.sampled_from([16, 32]))
def test_fp4_rounding(x: torch.Tensor, group: int):
    once = quant.round_act_fp4(x, group)
    assert torch.equal(once, once.bfloat16().float())
    assert torch.equal(quant.round_act_fp4(-x, group), -once)
    # a group whose largest value was rounded down to a power-of-two times 4 keeps it; the grid only gets
    # finer
    assert torch.equal(once, quant.round_act_fp4(once, group))
    step = per_channel(quant.quantize_act_fp4(x, group)[1], group, x.shape[-1])
    assert bool(((x - once).abs() <= torch.maximum(x.abs() / 4, step / 4)).all())


@settings(max_examples=40, deadline=None)
@given(activations())
def test_weights_come_back_within_the_format_and_requantise_to_themselves(x: torch.Tensor):
    even = x[:, : x.shape[1] // 2 * 2] if x.shape[1] > 1 else x.repeat(1, 2)
    for pack, unpack in (
        (quant.quantize_weight_fp8, quant.dequantize_weight_fp8),
        (quant.quantize_weight_fp4, quant.dequantize_weight_fp4),
    ):
        restored = unpack(*pack(even))
        assert restored.shape == even.shape
        assert torch.equal(unpack(*pack(restored)), restored)


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-120, 2.0**120, width=32, allow_subnormal=False))
def test_power_of_two_ceil_is_the_next_power(value: float):
    power = quant.power_of_two_ceil(torch.tensor([value])).item()
    assert power >= value > power / 2
    assert torch.frexp(torch.tensor(power)).mantissa == 0.5
