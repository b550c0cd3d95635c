"""Whatever way the tokens come in, the logits are those of one full pass over the row.

Every test compares an incremental, batched, packed, forked, restored or rewound run with `full`: the same
row alone, in one pass, without a state.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import (
    TOLERANCE,
    build,
    chunkings,
    config,
    drawn,
    full,
    gap,
    models,
    some_tokens,
)
from torch import Tensor

from rorqual.errors import CacheError
from rorqual.model import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    """All layer kinds, window 8, three picks, blocks of 4 and 8."""
    return build(config())


def pieces(row: Tensor, chunks: list[int]) -> list[Tensor]:
    """The row [S] as consecutive calls' inputs [1, n]."""
    return [part[None] for part in row.split(chunks)]


@drawn()
@given(model=models(), chunks=chunkings())
def test_any_split(model: Transformer, chunks: list[int]) -> None:
    """Any cut of the prompt into chunks, over random schedules."""
    row = some_tokens(model, sum(chunks))
    state = model.new_state()
    with torch.no_grad():
        logits = torch.cat([model(part, state=state)[0] for part in pieces(row, chunks)])
    assert state.lengths == [sum(chunks)]
    assert gap(logits, full(model, row)) < TOLERANCE


@drawn()
@given(
    model=models(),
    calls=st.lists(st.lists(st.integers(0, 7), min_size=3, max_size=3), min_size=1, max_size=8),
    garbage=st.integers(0, 63),
)
def test_rows_advance_on_their_own(model: Transformer, calls: list[list[int]], garbage: int) -> None:
    """Three rows take different numbers of tokens at every call; the padding's content does not matter."""
    calls = [lengths for lengths in calls if max(lengths) > 0] or [[1, 2, 3]]
    totals = [sum(lengths[r] for lengths in calls) for r in range(3)]
    rows = [some_tokens(model, total, draw_seed=r) for r, total in enumerate(totals)]
    state = model.new_state(batch_size=3)
    seen: list[list[Tensor]] = [[], [], []]
    at = [0, 0, 0]
    for lengths in calls:
        tokens = torch.full((3, max(lengths)), garbage)
        for r, n in enumerate(lengths):
            tokens[r, :n] = rows[r][at[r] : at[r] + n]
        with torch.no_grad():
            logits = model(tokens, lengths=torch.tensor(lengths), state=state)
        for r, n in enumerate(lengths):
            seen[r].append(logits[r, :n])
            at[r] += n
    assert state.lengths == totals
    for r, row in enumerate(rows):
        if len(row):
            assert gap(torch.cat(seen[r]), full(model, row)) < TOLERANCE, f"row {r}"


@drawn()
@given(model=models(), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), garbage=st.integers(0, 63))
def test_right_padding_without_a_state(model: Transformer, lengths: list[int], garbage: int) -> None:
    """A batch of prompts of different lengths in one pass."""
    rows = [some_tokens(model, n, draw_seed=r) for r, n in enumerate(lengths)]
    tokens = torch.full((len(rows), max(lengths)), garbage)
    for r, row in enumerate(rows):
        tokens[r, : len(row)] = row
    with torch.no_grad():
        logits = model(tokens, lengths=torch.tensor(lengths))
    for r, row in enumerate(rows):
        assert gap(logits[r, : len(row)], full(model, row)) < TOLERANCE, f"row {r}"


