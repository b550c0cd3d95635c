"""Packed memories: whatever a format rounds, cuts, pages, forks, snapshots and the fused step do not change a bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build, chunkings, config, drawn, some_tokens

from rorqual.errors import CacheError, ConfigError
from rorqual.model import Segment, Trace, Transformer, quantised
from rorqual.model.pages import PagePool
from rorqual.model.window_checkpoint import capture, install
from rorqual.ops import cache_codec
from rorqual.ops.native import load

needs_native = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")
FORMATS = ("exact", "fp4-keys", "fp8", "auto")


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def model_of(
    cache_format: str, rounding: str = "none", dtype: torch.dtype = torch.float32, width: int = 32
) -> Transformer:
    cfg = config(cache_format=cache_format, activation_rounding=rounding, index_head_dim=width, index_topk=5)
    return build(cfg).to(dtype)


@needs_native
@drawn(24)
@given(
    cache_format=st.sampled_from(FORMATS), rounding=st.sampled_from(["none", "v4"]), is_half=st.booleans(),
    is_paged=st.booleans(), width=st.sampled_from([16, 32, 64]), chunks=chunkings(),
)  # fmt: skip
def test_cuts_and_pages(
    cache_format: str, rounding: str, is_half: bool, is_paged: bool, width: int, chunks: list[int]
) -> None:
    """One call, chunks by the layer code and single tokens by the fused step agree bit by bit."""
    model = model_of(cache_format, rounding, torch.bfloat16 if is_half else torch.float32, width)
    row = some_tokens(model, 1, sum(chunks) + 20)
    pool = PagePool(model.cfg, model.reference, 256, 16) if is_paged else None
    state = model.new_state(rewind=2, pool=pool)
    parts = row.split([*chunks, *[1] * 20], 1)
    found = torch.cat([model.forward_streams(part, state=state) for part in parts], 1)
    assert torch.equal(found, model.forward_streams(row))
    assert state.decoding is not None  # the fused step ran


@needs_native
@pytest.mark.parametrize("rounding", ["none", "v4"])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_memory_of_the_fused_step(cache_format: str, rounding: str) -> None:
    """Rows packed by the fused step are those that the layer code packs, byte by byte."""
    model = model_of(cache_format, rounding, torch.bfloat16)
    row, fused, layers = some_tokens(model, 1, 41), model.new_state(), model.new_state()
    for token in row.split(1, 1):
        model.forward_streams(token, state=fused)
        model.forward_streams(token, state=layers, trace=Trace())
    for spec, mine, theirs in zip(model.cfg.layers, fused.layers, layers.layers, strict=True):
        for name, value in mine.tensors().items():
            held = 41 // spec.compress_ratio if name in ("entries", "index_keys") else None
            assert torch.equal(value[:, :held], theirs.tensors()[name][:, :held]), f"layer {spec.index}: {name}"


@pytest.mark.parametrize("cache_format", ["exact", "fp4-keys", "fp8"])
def test_formats_decide_what_is_kept(cache_format: str) -> None:
    """Bytes of rows, and numbers: a packed model computes with rounded ones, an exact one does not."""
    model, exact = model_of(cache_format), model_of("exact")
    row, state = some_tokens(model, 1, 48), model.new_state()
    out = model(row, state=state)
    cfg, layer = model.cfg, state.layers[1]
    assert layer.entries.dtype == (torch.uint8 if cache_format == "fp8" else torch.float32)
    assert layer.index_keys.dtype == (torch.float32 if cache_format == "exact" else torch.uint8)
    if cache_format == "fp8":
        assert layer.entries.shape[-1] == cache_codec.entry_bytes(cfg.nope_head_dim, cfg.qk_rope_head_dim)
    assert torch.equal(out, exact(row)) == (cache_format == "exact")
    pool = PagePool(cfg, model.reference, 256, 16)
    assert {part.name: pool.tensor(part.layer, part.name).dtype for part in pool.parts} == {
        "entries": layer.entries.dtype, "index_keys": layer.index_keys.dtype,
    }  # fmt: skip


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_rounded_numbers_loses_nothing(dtype: torch.dtype) -> None:
    """A model that rounds activations packs by itself what it can, and gives the logits of one that does not pack."""
    model, exact = model_of("auto", "v4", dtype), model_of("exact", "v4", dtype)
    row, state = some_tokens(model, 1, 48), model.new_state()
    found = torch.cat([model(part, state=state) for part in row.split(7, 1)], 1)
    assert state.layers[1].index_keys.dtype == torch.uint8
    assert (state.layers[1].entries.dtype == torch.uint8) == (dtype == torch.bfloat16)
    assert torch.equal(found, exact(row))


@needs_native
@pytest.mark.parametrize("is_paged", [False, True])
def test_forks_cuts_and_snapshots(is_paged: bool) -> None:
    model = model_of("fp8")
    row = some_tokens(model, 1, 60)
    pool = PagePool(model.cfg, model.reference, 512, 16) if is_paged else None
    state = model.new_state(rewind=9, pool=pool)
    model(row[:, :41], state=state)
    fork, other = state.fork(), model.restore(state.snapshot())
    state.truncate(35)
    again = model(row[:, 35:], state=state)
    assert torch.equal(model(row[:, 41:], state=fork), again[:, 6:])
    assert torch.equal(model(row[:, 41:], state=other), again[:, 6:])


@needs_native
def test_checkpoints_of_windows() -> None:
    """Open pages travel with a checkpoint in their packed form."""
    model = model_of("fp8")
    row, pool = some_tokens(model, 1, 60), PagePool(model_of("fp8").cfg, torch.empty(0), 512, 16)
    state, other = model.new_state(pool=pool), model.new_state(pool=pool)
    model(row[:, :45], state=state)
    assert state.table is not None
    content = capture(state)
    install(other, row[0, :45], 45, content, state.table.fork(32), 32)
    segments = [Segment(one, row[0, 45:]) for one in (state, other)]
    streams = model.step(segments)
    assert torch.equal(streams[:, :15], streams[:, 15:])


@needs_native
def test_a_change_of_format_is_noticed() -> None:
    """States and snapshots of another format are refused, in words."""
    model = model_of("exact")
    state = model.new_state()
    model(some_tokens(model, 1, 12), state=state)
    snapshot = state.snapshot()
    quantised.keep_cache_as(model, "fp8")
    with pytest.raises(CacheError, match="cache format"):
        model(some_tokens(model, 1, 1), state=state)
    with pytest.raises(CacheError, match="another configuration"):
        model.restore(snapshot)
    state = model.new_state()
    found = torch.cat([model(part, state=state) for part in some_tokens(model, 1, 30).split(4, 1)], 1)
    assert torch.equal(found, model_of("fp8")(some_tokens(model, 1, 30)))
    with pytest.raises(ConfigError, match="cache_format"):
        quantised.keep_cache_as(model, "fp2")


def test_entries_of_gradients() -> None:
    """With gradients, a packed state's own entries are constants and values agree with the rounded ones."""
    model = model_of("fp8")
    row = some_tokens(model, 1, 24)
    with torch.enable_grad():
        out = model(row, state=model.new_state())
        out.sum().backward()
    assert torch.allclose(out, model(row), atol=1e-5)
