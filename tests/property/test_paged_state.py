"""A paged state is the contiguous one with its entries elsewhere: the same calls give the same bits.

Both states go through the same random life side by side. Pages of 8 tokens, so that every boundary is met within 60.
"""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build, config, drawn, some_tokens

from rorqual.config import ModelConfig
from rorqual.errors import CacheError
from rorqual.model import State, Transformer
from rorqual.model.page_table import PageTable
from rorqual.model.pages import PagePool
from rorqual.model.window_checkpoint import (
    capture,
    checkpoint_bytes,
    install,
    install_without,
    replay_starts,
)
from rorqual.ops.native import usable_typed

PAGE = 8
LONGEST = 70


@pytest.fixture(scope="module")
def model() -> Transformer:
    """All layer kinds, window 8, three picks, blocks of 4 and 8."""
    return build(config())


def new_pool(model: Transformer, num_tokens: int = 4096, page: int = PAGE) -> PagePool:
    return PagePool(model.cfg, model.reference, num_tokens, page)


def same(a: State, b: State) -> None:
    """Lengths, floors and everything a later call can see."""
    assert a.lengths == b.lengths and a.floor == b.floor
    for mine, theirs, spec in zip(a.layers, b.layers, a.model.cfg.layers, strict=True):
        left, right = mine.contents(), theirs.contents()
        assert set(left) == set(right)
        for name in left:
            count = a.lengths[0] // spec.compress_ratio if name in ("entries", "index_keys") else None
            assert torch.equal(left[name][:, :count], right[name][:, :count]), name


operations = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 13)),
    st.tuples(st.just("feed"), st.integers(1, 3)),
    st.tuples(st.just("truncate"), st.integers(0, 20)),
    st.tuples(st.just("fork"), st.integers(0, 3)),
    st.tuples(st.just("switch"), st.integers(0, 3)),
    st.tuples(st.just("snapshot"), st.just(0)),
    st.tuples(st.just("restore"), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 3)),
)


@drawn(12)
@given(life=st.lists(operations, min_size=4, max_size=30), seed=st.integers(0, 99))
def test_a_paged_life_equals_a_contiguous_one(model: Transformer, life: list[tuple[str, int]], seed: int) -> None:
    pool = new_pool(model)
    pairs = [(model.new_state(rewind=16), model.new_state(rewind=16, pool=pool))]
    now, draw = 0, seed * 1000
    for name, number in life:
        plain, paged = pairs[now]
        length = plain.lengths[0]
        draw += 1
        if name == "feed" and length + number <= LONGEST:
            tokens = some_tokens(model, 1, number, draw_seed=draw)
            with torch.no_grad():
                assert torch.equal(model(tokens, state=plain), model(tokens, state=paged))
        elif name == "truncate":
            target = max(0, length - number)
            if 0 < target < plain.floor[0] and not any(s.lengths[0] <= target for s in plain.snapshots):
                with pytest.raises(CacheError, match="can be cut back exactly"):
                    paged.truncate(target)
                continue
            plain.truncate(target)
            paged.truncate(target)
        elif name == "fork" and len(pairs) < 4:
            pairs.append((plain.fork(), paged.fork()))
        elif name == "switch":
            now = number % len(pairs)
        elif name == "snapshot":
            same(model.restore(plain.snapshot()), model.restore(paged.snapshot()))
        elif name == "restore":
            data = paged.snapshot(remember=False)
            same(model.restore(data), paged)
        elif name == "drop" and len(pairs) > 1:
            del pairs[number % len(pairs)]
            now %= len(pairs)
    for plain, paged in pairs:
        same(plain, paged)
    used = {page for _, paged in pairs for page in (paged.table.pages if paged.table else ())}
    del plain, paged
    gc.collect()
    assert pool.num_pages - pool.num_free == len(used), "pages that nobody has are free"
    pairs.clear()
    gc.collect()
    assert pool.num_free == pool.num_pages


