"""Networks with Engram memories: whatever way the tokens come in, the logits are those of one full pass.

As `test_state.py`, with memories in two blocks; few rows, so that addresses collide, and a convolution that matters.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build, chunkings, config, drawn, full, gap, some_tokens
from torch import Tensor

from rorqual.model import Transformer
from rorqual.model.engram import Engram, memories
from rorqual.model.layout import Layout
from rorqual.model.state import State

TOLERANCE = 1e-5
"""Relative to logits of order one to ten."""


def model_of(**changes: Any) -> Transformer:
    settings = {"layers": [0, 2], "rows": 41, "orders": [2, 3], "heads": 2, "head_dim": 4, **changes}
    return build(config(engram=settings))


MODELS = {
    "paper": model_of(),
    "v41": model_of(flavour="v41", pad_token_id=5),  # an id that occurs in the text
    "far": model_of(orders=[1, 4], kernel=3, placement="host"),
}
models = st.sampled_from(sorted(MODELS))


def close(found: Tensor, truth: Tensor) -> bool:
    return gap(found, truth) < TOLERANCE * max(1.0, float(truth.abs().max()))


def fed(model: Transformer, row: Tensor, chunks: list[int], state: State) -> Tensor:
    return torch.cat([model(part[None], state=state)[0] for part in row.split(chunks)])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_memories_matter_in_these_models(name: str) -> None:
    model, row = MODELS[name], some_tokens(MODELS[name], 30)
    expected = full(model, row)
    for memory in memories(model):
        memory.is_off = True
        assert gap(full(model, row), expected) > 0.05
        memory.is_off = False
        if memory.settings.reach:
            kept = memory.conv.detach().clone()
            with torch.no_grad():
                memory.conv.zero_()
                assert gap(full(model, row), expected) > 0.01
                memory.conv.copy_(kept)
    assert gap(full(model, row), expected) == 0


@drawn(8)
@given(name=models, chunks=chunkings(), back=st.integers(0, 20), after=chunkings(20))
def test_any_split_and_rewinding(name: str, chunks: list[int], back: int, after: list[int]) -> None:
    model, total = MODELS[name], sum(chunks)
    row, kept = some_tokens(model, total), max(0, total - back)
    state = model.new_state(rewind=20)
    with torch.no_grad():
        assert close(fed(model, row, chunks, state), full(model, row))
        state.truncate(kept)
        other = torch.cat([row[:kept], some_tokens(model, sum(after), draw_seed=5)])
        assert close(fed(model, other[kept:], after, state), full(model, other)[kept:])


@drawn(8)
@given(name=models, calls=st.lists(st.lists(st.integers(0, 7), min_size=3, max_size=3), min_size=1, max_size=6))
def test_rows_advance_on_their_own(name: str, calls: list[list[int]]) -> None:
    calls = [lengths for lengths in calls if max(lengths) > 0] or [[1, 2, 3]]
    model = MODELS[name]
    rows = [some_tokens(model, sum(lengths[r] for lengths in calls), draw_seed=r) for r in range(3)]
    state, at = model.new_state(batch_size=3), [0, 0, 0]
    seen: list[list[Tensor]] = [[], [], []]
    for lengths in calls:
        tokens = torch.full((3, max(lengths)), 7)
        for r, n in enumerate(lengths):
            tokens[r, :n] = rows[r][at[r] : at[r] + n]
        with torch.no_grad():
            logits = model(tokens, lengths=lengths, state=state)
        for r, n in enumerate(lengths):
            seen[r].append(logits[r, :n])
            at[r] += n
    for r, row in enumerate(rows):
        assert not len(row) or close(torch.cat(seen[r]), full(model, row)), f"row {r}"


@drawn(8)
@given(name=models, lengths=st.lists(st.integers(1, 21), min_size=1, max_size=6), padding=st.integers(0, 9))
def test_packed_documents_are_alone(name: str, lengths: list[int], padding: int) -> None:
    """With and without a state, padding behind."""
    model, width = MODELS[name], sum(lengths) + padding
    tokens = some_tokens(model, 1, width)
    segments = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, padding]))[None].int()
    with torch.no_grad():
        packed = [
            model(tokens, segment_ids=segments, lengths=[sum(lengths)], state=state)
            for state in (None, model.new_state())
        ]
    for logits in packed:
        start = 0
        for n in lengths:
            assert close(logits[0, start : start + n], full(model, tokens[0, start : start + n])), (
                f"document at {start}"
            )
            start += n


@drawn(6)
@given(name=models, before=chunkings(30), after=chunkings(20))
def test_forks_bytes_and_rows(name: str, before: list[int], after: list[int]) -> None:
    """A fork, a snapshot restored, and a row put into another batch go on as the state they come from."""
    model, total = MODELS[name], sum(before)
    row = some_tokens(model, total + sum(after))
    state = model.new_state()
    with torch.no_grad():
        fed(model, row[:total], before, state)
        pair = model.new_state(2)
        pair.put_row(1, state)
        others = [state.fork(), model.restore(state.snapshot()), pair.rows([1])]
        fed(model, some_tokens(model, 9, draw_seed=8), [9], state)  # what happens to one never shows in the others
        for other in others:
            assert close(fed(model, row[total:], after, other), full(model, row)[total:])


def test_beyond_the_margin_from_a_snapshot() -> None:
    model = MODELS["paper"]
    row = some_tokens(model, 100)
    state = model.new_state(rewind=16)
    with torch.no_grad():
        model(row[None, :30], state=state)
        state.snapshot()
        model(row[None, 30:], state=state)
        state.truncate(41)
        other = torch.cat([row[:41], some_tokens(model, 20, draw_seed=9)])
        assert close(fed(model, other[41:], [7, 1, 1, 11], state), full(model, other)[41:])


def test_the_part_is_bounded_and_named() -> None:
    model = MODELS["paper"]
    state, sizes = model.new_state(rewind=16), []
    with torch.no_grad():
        for _ in range(3):
            model(some_tokens(model, 1, 64), state=state)
            sizes.append(state.nbytes()["engram"])
    ids, floats = 2 + 16, (9 + 16) * (32 + 4)  # two ids back; a value and four gates nine tokens back; twice
    assert sizes == [2 * (8 * ids + 4 * floats)] * 3


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_module_alone_decodes_as_it_prefills(name: str) -> None:
    """To 1e-5 in fp32, token by token."""
    model = MODELS[name]
    memory = memories(model)[0]
    assert isinstance(memory, Engram)
    tokens = some_tokens(model, 1, 40)
    streams = torch.randn(1, 40, 4, 32, generator=torch.Generator().manual_seed(0))
    recall = model.new_state().layers[0].engram
    with torch.no_grad():
        expected = memory(streams, tokens, Layout(1, 40, tokens.device))
        steps = [
            memory(streams[:, t : t + 1], tokens[:, t : t + 1], Layout(1, 1, tokens.device, start=[t]), recall)
            for t in range(40)
        ]
    assert gap(torch.cat(steps, 1), expected) <= 1e-5


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_future_does_not_show(name: str) -> None:
    model, row = MODELS[name], some_tokens(MODELS[name], 40)
    before = full(model, row)
    for t in (0, 7, 22, 38):
        changed = row.clone()
        changed[t + 1 :] = (row[t + 1 :] + 1) % 64
        assert gap(full(model, changed)[: t + 1], before[: t + 1]) < TOLERANCE * max(1.0, float(before.abs().max()))
