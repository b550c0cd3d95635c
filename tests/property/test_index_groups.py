"""Grouped index search: groups against their reference, the choice against its definition, and the states with them."""

from collections.abc import Iterator

import pytest
import torch
from mock_model import byte_tokenizer
from small_models import build, config
from torch import Tensor

from rorqual.engine import Engine, EngineSettings, SamplingParams
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.engine.settings import CacheSettings
from rorqual.errors import CacheError, ConfigError
from rorqual.model import Segment, Transformer, decode, indexer
from rorqual.model.index_groups import search_index_by
from rorqual.model.pages import PagePool
from rorqual.ops import index_groups as op
from rorqual.ops.cache_codec import decode_index_keys, encode_index_keys
from rorqual.ops.index_groups import FINE, LAG, PARTS, PER_SEGMENT, SEGMENT, Groups, room_for
from rorqual.ops.index_scan import IndexKeys, index_scan, scan_scores

TOKENIZER = byte_tokenizer()
BUDGET = 96
"""Groups a query scores here, so that short texts do."""
LONG = 4 * (2 * SEGMENT + LAG) + 37
"""Tokens that leave two segments in groups."""


def keys_of(kind: str, count: int, seed: int = 1) -> IndexKeys:
    """Random keys in clusters: fp32, bf16 or packed; in pages out of order for `pages`."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, 32, generator=draw) * 2
    rows = centres[torch.randint(0, 40, (count,), generator=draw)] + torch.randn(count, 32, generator=draw)
    if kind == "bf16":
        return IndexKeys(rows.bfloat16(), 32)
    if kind == "packed":
        return IndexKeys(encode_index_keys(rows), 32)
    if kind == "pages":
        table = torch.randperm(count // 32, generator=draw)
        pages = torch.zeros(count // 32, 32, 32)
        pages[table] = rows[: count // 32 * 32].unflatten(0, (-1, 32))
        return IndexKeys(pages, 32, table)
    return IndexKeys(rows, 32)


def groups_of(keys: IndexKeys, segments: int) -> Groups:
    groups = room_for(segments, keys.width, keys.rows.device)
    op.make_groups(keys, groups, 0, segments)
    return groups


@pytest.mark.parametrize("kind", ["fp32", "bf16", "packed", "pages"])
def test_groups_are_those_of_the_reference(kind: str) -> None:
    """Almost all: where two keys lie equally far along a direction, rounding decides."""
    keys = keys_of(kind, 3 * SEGMENT)
    mine, theirs = groups_of(keys, 3), room_for(3, 32, keys.rows.device)
    op.make_groups_reference(keys, theirs, 0, 3)
    assert (mine.order == theirs.order).float().mean() > 0.98
    places = mine.places()
    assert places.flatten().sort().values.tolist() == list(range(3 * SEGMENT))
    assert (places[:, 1:] > places[:, :-1]).all()
    members = keys.gather(3 * SEGMENT).float()[places]
    for packed, parts in ((mine.means, members.unflatten(0, (-1, PARTS)).flatten(1, 2)), (mine.fine, members)):
        codes, worth, radius = op.unpacked(packed, 32)
        assert codes.abs().amax(1).eq(op.MOST_CODE).all()
        assert torch.allclose(codes * worth[:, None], parts.mean(1), atol=0.51 * float(worth.max()))
        spread = ((parts - parts.mean(1, keepdim=True)) ** 2).sum(-1).mean(1).sqrt()
        assert torch.allclose(radius, op.RADIUS * spread, atol=1e-4)
    later = room_for(3, 32, keys.rows.device)
    for first in range(3):  # one after the other
        op.make_groups(keys, later, first, first + 1)
    assert all(map(torch.equal, later, mine))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "packed", "pages"])
def test_picks_are_the_best_of_the_best_groups(kind: str) -> None:
    count = 4 * SEGMENT + LAG + 200
    keys, draw = keys_of(kind, count // 32 * 32 if kind == "pages" else count), torch.Generator().manual_seed(2)
    count = count // 32 * 32
    groups = groups_of(keys, 4)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    q = torch.randn(6, 5, 32, generator=draw)
    q = (decode_index_keys(encode_index_keys(q), 32) if kind == "packed" else q).to(dtype)
    weights = torch.randn(6, 5, generator=draw)
    end = torch.tensor([10, SEGMENT + LAG - 1, SEGMENT + LAG, 2 * SEGMENT + LAG + 5, count - 1, count])
    with torch.inference_mode():
        found = op.index_search(q, weights, keys, groups, end, 16, BUDGET)
        scores, exact = scan_scores(q, weights, keys, count), index_scan(q, weights, keys, None, end, 16)
    assert torch.equal(found[:2], exact[:2]), "too few for groups"
    for row in range(2, 6):
        segments = op.grouped_segments(int(end[row]))
        best = groups.places()[op.best_parts(q[row], weights[row], groups, segments * PER_SEGMENT, BUDGET)].flatten()
        allowed = torch.cat([best, torch.arange(segments * SEGMENT, int(end[row]))])
        wanted = allowed[scores[row, allowed].topk(16).indices].sort().values
        assert torch.equal(found[row], wanted)
        again = op.index_search(
            q[row : row + 1], weights[row : row + 1], keys, groups, end[row : row + 1], 16, BUDGET
        )  # fmt: skip
        assert torch.equal(again[0], found[row]), "neighbours do not matter"
    whole = op.index_search(q, weights, keys, groups, end, 16, 4 * PER_SEGMENT * PARTS)
    assert torch.equal(whole, exact), "with every part it is the exact scan"


def test_a_broken_key_shows_and_nothing_hangs() -> None:
    keys = keys_of("fp32", 3 * SEGMENT + LAG)
    keys.rows[700], keys.rows[1500] = float("nan"), float("inf")
    groups, q = groups_of(keys, 3), torch.randn(1, 4, 32)
    with torch.inference_mode():
        found = op.index_search(q, torch.ones(1, 4), keys, groups, torch.tensor([3 * SEGMENT + LAG]), 8, BUDGET)
    assert 700 in found[0]


def test_equal_keys_are_cut_by_their_order() -> None:
    groups = groups_of(IndexKeys(torch.ones(SEGMENT, 32), 32), 1)
    assert groups.places()[-1].tolist() == list(range(FINE)), "the first ones go up every time"


# States


@pytest.fixture(scope="module")
def model() -> Iterator[Transformer]:
    """Window, CSA, HCA, CSA; few groups are searched, so that ten thousand tokens are many."""
    cfg = config(
        vocab_size=TOKENIZER.vocab_size,
        compress_ratios=[0, 4, 8, 4],
        index_search="grouped",
        max_position_embeddings=1 << 15,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "BUDGET", BUDGET)
        patch.setattr(indexer, "BUDGET", BUDGET)
        yield build(cfg)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(3, 259, (LONG + 64,), generator=torch.Generator().manual_seed(5))


def after(model: Transformer, text: Tensor, cuts: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Scores behind the last 24 tokens, one by one, after reading the rest cut at these places."""
    state, out = model.new_state(), []
    for begin, end in zip([0, *cuts], [*cuts, LONG], strict=True):
        model.step([Segment(state, text[begin:end])])
    for at in range(LONG, LONG + 24):
        out.append(model.next_scores([Segment(state, text[at : at + 1])]).logits[0])
    return torch.cat(out), [layer.groups for layer in state.layers]


