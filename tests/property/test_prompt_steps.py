"""Prompts through the fused step, cut into pieces and shared out over threads: the bits of the layer code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build, config, drawn, models, some_tokens

from rorqual.model import Segment, State, Trace, Transformer, decode
from rorqual.model.pages import PagePool
from rorqual.ops.native import load

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def same_threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check_memory(model: Transformer, length: int, mine: State, theirs: State) -> None:
    """Two states of one row that have seen the same `length` tokens remember the same."""
    contents = zip(mine.contiguous().layers, theirs.contiguous().layers, model.cfg.layers, strict=True)
    for one, other, spec in contents:
        for name, value in one.tensors().items():
            held = length // spec.compress_ratio if name in ("entries", "index_keys") else None
            assert torch.equal(value[:, :held], other.tensors()[name][:, :held]), f"layer {spec.index}: {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("cuts", [[700], [351, 349], [129, 64, 507]])
def test_parts_of_threads(threads: int, dtype: torch.dtype, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 and of 128 tokens that begin in one thread's rows, or in an earlier call, and end in another's."""
    monkeypatch.setattr(decode, "PIECE", 300)
    model = build(config(compress_ratios=[0, 4, 128, 4, 128, 0], num_hidden_layers=6, sliding_window=70)).to(dtype)
    row, mine, theirs = some_tokens(model, 1, sum(cuts)), model.new_state(rewind=3), model.new_state(rewind=3)
    torch.set_num_threads(threads)
    found = [model.step([Segment(mine, part)]) for part in row[0].split(cuts)]
    assert isinstance(mine.decoding, decode.Memory), "the layer code ran"
    expected = [model.forward_streams(part, state=theirs, trace=Trace()) for part in row.split(cuts, 1)]
    assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1))
    check_memory(model, row.shape[1], mine, theirs)


@drawn(10)
@given(
    model=models(), cuts=st.lists(st.integers(1, 150), min_size=1, max_size=4), threads=st.integers(1, 3),
    is_half=st.booleans(), is_paged=st.booleans(),
)  # fmt: skip
def test_random_networks(model: Transformer, cuts: list[int], threads: int, is_half: bool, is_paged: bool) -> None:
    """Any network, beside another sequence in the same call, in pages or not."""
    model = model.to(torch.bfloat16 if is_half else torch.float32)
    row, other = some_tokens(model, 1, sum(cuts)), some_tokens(model, 1, 40 * len(cuts))
    pool = PagePool(model.cfg, model.reference, 1024, 16) if is_paged else None
    mine, beside = model.new_state(rewind=2, pool=pool), model.new_state(rewind=2)
    torch.set_num_threads(threads)
    found = []
    for part, more in zip(row[0].split(cuts), other[0].split(40), strict=True):
        streams = model.step([Segment(beside, more), Segment(mine, part)])
        assert streams.shape[1] == len(part) + len(more)
        found.append(streams[:, len(more) :])
    assert torch.equal(torch.cat(found, 1), model.forward_streams(row))
