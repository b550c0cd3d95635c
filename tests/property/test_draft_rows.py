"""Several tokens of one sequence by the fused step, and taking some back: the bits of one token after the other."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build, config, drawn, models, some_tokens

from rorqual.model import Segment, Transformer
from rorqual.model.decode import MOST_TOKENS
from rorqual.model.pages import PagePool
from rorqual.ops.native import load

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


@drawn(12)
@given(
    model=models(), sizes=st.lists(st.integers(1, MOST_TOKENS + 2), min_size=1, max_size=9), is_half=st.booleans(),
    is_paged=st.booleans(),
)  # fmt: skip
def test_any_number_of_tokens_at_once(model: Transformer, sizes: list[int], is_half: bool, is_paged: bool) -> None:
    """Steps of 1 to a few tokens, beside another sequence, some of them more than the fused step takes."""
    model = model.to(torch.bfloat16 if is_half else torch.float32)
    row, other = some_tokens(model, sum(sizes)), some_tokens(model, len(sizes), draw_seed=2)
    pool = PagePool(model.cfg, model.reference, 512, 16) if is_paged else None
    state, beside = model.new_state(rewind=0, pool=pool), model.new_state()
    found, alone = [], []
    for number, part in enumerate(row.split(sizes)):
        out = model.step([Segment(state, part), Segment(beside, other[number : number + 1])])
        found.append(out[:, : len(part)])
        alone.append(out[:, len(part) :])
    assert torch.equal(torch.cat(found, 1), model.forward_streams(row[None]))
    assert torch.equal(torch.cat(alone, 1), model.forward_streams(other[None]))
    assert state.lengths == [sum(sizes)] and torch.equal(state.tokens[0, : sum(sizes)], row.int())


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("drafts", [1, 3, 5])
def test_rejected_tokens_leave_nothing_behind(drafts: int, is_paged: bool) -> None:
    """Wrong drafts at every position mod 4 and mod 128, and across pages; as many accepted as chance says."""
    model = build(config(compress_ratios=[0, 4, 128, 4], sliding_window=9, index_topk=5))
    row, draw = some_tokens(model, 290), random.Random(drafts)
    state = model.new_state(rewind=drafts, pool=PagePool(model.cfg, model.reference, 512) if is_paged else None)
    expected = model.forward_streams(row[None])
    at = 0
    while at < len(row):
        kept = min(draw.randrange(1, drafts + 2), len(row) - at)
        wrong = torch.randint(0, model.cfg.vocab_size, (1 + drafts - kept,)) if kept <= drafts else row[:0]
        streams = model.step([Segment(state, torch.cat([row[at : at + kept], wrong]))])
        assert torch.equal(streams[:, :kept], expected[:, at : at + kept]), f"at {at}, {kept} of {1 + drafts} kept"
        at += kept
        state.truncate(at)
    assert state.lengths == [290]
    if state.table is not None:
        assert len(state.table) == -(-290 // 128)
