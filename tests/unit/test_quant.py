"""FP8 and FP4 numerics against values worked out by hand from the formats' definitions."""

import pytest
import torch

from rorqual.errors import CheckpointError, ConfigError
from rorqual.ops import quant


def group_with(amax: float, values: list[float], size: int) -> torch.Tensor:
    """One group of `size` channels: `amax` first, then `values`, then zeros."""
    out = torch.zeros(size)
    out[0] = amax
    out[1 : 1 + len(values)] = torch.tensor(values)
    return out


# ---------------------------------------------------------------- e8m0


def test_e8m0_bytes_are_exponents():
    scale = quant.decode_e8m0(torch.tensor([0, 1, 126, 127, 128, 254], dtype=torch.uint8))
    assert scale.tolist() == [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127]


def test_e8m0_byte_255_is_nan_and_the_other_dtypes_read_the_same_bits():
    stored = torch.tensor([255, 120, 200], dtype=torch.uint8)
    for view in (stored, stored.view(torch.int8), stored.view(torch.float8_e8m0fnu)):
        decoded = quant.decode_e8m0(view)
        assert decoded[0].isnan() and decoded[1:].tolist() == [2.0**-7, 2.0**73]


def test_e8m0_encoding_inverts_decoding_for_every_byte():
    stored = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(quant.encode_e8m0(quant.decode_e8m0(stored)).view(torch.uint8), stored)


@pytest.mark.parametrize("value", [0.0, -1.0, 3.0])
def test_e8m0_refuses_what_a_byte_cannot_hold(value: float):
    with pytest.raises(ConfigError, match=r"is not a power of two .* power_of_two_ceil"):
        quant.encode_e8m0(torch.tensor([1.0, value]))


def test_e8m0_refuses_numbers():
    with pytest.raises(ConfigError, match="a scale is one exponent byte"):
        quant.decode_e8m0(torch.tensor([1.0]))


# ---------------------------------------------------------------- FP8 activations


@pytest.mark.parametrize(
    ("amax", "scale"),
    [(1.0, 2**-8), (0.875, 2**-9), (448.0, 1), (449.0, 2), (896.0, 2), (0.0, 2**-22), (-1.0, 2**-8)],
)
def test_fp8_scale_of_a_group(amax: float, scale: float):
    _, scales = quant.quantize_act_fp8(group_with(amax, [], 128))
    assert scales.tolist() == [scale]


def test_fp8_values_with_amax_one():
    exact = [0.30078125, -0.25976562, 0.0071105957, 0.8984375, 1.001358e-5]
    rounded = quant.round_act_fp8(group_with(1.0, exact, 64), group=64)
    assert rounded[1:6].tolist() == pytest.approx([0.3125, -0.25, 0.0073242188, 0.875, 7.6293945e-6], rel=1e-7)


def test_fp8_ties_go_to_the_even_code():
    # amax 448 makes the scale 1; around 16 the codes are 2 apart: 17 and 19 are ties, and 16, 20 have even
    # mantissas
    rounded = quant.round_act_fp8(group_with(448.0, [17.0, 19.0, 21.0, 2**-10, 3 * 2**-10, -17.0], 128))
    assert rounded[1:7].tolist() == [16.0, 20.0, 20.0, 0.0, 2**-8, -16.0]


def test_fp8_groups_are_independent_and_the_last_may_be_short():
    x = torch.cat([torch.full((64,), 448.0), torch.full((64,), 1e-3), torch.full((6,), 7.0)])
    codes, scales = quant.quantize_act_fp8(x.expand(3, -1), group=64)
    assert codes.shape == (3, 134) and scales.shape == (3, 3)
    assert scales[0].tolist() == [1.0, 2.0**-18, 2.0**-6]
    assert quant.round_act_fp8(x, 64)[-6:].tolist() == [7.0] * 6


def test_rounding_keeps_dtype_and_does_not_hide_nan():
    x = group_with(1.0, [float("nan")], 32).bfloat16()
    for rounded in (quant.round_act_fp8(x, 32), quant.round_act_fp4(x)):
        assert rounded.dtype == torch.bfloat16 and bool(rounded[1].isnan())


def test_group_must_be_positive():
    with pytest.raises(ConfigError, match="group size 0"):
        quant.round_act_fp8(torch.ones(4), group=0)


# ---------------------------------------------------------------- FP4 activations


@pytest.mark.parametrize(("amax", "scale"), [(5.0, 1), (6.0, 1), (6.01, 2), (3.0, 0.5), (0.75, 2**-3), (0.0, 2**-126)])
def test_fp4_scale_of_a_group(amax: float, scale: float):
    _, scales = quant.quantize_act_fp4(group_with(amax, [], 32))
    assert scales.tolist() == [scale]


