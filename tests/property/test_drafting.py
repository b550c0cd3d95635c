"""Drafts of the MTP module: those of a full pass, however its memory was fed, by the fused call and by layer code."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build, config, drawn, some_tokens
from torch import Tensor

from rorqual.model import Transformer
from rorqual.model.drafting import DraftMemory
from rorqual.ops import registry

MOST = 4
CERTAIN = torch.ones(1, 8)
"""No draft is ever the last."""


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def module_of(hc_mult: int = 4, dtype: torch.dtype = torch.float32) -> Transformer:
    return build(config(num_nextn_predict_layers=1, compress_ratios=[0, 4, 8, 4, 0], hc_mult=hc_mult)).to(dtype)


def chain(model: Transformer, row: Tensor, length: int, count: int) -> list[int]:
    """Drafts after `length` + 1 known tokens: a full pass of the module over trunk rows and its own."""
    streams = model.forward_streams(row[None, :length])
    following, out = row[None, 1 : length + 1], []
    for _ in range(count):
        found = model.mtp_streams(streams, following)
        draft = int(model.logits(model.mtp_hidden(found))[0, -1].argmax())
        out.append(draft)
        streams = torch.cat([streams, found[:, -1:]], 1)
        following = torch.cat([following, torch.tensor([[draft]])], 1)
    return out


@drawn(8)
@given(
    parts=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3), st.booleans()), min_size=1, max_size=8),
    hc_mult=st.sampled_from([1, 2, 4]), is_half=st.booleans(), is_fused=st.booleans(),
)  # fmt: skip
def test_drafts_are_those_of_a_full_pass(parts: Any, hc_mult: int, is_half: bool, is_fused: bool) -> None:
    """Any rows at a time, drafts after some of them, and rows that were taken back in between."""
    model = module_of(hc_mult, torch.bfloat16 if is_half else torch.float32)
    total = sum(count for count, _, _ in parts)
    row = some_tokens(model, total + 4)
    streams = model.forward_streams(row[None])[0]
    if not is_fused:
        model.register_forward_hook(lambda *_: None)  # what the fused step does not know
    memory, at = DraftMemory(model, MOST), 0
    for count, extra, drafts in parts:
        memory.remember(streams[at : at + count + extra], at)
        at += count
        memory.truncate(at)
        if drafts:
            begin, end = memory.waiting
            assert end == at
            found, chances = memory.draft(row[begin + 1 : end + 1].tolist(), MOST, CERTAIN, 0.0, model.cfg.vocab_size)
            assert found == chain(model, row, at, MOST)
            assert all(0 < chance <= 1 for chance in chances)
    plan = model.__dict__.get("decode_plan")
    if any(drafts for _, _, drafts in parts) and registry.allows("native") and plan is not None:
        assert (plan.is_usable and plan.drafter(model, model.reference.dtype) is not None) == is_fused


def test_both_ways_agree_on_probabilities_and_where_to_stop() -> None:
    model, plain = module_of(), module_of()
    plain.register_forward_hook(lambda *_: None)
    row = some_tokens(model, 30)
    streams = model.forward_streams(row[None])[0]
    kept = torch.linspace(0.1, 0.9, 16).view(2, 8)
    for least in (0.0, 0.05, 0.3, 1.0):
        memories = [DraftMemory(one, MOST) for one in (model, plain)]
        outs = []
        for memory in memories:
            memory.remember(streams[:10], 0)
            outs.append(memory.draft(row[1:11].tolist(), MOST, kept, least, 50))
        (ids, chances), (theirs, expected) = outs
        assert ids == theirs and max(ids) < 50
        assert chances == pytest.approx(expected, rel=1e-5)
        assert len(ids) == MOST if not least else len(ids) < MOST


def test_a_memory_that_starts_in_the_middle() -> None:
    """Behind a gap the module's window begins anew: drafts are those of the text from there on."""
    model = module_of()
    row = some_tokens(model, 60)
    streams = model.forward_streams(row[None])[0]
    memory, fresh = DraftMemory(model, MOST), DraftMemory(model, MOST)
    memory.remember(streams[:10], 0)
    memory.draft(row[1:11].tolist(), 1, CERTAIN, 0.0, 64)
    for one in (memory, fresh):
        one.remember(streams[20:25], 20)
    found = [one.draft(row[21:26].tolist(), MOST, CERTAIN, 0.0, 64) for one in (memory, fresh)]
    assert found[0] == found[1]
    memory.remember(streams[25:55], 25)
    assert memory.waiting == (55 - model.cfg.sliding_window - MOST, 55), "no more than the window waits"


def test_half_precision_drafts_follow_weights_that_change_in_place() -> None:
    """An fp32 model's module drafts from bf16 copies, as a bf16 model's would, and from new ones after an update."""
    model = module_of()
    row = some_tokens(model, 30)
    for _ in range(2):
        half = module_of(dtype=torch.bfloat16)
        half.load_state_dict(model.state_dict())
        streams, outs = model.forward_streams(row[None])[0], []
        for one, dtype in ((model, torch.bfloat16), (half, None)):
            memory = DraftMemory(one, MOST, dtype=dtype)
            memory.remember(streams[:10].to(one.reference.dtype), 0)
            outs.append(memory.draft(row[1:11].tolist(), MOST, CERTAIN, 0.0, 64))
        assert outs[0] == outs[1] or not registry.allows("native")
        for weight in (*model.mtp[0].parameters(), model.head.weight):
            weight.mul_(1.5)