@drawn(10)
@given(
    length=st.integers(2, 60), more=st.integers(0, 5), rest=st.integers(1, 12), seed=st.integers(0, 99)
)  # fmt: skip
def test_a_checkpoint_goes_on_as_the_state_did(
    model: Transformer, length: int, more: int, rest: int, seed: int
) -> None:
    """Taken at any position, at once or a few tokens later, and put on shared full pages."""
    pool = new_pool(model)
    row = some_tokens(model, length + more + rest, draw_seed=seed)
    state = model.new_state(rewind=16, pool=pool)
    with torch.no_grad():
        model(row[None, :length], state=state)
        reference = state.fork()
        if more:
            model(row[None, length : length + more], state=state)
        content = capture(state, length)
        assert content.numel() == checkpoint_bytes(model.cfg, torch.float32, length, PAGE)
        assert state.table is not None
        frozen = length // PAGE * PAGE
        table = state.table.fork(frozen)
        other = model.new_state(rewind=16, pool=pool)
        install(other, row, length, content, table, frozen)
        assert other.lengths == [length] and torch.equal(other.tokens[0, :length], row[:length].int())
        a, b = (model(row[None, length:], state=one) for one in (reference, other))
    assert torch.equal(a, b)
    with pytest.raises(CacheError, match="can be cut back exactly"):
        other.fork().truncate(length - 1)


