"""Quantised cache rows: byte counts, an independent decode, the references and their native twins."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rorqual.errors import CacheError, ConfigError
from rorqual.ops import cache_codec, quant, registry
from rorqual.ops.rounding import round_index_fp4, round_kv_fp8

WIDTHS = [(448, 64), (96, 32), (48, 16), (20, 4), (7, 2), (0, 8), (64, 0)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 2.0 ** torch.randint(-9, 9, shape, generator=generator)


def twins(operation: str) -> list[str]:
    return sorted(registry.implementations(operation))


def e4m3(byte: int) -> float:
    """The format's definition, in Python's own numbers."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    size = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return math.copysign(size, -1.0 if byte & 0x80 else 1.0)


def e8m0(byte: int) -> float:
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def test_bytes_of_a_row_at_the_released_sizes() -> None:
    assert cache_codec.entry_bytes(448, 64) == 584
    assert cache_codec.index_key_bytes(128) == 68
    assert cache_codec.encode_entries(torch.zeros(3, 512), 448).shape == (3, 584)
    assert cache_codec.encode_index_keys(torch.zeros(2, 3, 128)).shape == (2, 3, 68)
    # 21 layers with entries and index keys every 4 tokens, 20 with entries every 128: V4-Flash's bytes per token
    per_token = 21 * (584 + 68) / 4 + 20 * 584 / 128
    assert per_token == 3514.25


@pytest.mark.parametrize(("nope", "rope"), WIDTHS)
def test_bytes_at_other_widths(nope: int, rope: int) -> None:
    groups = nope // math.gcd(nope, 64) if nope else 0
    assert cache_codec.entry_bytes(nope, rope) == math.ceil((nope + 2 * rope + groups) / 4) * 4


def test_an_entry_row_byte_by_byte() -> None:
    x = torch.zeros(512)
    x[0], x[1], x[64], x[448], x[511] = 448.0, -17.0, 0.4375, 1.00390625, -2.0
    for name in twins("encode_entries"):
        row = registry.implementations("encode_entries")[name](x, 448).tolist()
        # the first group has scale 1: 448 is 0x7E, and -17 is a tie that goes to -16 = 0xD8
        assert row[0] == 0x7E and row[1] == 0xD8 and row[2] == 0
        # 0.4375 = 448 * 2^-10
        assert row[64] == 0x7E and row[576:583] == [127, 117, 105, 105, 105, 105, 105] and row[583] == 0
        assert row[448:450] == [0x80, 0x3F]  # 1.00390625 is a tie between bf16 numbers: to the even one, 1
        assert row[574:576] == [0x00, 0xC0]


def test_an_index_key_row_byte_by_byte() -> None:
    x = torch.zeros(128)
    x[:6] = torch.tensor([6.0, -0.5, 0.25, 1.75, 5.0, -0.0])
    x[32] = -3.0
    for name in twins("encode_index_keys"):
        row = registry.implementations("encode_index_keys")[name](x).tolist()
        assert row[:3] == [0x97, 0x40, 0x86]  # low nibble first; ties to even: 0.25 -> 0, 1.75 -> 2, 5 -> 4
        assert row[16] == 0x0F  # -3 = -6 / 2
        assert row[64:] == [127, 126, 1, 1]


@pytest.mark.parametrize("operation", ["decode_entries", "decode_index_keys"])
def test_decoding_against_the_definition(operation: str) -> None:
    """Random bytes, every code among them, decoded with Python's own numbers."""
    generator = np.random.default_rng(3)
    width = 584 if operation == "decode_entries" else 68
    rows = generator.integers(0, 256, (8, width), dtype=np.uint8)
    first, last = (576, 583) if operation == "decode_entries" else (64, 68)
    rows[:, first:last] = generator.integers(100, 150, (8, last - first))
    rows[0, first:last] = [255] + [0] * (last - first - 1)
    if operation == "decode_entries":
        rows[1, :256] = np.arange(256)
        rows[:, 449:576:2] = generator.integers(0x3D, 0x42, (8, 64))  # exponents of ordinary numbers
        wanted = np.array([[e4m3(int(b)) for b in row[:448]] for row in rows])
        wanted *= np.array([[e8m0(int(b)) for b in row[576:583]] for row in rows]).repeat(64, -1)
        halves = rows[:, 448:576].astype(np.uint32)
        rope = ((halves[:, 1::2] << 24) | (halves[:, 0::2] << 16)).view(np.float32)
        wanted = np.concatenate([wanted, rope], -1)
        arguments: tuple[int, ...] = (448, 64)
    else:
        rows[1, :64] = np.arange(64) * 4 + 3
        signed = np.array(E2M1 + [-v for v in E2M1])
        wanted = np.stack([signed[rows[:, :64] & 15], signed[rows[:, :64] >> 4]], -1).reshape(8, 128)
        wanted = wanted * np.array([[e8m0(int(b)) for b in row[64:]] for row in rows]).repeat(32, -1)
        arguments = (128,)
    for name in twins(operation):
        found = registry.implementations(operation)[name](torch.from_numpy(rows), *arguments)
        np.testing.assert_array_equal(found.numpy(), wanted.astype(np.float32), err_msg=name)


