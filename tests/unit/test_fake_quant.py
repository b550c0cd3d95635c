"""Fake quantisers against values worked out by hand, the recast of FP4 to FP8, and where gradients go."""

import pytest
import torch

from rorqual.errors import CheckpointError
from rorqual.ops import quant
from rorqual.ops.experts import grouped_experts
from rorqual.ops.fake_quant import (
    PIECE_ELEMENTS,
    fake_fp4_weight,
    fake_fp8_input,
    fake_fp8_weight,
    rounded_weight,
    straight_through,
)
from rorqual.ops.rounded_experts import rounded_experts

torch.set_num_threads(1)


def test_fp4_weight_by_hand():
    weight = torch.zeros(2, 64)
    weight[0, :5] = torch.tensor([5.0, -0.25, 0.26, 4.9, 0.2])  # scale 1
    weight[0, 32:35] = torch.tensor([6.01, 2.5, -0.4])  # scale 2
    weight[1, 0] = 0.75  # scale 1/8, exactly its largest value
    rounded = fake_fp4_weight(weight)
    assert rounded[0, :5].tolist() == [4.0, 0.0, 0.5, 4.0, 0.0]
    assert torch.signbit(rounded[0, 1])
    assert rounded[0, 32:35].tolist() == [6.0, 2.0, 0.0]  # 3.005 -> 3, 1.25 -> 1 (even), -0.2 -> -0
    assert rounded[1, 0] == 0.75 and rounded[1, 1:].count_nonzero() == 0