def chunked(model: Transformer, state: State, tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Logits of tokens [n] fed in calls of `size`, the last ones one by one."""
    out = []
    with torch.no_grad():
        for at in range(0, len(tokens), size):
            out.append(model(tokens[None, at : at + size], state=state)[0])
    return torch.cat(out)


@drawn(10)
@given(
    pages=st.integers(1, 8), keep=st.integers(0, 8), rest=st.integers(1, 12), window=st.sampled_from([1, 2, 5, 8]),
    chunk=st.sampled_from([1, 3, 7, 16]), engram=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_tokens_run_again_restore_the_window(
    pages: int, keep: int, rest: int, window: int, chunk: int, engram: bool, seed: int
) -> None:
    """From an earlier checkpoint or from none: later logits are those of the state that never stopped.

    Entries of what is run again stay those that were stored, although their streams mean nothing at first.
    """
    memory = {"layers": [0, 2], "rows": 41, "orders": [2, 3], "heads": 2, "head_dim": 4}
    model = build(config(sliding_window=window, **({"engram": memory} if engram else {})), seed)
    pool = new_pool(model)
    position, keep = pages * PAGE, min(keep, pages) * PAGE
    row = some_tokens(model, position + rest, draw_seed=seed)
    state = model.new_state(rewind=80, pool=pool)
    chunked(model, state, row[:position], chunk)
    assert state.table is not None
    stored = pool.read(state.table.pages)
    other = model.new_state(rewind=80, pool=pool)
    table = state.table.fork(position)
    if keep:
        install(other, row, keep, capture(state, keep), table, position)
        assert other.is_exact
    else:
        install_without(other, row, position, table)
        assert other.lengths == [replay_starts(model.cfg, position)[0]]
    if other.lengths[0] < position:
        assert other.is_replaying
        chunked(model, other, row[other.lengths[0] : position], chunk)
    assert torch.equal(pool.read(state.table.pages), stored), "what others read did not change"
    assert other.table is not None and other.table.pages == state.table.pages
    reference = model.new_state(rewind=80)
    chunked(model, reference, row[:position], chunk)
    a, b = (chunked(model, one, row[position:], 1) for one in (reference, other))
    assert torch.equal(a, b) if usable_typed(a) else torch.allclose(a, b, atol=1e-4)


def test_an_inexact_state_is_not_saved(model: Transformer) -> None:
    pool = new_pool(model)
    row = some_tokens(model, 64)
    state = model.new_state(pool=pool)
    with torch.no_grad():
        model(row[None], state=state)
        assert state.table is not None
        other = model.new_state(pool=pool)
        install_without(other, row, 64, state.table.fork(64))
        assert 0 < other.lengths[0] < 64 and not other.is_exact
        with pytest.raises(CacheError, match="is exact from"):
            other.snapshot()
        with pytest.raises(CacheError, match="reach back to 64"):
            capture(other)
        with pytest.raises(CacheError, match="can be cut back exactly to 64"):
            other.truncate(other.lengths[0] - 1)
        fed = row[None, other.lengths[0] :]
        model(fed, state=other)
    assert other.is_exact and not other.is_replaying
    assert len(other.snapshot()) == len(state.snapshot())


def test_a_cut_behind_shared_pages_writes_its_own(model: Transformer) -> None:
    """Back into pages that came from elsewhere, then other tokens: the pages' other users see nothing."""
    pool = new_pool(model)
    row, other_row = some_tokens(model, 48), some_tokens(model, 60, draw_seed=9)
    state = model.new_state(rewind=48, pool=pool)
    with torch.no_grad():
        model(row[None], state=state)
        assert state.table is not None
        content = pool.read(state.table.pages)
        fork = state.fork()
        fork.truncate(21)
        a = model(other_row[None, 21:], state=fork)
        plain = model.new_state(rewind=48)
        model(row[None, :48], state=plain)
        plain.truncate(21)
        assert torch.equal(a, model(other_row[None, 21:], state=plain))
    assert torch.equal(pool.read(state.table.pages), content)
    assert fork.table is not None and fork.table.pages[:2] == state.table.pages[:2]


def test_a_full_pool_changes_nothing(model: Transformer) -> None:
    pool = new_pool(model, 3 * PAGE)
    row = some_tokens(model, 40)
    state = model.new_state(pool=pool)
    with torch.no_grad():
        model(row[None, :20], state=state)
        with pytest.raises(CacheError, match="0 free pages of 3, and 2 are needed"):
            model(row[None, 20:], state=state)
        assert state.lengths == [20] and not state.interrupted
        plain = model.new_state()
        model(row[None, :20], state=plain)
        assert torch.equal(model(row[None, 20:24], state=state), model(row[None, 20:24], state=plain))


def test_rows_and_put_row_of_paged_states(model: Transformer) -> None:
    pool = new_pool(model)
    row = some_tokens(model, 30)
    state, batch = model.new_state(pool=pool), model.new_state(batch_size=2)
    with torch.no_grad():
        model(row[None], state=state)
        twice = state.rows([0, 0])
        assert twice.batch_size == 2 and twice.table is None
        batch.put_row(1, state)
        back = model.new_state(pool=pool)
        back.put_row(0, batch.rows([1]))
        same(back, state)
        assert back.nbytes()["entries"] == state.nbytes()["entries"] > 0
        with pytest.raises(CacheError, match="a paged state has one row"):
            model.new_state(batch_size=2, pool=pool)


@pytest.mark.parametrize("preset", ["minke", "v4-flash"])
def test_checkpoint_bytes_are_the_formula(preset: str) -> None:
    """Windows, and at a multiple of 128 only the overlap rows of CSA compressors: values and scores in fp32."""
    cfg = ModelConfig.preset(preset)
    csa = sum(spec.has_indexer for spec in cfg.layers)
    window = cfg.num_hidden_layers * (cfg.sliding_window - 1) * cfg.head_dim * 2
    overlap = csa * 4 * 2 * 2 * (cfg.head_dim + cfg.index_head_dim) * 4
    assert checkpoint_bytes(cfg, torch.bfloat16, 1024, 128) == window + overlap
    if (
        preset == "v4-flash"
    ):  # the published sizes: 5.6 MB of windows, 0.8 MB of overlap rows, 5,504 tokens to run again
        assert abs(window - 5.6e6) < 0.05e6 and overlap < 0.9e6
        assert 100_000 - replay_starts(cfg, 99_968)[0] - 32 == 43 * 127


def test_tables_close_once(model: Transformer) -> None:
    pool = new_pool(model, 4 * PAGE)
    table = PageTable(pool)
    table.ensure(0, 20)
    table.close()
    table.close()
    del table
    gc.collect()
    assert pool.num_free == 4