def test_fp4_group_with_amax_five():
    rounded = quant.round_act_fp4(group_with(5.0, [-0.25, 0.26, 4.9, 0.2], 32))
    assert rounded[:5].tolist() == [4.0, 0.0, 0.5, 4.0, 0.0]
    assert torch.signbit(rounded[1])  # minus zero keeps its sign


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert quant.round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert quant.round_e2m1(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    above = torch.nextafter(ties, torch.tensor(9.0))
    below = torch.nextafter(ties, torch.tensor(0.0))
    assert quant.round_e2m1(above).tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]
    assert quant.round_e2m1(below).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4]
    assert quant.round_e2m1(torch.tensor([7.0, -100.0])).tolist() == [6, -6]


# ---------------------------------------------------------------- weights


def test_packed_fp4_row_by_hand():
    # low nibble first: 0xA1 = codes 1 and 10 = 0.5, -1; 0x07 = 6, 0; 0xE5 = 3, -4; 0x43 = 1.5, 2; 0x80 = 0,
    # -0; 0xF8 = -0, -6
    row = [0xA1, 0x07, 0xE5, 0x43, 0x80, 0xF8] + [0] * 26
    packed = torch.tensor([row], dtype=torch.uint8).view(torch.int8)
    scale = torch.tensor([[128, 126]], dtype=torch.uint8)  # 2 for channels 0..31, 0.5 for 32..63
    values = quant.dequantize_weight_fp4(packed, scale)
    assert values.shape == (1, 64)
    assert values[0, :12].tolist() == [1, -2, 12, 0, 6, -8, 3, 4, 0, 0, 0, -12]
    packed[0, 16] = 0x52  # channels 32, 33: 1 and 3, halved
    assert quant.dequantize_weight_fp4(packed, scale)[0, 32:34].tolist() == [0.5, 1.5]


def test_every_fp4_byte_survives_unpacking_and_packing():
    packed = torch.arange(256).to(torch.uint8).view(torch.int8)
    assert torch.equal(quant.pack_fp4(quant.unpack_fp4(packed)), packed)


def test_fp4_weights_of_a_stack_of_experts():
    weight = torch.tensor(quant.FP4_VALUES).repeat(2, 3, 4) * 8  # [2 experts, 3 rows, 64 channels]
    packed, scale = quant.quantize_weight_fp4(weight)
    assert packed.shape == (2, 3, 32) and packed.dtype == torch.int8
    assert scale.shape == (2, 3, 2) and scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(quant.dequantize_weight_fp4(packed, scale), weight)


def test_odd_rows_cannot_be_packed():
    with pytest.raises(ConfigError, match="FP4 row of 3 channels"):
        quant.pack_fp4(torch.ones(2, 3))


def test_fp8_block_by_hand_with_ragged_edges():
    # bytes of e4m3: 0x38 = 1, 0xB8 = -1, 0x7E = 448, 0x01 = 2^-9, 0x3C = 1.5
    stored = torch.tensor([[0x38, 0xB8, 0x7E], [0x01, 0x3C, 0x38], [0x38, 0x38, 0xB8]], dtype=torch.uint8)
    codes = stored.view(torch.float8_e4m3fn)
    scale = torch.tensor([[125, 129], [127, 120]], dtype=torch.uint8)  # 1/4, 4 / 1, 2^-7
    weight = quant.dequantize_weight_fp8(codes, scale, block=(2, 2))
    assert weight.tolist() == [[0.25, -0.25, 1792.0], [2**-11, 0.375, 4.0], [1.0, 1.0, -(2**-7)]]
    as_float = quant.dequantize_weight_fp8(codes, quant.decode_e8m0(scale), block=(2, 2))
    assert torch.equal(as_float, weight)  # base checkpoints keep scales in fp32


def test_fp8_weight_scales_follow_each_block():
    weight = torch.zeros(130, 129)
    weight[0, 0], weight[129, 0], weight[0, 128] = 448.0, 1.0, 449.0
    codes, scale = quant.quantize_weight_fp8(weight)
    assert codes.shape == (130, 129) and scale.shape == (2, 2)
    assert quant.decode_e8m0(scale).tolist() == [[1.0, 2.0], [2.0**-8, 2.0**-22]]
    # 449 / 2 = 224.5 rounds to 224: codes there are 16 apart
    restored = quant.dequantize_weight_fp8(codes, scale)
    assert restored[0, 0] == 448 and restored[129, 0] == 1 and restored[0, 128] == 448


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_scales_of_another_shape_are_refused(kind: str):
    scale = torch.zeros(5, 5, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"scales have shape \(5, 5\) .* need \(2, "):
        if kind == "fp8":
            quant.dequantize_weight_fp8(torch.zeros(256, 256).to(torch.float8_e4m3fn), scale)
        else:
            quant.dequantize_weight_fp4(torch.zeros(2, 32, dtype=torch.int8), scale)