@pytest.fixture(scope="module")
def expected(model: Transformer, text: Tensor) -> Tensor:
    with torch.inference_mode():
        scores, groups = after(model, text, [])
    assert [None if one is None else one.made[0] for one in groups] == [None, 2, None, 2]
    return scores


def test_another_choice_is_made(model: Transformer, text: Tensor, expected: Tensor) -> None:
    """Or nothing here would be tested."""
    with torch.inference_mode():
        search_index_by(model, "exact")
        exact, groups = after(model, text, [])
        search_index_by(model, "grouped")
    assert groups == [None] * 4 and not torch.equal(exact, expected)


@pytest.mark.parametrize("cuts", [[1], [4 * SEGMENT + 3, 4 * SEGMENT + 4], [100, 8191, 8192, 8200, 10_001]])
def test_chunks_do_not_matter(model: Transformer, text: Tensor, expected: Tensor, cuts: list[int]) -> None:
    with torch.inference_mode():
        assert torch.equal(after(model, text, cuts)[0], expected)


def test_the_layer_code_is_the_reference(
    model: Transformer, text: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "plan_of", lambda model, states: None)
    with torch.inference_mode():
        state = model.new_state()
        model.step([Segment(state, text[:LONG])])
        streams = model.step([Segment(state, text[LONG : LONG + 24])])
        assert torch.equal(model.logits(model.final_hidden(streams))[0], expected)