@drawn()
@given(
    model=models(),
    documents=st.lists(st.lists(st.integers(1, 21), min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_packed_documents_are_alone(model: Transformer, documents: list[list[int]]) -> None:
    """Each document of a packed row gives the logits it gives alone; blocks start anew with each document."""
    width = max(sum(lengths) for lengths in documents)
    tokens = some_tokens(model, len(documents), width)
    segments = torch.zeros((len(documents), width), dtype=torch.int32)
    for r, lengths in enumerate(documents):
        rest = width - sum(lengths)
        for number, part in enumerate(segments[r].split([*lengths, rest])):
            part.fill_(number)
    with torch.no_grad():
        logits = model(tokens, segment_ids=segments)
    for r, lengths in enumerate(documents):
        start = 0
        for n in lengths:
            alone = full(model, tokens[r, start : start + n])
            assert gap(logits[r, start : start + n], alone) < TOLERANCE, f"row {r}, document at {start}"
            start += n


@drawn()
@given(model=models(), length=st.integers(2, 50), data=st.data())
def test_the_future_does_not_show(model: Transformer, length: int, data: st.DataObject) -> None:
    """Changing tokens after t leaves the logits up to t as they were."""
    t = data.draw(st.integers(0, length - 2))
    row = some_tokens(model, length)
    changed = row.clone()
    changed[t + 1 :] = (row[t + 1 :] + 1) % model.cfg.vocab_size
    before, after = full(model, row), full(model, changed)
    assert gap(before[: t + 1], after[: t + 1]) < 1e-5
    assert gap(before[t + 1], after[t + 1]) > 1e-3, "the changed token itself must show"


@drawn()
@given(shared=st.integers(0, 40), left=chunkings(20), right=chunkings(20))
def test_forks_do_not_touch_each_other(model: Transformer, shared: int, left: list[int], right: list[int]) -> None:
    """Two continuations of one prefix, fed in turns, each equal to its own row."""
    prefix = some_tokens(model, shared)
    rows = [torch.cat([prefix, some_tokens(model, sum(c), draw_seed=7 + i)]) for i, c in enumerate((left, right))]
    state = model.new_state()
    with torch.no_grad():
        if shared:
            model(prefix[None], state=state)
        states = [state, state.fork()]
        queues = [pieces(row[shared:], chunks) for row, chunks in zip(rows, (left, right), strict=True)]
        seen: list[list[Tensor]] = [[], []]
        while any(queues):
            for i in (0, 1):
                if queues[i]:
                    seen[i].append(model(queues[i].pop(0), state=states[i])[0])
    for i, row in enumerate(rows):
        assert gap(torch.cat(seen[i]), full(model, row)[shared:]) < TOLERANCE, f"fork {i}"


@drawn()
@given(before=chunkings(40), after=chunkings(25))
def test_bytes_and_back(model: Transformer, before: list[int], after: list[int]) -> None:
    """A snapshot restored from bytes goes on like the state it was taken from, which goes on unharmed."""
    row = some_tokens(model, sum(before) + sum(after))
    state = model.new_state()
    with torch.no_grad():
        for part in pieces(row[: sum(before)], before):
            model(part, state=state)
        snapshot = state.snapshot()
        assert isinstance(snapshot, bytes)
        restored = model.restore(snapshot)
        assert restored.lengths == state.lengths
        for one in (state, restored):
            logits = torch.cat([model(part, state=one)[0] for part in pieces(row[sum(before) :], after)])
            assert gap(logits, full(model, row)[sum(before) :]) < TOLERANCE


@drawn()
@given(before=chunkings(), back=st.integers(0, 24), after=chunkings(25))
def test_rewinding_within_the_margin(model: Transformer, before: list[int], back: int, after: list[int]) -> None:
    """Truncating inside the margin, then another continuation: as if the dropped tokens had never been."""
    total = sum(before)
    kept = total - min(back, total)
    row = some_tokens(model, total)
    state = model.new_state(rewind=24)
    with torch.no_grad():
        for part in pieces(row, before):
            model(part, state=state)
        state.truncate(kept)
        assert state.lengths == [kept]
        other = torch.cat([row[:kept], some_tokens(model, sum(after), draw_seed=5)])
        logits = torch.cat([model(part, state=state)[0] for part in pieces(other[kept:], after)])
    assert gap(logits, full(model, other)[kept:]) < TOLERANCE


@drawn(10)
@given(steps=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_drafts_accepted_and_refused(model: Transformer, steps: list[tuple[int, int]]) -> None:
    """Speculation: feed some tokens, take back some of them, again and again; the kept row alone decides."""
    state = model.new_state(rewind=8)
    kept: list[int] = some_tokens(model, 9).tolist()
    with torch.no_grad():
        model(torch.tensor([kept]), state=state)
        for number, (fed, refused) in enumerate(steps):
            draft = some_tokens(model, fed, draw_seed=number).tolist()
            logits = model(torch.tensor([draft]), state=state)[0]
            assert gap(logits, full(model, torch.tensor(kept + draft))[-fed:]) < TOLERANCE, f"step {number}"
            kept += draft[: max(0, fed - refused)]
            state.truncate(len(kept))


def test_rewinding_to_nothing_and_a_short_prompt(model: Transformer) -> None:
    """A state emptied and used again: the first entry of a CSA layer must not see the old row's last block.

    The fault shows only when the new prompt is shorter than a block, so that nothing overwrites the old one.
    """
    state = model.new_state(rewind=64)
    with torch.no_grad():
        model(some_tokens(model, 1, 23), state=state)
        state.truncate(0)
        row = some_tokens(model, 14, draw_seed=3)
        logits = torch.cat([model(part, state=state)[0] for part in pieces(row, [2, *[1] * 12])])
    assert gap(logits, full(model, row)) < TOLERANCE


def test_a_long_neighbour_leaves_no_trace(model: Transformer) -> None:
    """A batch whose first row is long and whose second starts late with two tokens."""
    late = some_tokens(model, 12, draw_seed=4)
    state = model.new_state(batch_size=2)
    with torch.no_grad():
        model(some_tokens(model, 2, 21), lengths=torch.tensor([21, 0]), state=state)
        seen = []
        for part in pieces(late, [2, *[1] * 10]):
            lengths = torch.tensor([0, part.shape[1]])
            seen.append(model(part.expand(2, -1), lengths=lengths, state=state)[1])
    assert gap(torch.cat(seen), full(model, late)) < TOLERANCE


def test_beyond_the_margin_without_a_snapshot(model: Transformer) -> None:
    """The window's ring has dropped what it would need: refuse, say why, and leave the state as it was."""
    row = some_tokens(model, 120)
    state = model.new_state(rewind=16)
    with torch.no_grad():
        model(row[None, :100], state=state)
        with pytest.raises(CacheError, match="16"):
            state.truncate(20)
        assert state.lengths == [100]
        logits = model(row[None, 100:], state=state)[0]
    assert gap(logits, full(model, row)[100:]) < TOLERANCE


def test_beyond_the_margin_with_a_snapshot(model: Transformer) -> None:
    """With a snapshot behind the wanted length, the tokens between are computed again."""
    row = some_tokens(model, 100)
    state = model.new_state(rewind=16)
    with torch.no_grad():
        model(row[None, :30], state=state)
        state.snapshot()
        model(row[None, 30:], state=state)
        state.truncate(41)
        assert state.lengths == [41]
        other = torch.cat([row[:41], some_tokens(model, 20, draw_seed=9)])
        logits = torch.cat([model(part, state=state)[0] for part in pieces(other[41:], [7, 1, 1, 11])])
    assert gap(logits, full(model, other)[41:]) < TOLERANCE


@pytest.mark.parametrize("length", [-1, 31, 1000])
def test_truncating_to_an_impossible_length(model: Transformer, length: int) -> None:
    """A length the state never had."""
    state = model.new_state()
    with torch.no_grad():
        model(some_tokens(model, 1, 30), state=state)
    with pytest.raises(CacheError, match=str(length)):
        state.truncate(length)


def test_the_window_is_bounded() -> None:
    """Window and pending parts stop growing; entries and index keys grow as a quarter of the tokens."""
    model = build(config())
    state = model.new_state(rewind=16)
    sizes = []
    with torch.no_grad():
        for _ in range(4):
            for _ in range(8):
                model(some_tokens(model, 1, 64), state=state)
            sizes.append(state.nbytes())
    names = {"window", "entries", "index_keys", "pending"}
    assert names <= set(sizes[0]), f"parts: {sorted(sizes[0])}"
    for name in ("window", "pending"):
        assert sizes[0][name] == sizes[-1][name], f"{name} grew from {sizes[0][name]} to {sizes[-1][name]}"
    for name in ("entries", "index_keys"):
        # Buffers may grow in steps; four times the tokens must not take much more than four times the bytes.
        assert sizes[0][name] < sizes[-1][name] <= 6 * sizes[0][name], f"{name}: {[s[name] for s in sizes]}"


def damaged(snapshot: bytes) -> dict[str, bytes]:
    """Ways in which bytes go bad."""
    middle = len(snapshot) // 2
    flipped = bytearray(snapshot)
    flipped[middle] ^= 0x40
    return {
        "empty": b"",
        "cut short": snapshot[:middle],
        "one byte short": snapshot[:-1],
        "one bit flipped": bytes(flipped),
        "no snapshot": b"not a snapshot at all, but long enough to hold a header of any kind " * 4,
        "something after the end": snapshot + b"\0" * 8,
    }


@pytest.mark.parametrize("damage", sorted(damaged(b"some bytes")))
def test_damaged_snapshots_are_refused(model: Transformer, damage: str) -> None:
    """Bytes that are not what `snapshot` wrote raise CacheError and nothing else."""
    state = model.new_state()
    with torch.no_grad():
        model(some_tokens(model, 1, 30), state=state)
    with pytest.raises(CacheError):
        model.restore(damaged(state.snapshot())[damage])


def test_a_snapshot_of_another_network_is_refused(model: Transformer) -> None:
    """The layers differ, so the parts do not fit."""
    other = build(config(compress_ratios=[0, 4, 8, 8]))
    state = other.new_state()
    with torch.no_grad():
        other(some_tokens(other, 1, 30), state=state)
    with pytest.raises(CacheError):
        model.restore(state.snapshot())