def test_fp8_weight_by_hand_with_ragged_edges():
    weight = torch.zeros(130, 129)
    weight[0, :3] = torch.tensor([448.0, 17.0, 19.0])  # scale 1: ties of 16, 18, 20 go to 16 and 20
    weight[129, 0], weight[0, 128] = 1.0, 449.0
    rounded = fake_fp8_weight(weight)
    assert rounded[0, :3].tolist() == [448.0, 16.0, 20.0]
    assert rounded[129, 0] == 1.0 and rounded[0, 128] == 448.0


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
@pytest.mark.parametrize("shape", [(3, 40, 96), (7, 300), (1, 2), (300, 2 * PIECE_ELEMENTS // 128)])
def test_simulated_values_are_the_stored_ones(kind, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    quantize, dequantize = {
        "fp4": (quant.quantize_weight_fp4, quant.dequantize_weight_fp4),
        "fp8": (quant.quantize_weight_fp8, quant.dequantize_weight_fp8),
    }[kind]
    rounded = rounded_weight(weight, kind)
    assert torch.equal(rounded.view(torch.int32), dequantize(*quantize(weight)).view(torch.int32))
    assert torch.equal(rounded_weight(weight.double(), kind), rounded.double())
    exact = weight.bfloat16()
    assert torch.equal(rounded_weight(exact, kind).float(), rounded_weight(exact.float(), kind))


def test_gradients_pass_as_if_nothing_were_rounded():
    for fake, shape in ((fake_fp4_weight, (2, 8, 64)), (fake_fp8_weight, (130, 40)), (fake_fp8_input, (5, 200))):
        exact = torch.nn.Parameter(torch.randn(shape))
        outside = torch.randn(shape)
        rounded = fake(exact)
        assert not torch.equal(rounded, exact)
        (rounded * outside).sum().backward()
        assert torch.equal(exact.grad, outside)
        with torch.no_grad():
            assert torch.equal(fake(exact), rounded) and not fake(exact).requires_grad


def test_straight_through_gives_the_rounded_bits():
    exact = torch.tensor([1e8, -0.3, 1.0], requires_grad=True)
    rounded = torch.tensor([1.0, -0.0, 3.0])  # 1e8 + (1 - 1e8) would be 0 in fp32
    assert torch.equal(straight_through(exact, rounded).view(torch.int32), rounded.view(torch.int32))


# ---------------------------------------------------------------- FP4 to FP8


def blocks_with_scales(exponents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of FP4 weights that holds every value in every group; group g has scale 2^exponents[g]."""
    values = torch.tensor(quant.FP4_VALUES).repeat(2 * len(exponents))[None]
    return quant.pack_fp4(values), torch.tensor([exponents], dtype=torch.float32).exp2()


@pytest.mark.parametrize("exponents", [[0, -11, -3, 0], [-5, -5, 3, -8], [0, -14, 0, 0], [100, 90, 95, 89], [-126] * 4])
def test_recast_to_fp8_loses_nothing(exponents):
    packed, scale = blocks_with_scales(exponents)
    codes, coarse = quant.recast_fp4_to_fp8(packed, scale)
    restored = quant.dequantize_weight_fp8(codes, coarse)
    assert coarse.shape == (1, 1)
    assert torch.equal(restored.view(torch.int32), quant.dequantize_weight_fp4(packed, scale).view(torch.int32))
    if max(exponents) > -120:
        assert quant.decode_e8m0(coarse).item() == 2.0 ** (max(exponents) - 6)
        assert codes.float().abs().max() == 384  # 6 * 2^6


def test_recast_refuses_scales_too_far_apart_unless_only_zeros_are_lost():
    packed, scale = blocks_with_scales([0, -15, 0, 0])
    with pytest.raises(CheckpointError, match="differ by more than 2\\^14"):
        quant.recast_fp4_to_fp8(packed, scale)
    packed[:, 16:32] = 0
    codes, coarse = quant.recast_fp4_to_fp8(packed, scale)
    assert torch.equal(quant.dequantize_weight_fp8(codes, coarse), quant.dequantize_weight_fp4(packed, scale))


def test_small_scales_of_a_block_are_raised_and_only_those():
    weight = torch.zeros(256, 256)
    weight[0, 0] = 6.0  # scale 1 in the first block
    weight[5, 40] = 6 * 2.0**-11  # at the limit: kept
    weight[6, 70] = 6 * 2.0**-12  # below: raised to 2^-11, so 3 * 2^-11 is stored
    weight[7, 100] = 0.2 * 2.0**-11  # rounds to zero under the raised scale
    weight[200, 200] = 2.0**-30  # another block: nothing to raise it to
    scale = quant.fp4_weight_scale(weight)
    assert scale[0, 0] == 1 and scale[5, 1] == 2.0**-11 and scale[6, 2] == 2.0**-11 and scale[100, 3] == 2.0**-11
    assert scale[200, 6] == 2.0**-32 and scale[0, 4] == 2.0**-126
    rounded = rounded_weight(weight, "fp4")
    assert rounded[5, 40] == weight[5, 40] and rounded[6, 70] == weight[6, 70] and rounded[7, 100] == 0
    assert rounded[200, 200] == weight[200, 200]
    codes, coarse = quant.recast_fp4_to_fp8(*quant.quantize_weight_fp4(weight))
    assert torch.equal(quant.dequantize_weight_fp8(codes, coarse), rounded)


# ---------------------------------------------------------------- experts that read FP8


def routed(num_tokens: int, width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_tokens, width, generator=generator)
    experts = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, 2, generator=generator)
    shapes = ((5, 48, width), (5, 48, width), (5, width, 48))
    return (x, experts, weights, *(torch.randn(s, generator=generator) * 0.2 for s in shapes))


def test_rounded_experts_are_grouped_experts_but_for_the_rounding(monkeypatch):
    x, experts, weights, *matrices = routed(9, 130)
    trained = [t.clone().requires_grad_() for t in (x, weights, *matrices)]
    plain = [t.clone().requires_grad_() for t in (x, weights, *matrices)]
    monkeypatch.setattr("rorqual.ops.rounded_experts.fake_fp8_input", lambda value: value)
    y = rounded_experts(trained[0], experts, *trained[1:], 1.0)
    expected = grouped_experts(plain[0], experts, *plain[1:], 1.0)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    outside = torch.randn(y.shape)
    y.backward(outside)
    expected.backward(outside)
    for ours, theirs in zip(trained, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_rounded_experts_round_both_inputs():
    x, experts, weights, *matrices = routed(6, 130)
    y = rounded_experts(x, experts, weights, *matrices, 0.0)
    w1, w3, w2 = matrices
    expected = torch.zeros_like(x)
    for t in range(len(x)):
        for e, g in sorted(zip(experts[t].tolist(), weights[t], strict=True), key=lambda pair: pair[0]):
            inputs = quant.round_act_fp8(x[t])
            hidden = torch.nn.functional.silu(w1[e] @ inputs) * (w3[e] @ inputs) * g
            expected[t] += w2[e] @ quant.round_act_fp8(hidden)
    # an ulp before a rounding can change a code, by 1/16 of a value: compare on the whole
    assert (y - expected).norm() < 0.01 * expected.norm()
    assert (y - grouped_experts(x, experts, weights, *matrices, 0.0)).norm() > 0.005 * expected.norm()