@pytest.mark.parametrize("back", [1, 9, 60])
def test_states_that_are_cut_back_copied_and_restored(
    model: Transformer, text: Tensor, expected: Tensor, back: int
) -> None:
    """Across the end of a segment: other tokens were there before, and their groups are gone."""
    edge = 4 * 2 * SEGMENT
    with torch.inference_mode():
        state = model.new_state()
        model.step([Segment(state, text[: edge - back])])
        model.step([Segment(state, text.flip(0)[:80])])
        model.step([Segment(state, text[:1])])
        assert state.layers[1].groups.made == [2]
        state.truncate(edge - back)
        assert state.layers[1].groups.made == [1]
        forked, restored = state.fork(), model.restore(state.snapshot())
        for one in (state, forked, restored):
            model.step([Segment(one, text[edge - back : LONG])])
            scores = [model.next_scores([Segment(one, text[at : at + 1])]).logits[0] for at in range(LONG, LONG + 24)]
            assert torch.equal(torch.cat(scores), expected)


def test_pages(model: Transformer, text: Tensor, expected: Tensor) -> None:
    with torch.inference_mode():
        pool = PagePool(model.cfg, model.reference, 2 * LONG + 4096)
        state = model.new_state(pool=pool)
        model.step([Segment(state, text[:5000])])
        other = state.fork()  # pages of the two are mixed from here on
        for one in (state, other):
            model.step([Segment(one, text[5000:7000])])
        for one in (other, state):
            model.step([Segment(one, text[7000:LONG])])
            scores = [model.next_scores([Segment(one, text[at : at + 1])]).logits[0] for at in range(LONG, LONG + 24)]
            assert torch.equal(torch.cat(scores), expected)


def test_a_state_belongs_to_one_search(model: Transformer) -> None:
    state = model.new_state()
    with torch.inference_mode():
        search_index_by(model, "exact")
        with pytest.raises(CacheError, match="index_search"):
            model.step([Segment(state, torch.tensor([5]))])
        search_index_by(model, "grouped")
    with pytest.raises(ConfigError, match="index_search"):
        search_index_by(model, "best")


def test_engines_say_it_and_the_cache_gives_the_same_tokens(model: Transformer, text: Tensor) -> None:
    prompt, own = text[:LONG].tolist(), SamplingParams(temperature=0, max_tokens=12)
    with Engine(model, TOKENIZER, chunk=512) as engine:
        [plain] = engine.generate(prompt, own)
        assert plain.exactness is not None and plain.exactness.index_search == "grouped"
    settings = EngineSettings(index_search="grouped", speculate=True, cache=CacheSettings(memory_bytes=1 << 24))
    with settings.open(model, TOKENIZER) as engine:
        for ids in (prompt[:9000], prompt, prompt):
            [out] = engine.generate(ids, own)
        assert out.ids == plain.ids and out.usage.cached_tokens > 9000
    cache = PrefixCache(model, memory_bytes=1 << 22, running_tokens=4096)
    with pytest.raises(ConfigError, match="index_search"):
        Engine(model, TOKENIZER, prefix_cache=cache, index_search="exact")
    cache.close()
    settings = EngineSettings(index_search="exact")
    with settings.open(model, TOKENIZER) as engine:
        assert engine.generate([5, 6], own)[0].exactness.index_search == "exact"
    search_index_by(model, "grouped")
