"""Packed weights and cache rows of any shape: values survive, and a row's product has one value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.ops import cache_codec, registry
from rorqual.ops.matvec import packed_linear
from rorqual.ops.native import load
from rorqual.ops.packed_weight import FORMATS, pack
from rorqual.ops.rounding import round_index_fp4, round_kv_fp8

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


def numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 2.0 ** torch.randint(-8, 9, shape, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_has_one_product(data: st.DataObject) -> None:
    out, width, rows = data.draw(st.integers(1, 70)), 2 * data.draw(st.integers(1, 200)), data.draw(st.integers(1, 60))
    kind, dtype = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    weight = pack(numbers(data.draw(st.integers(0, 2**32)), out, width), kind)
    x = numbers(data.draw(st.integers(0, 2**32)), rows, width).to(dtype)
    found = packed_linear(x, weight)
    exact, size = x.double() @ weight.dequantise().double().T, x.double().abs() @ weight.dequantise().double().abs().T
    rounding = exact.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0.0
    assert ((found.double() - exact).abs() <= 2e-6 * size + rounding).all()
    lo = data.draw(st.integers(0, rows - 1))
    hi = data.draw(st.integers(lo + 1, rows))
    assert torch.equal(packed_linear(x[lo:hi], weight), found[lo:hi])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(0, 40), st.integers(1, 5), st.integers(0, 2**32))
def test_rounded_entries_survive_and_the_twins_agree(nope: int, rope: int, rows: int, seed: int) -> None:
    if nope + rope == 0:
        return
    x = round_kv_fp8(numbers(seed, rows, nope + rope).bfloat16(), nope)
    packed = [function(x, nope) for function in registry.implementations("encode_entries").values()]
    assert all(torch.equal(packed[0], other) for other in packed)
    assert packed[0].shape == (rows, cache_codec.entry_bytes(nope, rope))
    for decode in registry.implementations("decode_entries").values():
        assert torch.equal(decode(packed[0], nope, rope), x.float())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.integers(1, 5), st.integers(0, 2**32))
def test_rounded_index_keys_survive_and_the_twins_agree(half_width: int, rows: int, seed: int) -> None:
    x = round_index_fp4(numbers(seed, rows, 2 * half_width))
    packed = [function(x) for function in registry.implementations("encode_index_keys").values()]
    assert all(torch.equal(packed[0], other) for other in packed)
    for decode in registry.implementations("decode_index_keys").values():
        assert torch.equal(decode(packed[0], 2 * half_width), x)
