"""A token's logits are the same bits however it comes in: in one pass, in chunks, token by token, in a batch.

Tolerances hide order of summation; here there are none. Only the native operations promise this.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import chunkings, drawn, networks, some_tokens
from torch import Tensor

from rorqual.model import Segment, Transformer
from rorqual.ops.native import load

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


def one_pass(model: Transformer, row: Tensor) -> Tensor:
    """Logits [S, V] of one row alone, without a state."""
    with torch.no_grad():
        return model(row[None])[0]


@drawn(10)
@given(model=networks(), chunks=chunkings(), threads=st.sampled_from([1, 2]))
def test_any_split(model: Transformer, chunks: list[int], threads: int) -> None:
    """Chunks and single tokens against one pass, on one thread and on two."""
    row = some_tokens(model, sum(chunks))
    want, state = one_pass(model, row), model.new_state()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            found = torch.cat([model(part[None], state=state)[0] for part in row.split(chunks)])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, want)


@drawn(10)
@given(model=networks(), length=st.integers(1, 45))
def test_token_by_token(model: Transformer, length: int) -> None:
    row, state = some_tokens(model, length), model.new_state()
    with torch.no_grad():
        found = torch.cat([model(token[None], state=state)[0] for token in row.split(1)])
    assert torch.equal(found, one_pass(model, row))


@drawn(10)
@given(model=networks(), lengths=st.lists(st.integers(1, 40), min_size=2, max_size=5))
def test_right_padded_rows(model: Transformer, lengths: list[int]) -> None:
    tokens = some_tokens(model, len(lengths), max(lengths))
    with torch.no_grad():
        found = model(tokens, lengths=lengths)
    for row, n in enumerate(lengths):
        assert torch.equal(found[row, :n], one_pass(model, tokens[row, :n])), f"row {row}"


@drawn(10)
@given(model=networks(), lengths=st.lists(st.integers(1, 21), min_size=1, max_size=6))
def test_packed_documents(model: Transformer, lengths: list[int]) -> None:
    tokens = some_tokens(model, 1, sum(lengths))
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    with torch.no_grad():
        found = model(tokens, segment_ids=segments[None])
    for number, part in enumerate(tokens[0].split(lengths)):
        assert torch.equal(found[0, segments == number], one_pass(model, part)), f"document {number}"


@drawn(10)
@given(
    model=networks(),
    calls=st.lists(st.lists(st.integers(0, 7), min_size=3, max_size=3), min_size=1, max_size=8),
    batched=st.booleans(),
)
def test_neighbours(model: Transformer, calls: list[list[int]], batched: bool) -> None:
    """Three sequences that advance by different numbers, as rows of one state or as segments of flat steps."""
    calls = [lengths for lengths in calls if max(lengths) > 0] or [[1, 2, 3]]
    rows = [some_tokens(model, sum(lengths[r] for lengths in calls), draw_seed=r) for r in range(3)]
    one, several = model.new_state(batch_size=3), [model.new_state() for _ in range(3)]
    seen: list[list[Tensor]] = [[], [], []]
    at = [0, 0, 0]
    for lengths in calls:
        parts = [rows[r][at[r] : at[r] + n] for r, n in enumerate(lengths)]
        with torch.no_grad():
            if batched:
                tokens = torch.zeros((3, max(lengths)), dtype=torch.int64)
                for r, part in enumerate(parts):
                    tokens[r, : len(part)] = part
                logits = [out[:n] for out, n in zip(model(tokens, lengths=lengths, state=one), lengths, strict=True)]
            else:
                segments = [Segment(state, part) for state, part in zip(several, parts, strict=True) if len(part)]
                flat = model.logits(model.final_hidden(model.step(segments)))[0]
                logits = [*flat.split(lengths)]
        for r, part in enumerate(logits):
            seen[r].append(part)
            at[r] += lengths[r]
    for r, row in enumerate(rows):
        if len(row):
            assert torch.equal(torch.cat(seen[r]), one_pass(model, row)), f"row {r}"