@pytest.mark.parametrize(("nope", "rope"), WIDTHS)
def test_rounded_entries_come_back(nope: int, rope: int) -> None:
    x = randn(3, 5, nope + rope).bfloat16()
    rounded = round_kv_fp8(x, nope)
    for name in twins("encode_entries"):
        rows = registry.implementations("encode_entries")[name](rounded, nope)
        assert torch.equal(cache_codec.decode_entries(rows, nope, rope, torch.bfloat16), rounded)
        fresh = registry.implementations("encode_entries")[name](x, nope)
        assert torch.equal(cache_codec.decode_entries(fresh, nope, rope, torch.bfloat16), rounded)


@pytest.mark.parametrize("width", [128, 64, 32, 48, 16, 6])
def test_rounded_index_keys_come_back(width: int) -> None:
    x = randn(4, 3, width)
    rounded = round_index_fp4(x)
    for name in twins("encode_index_keys"):
        for source in (x, rounded):
            rows = registry.implementations("encode_index_keys")[name](source)
            found = cache_codec.decode_index_keys(rows, width)
            assert torch.equal(found, rounded)
            assert torch.equal(found.signbit(), quant.round_act_fp4(source, math.gcd(width, 32)).signbit())


@pytest.mark.parametrize("nope", [448, 48, 7])
def test_native_rows_are_the_references_rows(nope: int) -> None:
    """Byte for byte, over magnitudes from subnormal codes to overflow."""
    x = torch.cat([randn(20, nope + 8, seed=1) * 2.0**e for e in (-60, -14, 0, 60)])
    x[3] = 0.0
    x[4, : nope // 2] = -0.0
    for operation, arguments in (("encode_entries", (x, nope)), ("encode_index_keys", (x[:, : nope // 2 * 2],))):
        rows = [function(*arguments) for function in registry.implementations(operation).values()]
        assert all(torch.equal(rows[0], other) for other in rows[1:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_with_a_number_that_is_not_finite_reads_as_nan(bad: float) -> None:
    x = torch.ones(2, 512)
    x[0, 70] = bad
    for name in twins("encode_entries"):
        found = cache_codec.decode_entries(registry.implementations("encode_entries")[name](x, 448), 448, 64)
        assert found[0, 64:128].isnan().all() and torch.equal(found[0, :64], torch.ones(64))
        assert torch.equal(found[1], torch.ones(512))
    for name in twins("encode_index_keys"):
        rows = registry.implementations("encode_index_keys")[name](x[:, :128])
        found = cache_codec.decode_index_keys(rows, 128)
        assert found[0, 64:96].isnan().all() and torch.equal(found[0, :64], torch.ones(64))


def test_codes_are_torchs_own() -> None:
    """e4m3 codes are what torch's float8 makes of the scaled numbers."""
    x = randn(4, 64, seed=2)
    rows = cache_codec.encode_entries(x, 64)
    scale = torch.tensor([e8m0(int(b)) for b in rows[:, 64]])[:, None]
    assert torch.equal(rows[:, :64], (x / scale).to(torch.float8_e4m3fn).view(torch.uint8))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="Index keys of 7 channels"):
        cache_codec.encode_index_keys(torch.zeros(2, 7))
    with pytest.raises(
        CacheError, match=r"uint8 of 68 bytes, but entries of 448 \+ 64 channels need uint8 rows of 584"
    ):
        cache_codec.decode_entries(torch.zeros(1, 68, dtype=torch.uint8), 448, 64)
