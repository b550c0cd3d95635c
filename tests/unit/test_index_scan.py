"""The fused index scan: scores and picks against the reference, bit for bit where values are FP4 numbers."""

import math

import pytest
import torch
from torch import Tensor

from rorqual.errors import ConfigError
from rorqual.ops import cache_codec, index_scan
from rorqual.ops.index_scan import IndexKeys, index_scan_reference, scan_scores_reference
from rorqual.ops.native import load
from rorqual.ops.rounding import round_index_fp4

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")

SHAPES = [(64, 128, 300), (5, 32, 97), (3, 64, 48), (1, 96, 500), (2, 48, 200), (4, 6, 77)]
"""Heads, width, entries: whole tiles and odd ends; widths that 32 divides, or only 16, or 2."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rounded(*shape: int, seed: int = 0) -> Tensor:
    """FP4 numbers whose groups have different scales."""
    x = randn(*shape, seed=seed)
    return round_index_fp4(
        x * 2.0 ** torch.randint(-3, 4, (*shape[:-1], 1), generator=torch.Generator().manual_seed(seed))
    )


def paged(rows: Tensor, per_page: int, width: int) -> IndexKeys:
    """The same rows scattered over pages in a pool with other things in it."""
    pages = -(-len(rows) // per_page)
    order = torch.randperm(pages + 3, generator=torch.Generator().manual_seed(1))[:pages]
    pool = rows.new_full((pages + 3, per_page, rows.shape[-1]), 99)
    for i, page in enumerate(order.tolist()):
        part = rows[i * per_page : (i + 1) * per_page]
        pool[page, : len(part)] = part
    return IndexKeys(pool, width, order)


def forms(q: Tensor, keys: Tensor) -> dict[str, tuple[Tensor, IndexKeys]]:
    """The same FP4 numbers in every form that the scan reads."""
    width, packed = keys.shape[-1], cache_codec.encode_index_keys(keys)
    return {
        "fp32": (q, IndexKeys(keys, width)),
        "bf16": (q.bfloat16(), IndexKeys(keys.bfloat16(), width)),
        "fp4, fp32 queries": (q, IndexKeys(packed, width)),
        "fp4, bf16 queries": (q.bfloat16(), IndexKeys(packed, width)),
        "fp32 in pages": (q, paged(keys, 32, width)),
        "fp4 in pages": (q, paged(packed, 32, width)),
    }


@pytest.mark.parametrize(("heads", "width", "entries"), SHAPES)
def test_scores_of_fp4_numbers_are_the_same_bits_in_every_form(heads: int, width: int, entries: int) -> None:
    q, keys, weights = rounded(3, heads, width), rounded(entries, width), randn(3, heads)
    found = {
        name: index_scan.scan_scores(query, weights, where, entries) for name, (query, where) in forms(q, keys).items()
    }
    wanted = torch.einsum("rj,rjc->rc", weights.double(), (q.double() @ keys.double().T).relu())
    scale = torch.einsum("rj,rjc->rc", weights.double().abs(), (q.double() @ keys.double().T).relu())
    for name, scores in found.items():
        assert torch.equal(scores, found["fp32"]), name
        assert ((scores.double() - wanted).abs() <= 1e-6 * scale + 1e-12).all(), name


@pytest.mark.parametrize(("heads", "width", "entries"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_numbers(heads: int, width: int, entries: int, dtype: torch.dtype) -> None:
    """Queries that are no FP4 numbers, with plain and with packed keys."""
    q, keys, weights = randn(2, heads, width).to(dtype), rounded(entries, width), randn(2, heads)
    for where in (IndexKeys(keys.to(dtype), width), IndexKeys(cache_codec.encode_index_keys(keys), width)):
        scores = index_scan.scan_scores(q, weights, where, entries)
        products = (q.double() @ keys.to(dtype).double().T).relu()
        wanted = torch.einsum("rj,rjc->rc", weights.double(), products)
        scale = torch.einsum("rj,rjc->rc", weights.double().abs(), q.double().abs() @ keys.double().abs().T)
        assert ((scores.double() - wanted).abs() <= 1e-6 * scale + 1e-12).all()
        reference = scan_scores_reference(q.float(), weights, where, entries)
        assert ((scores - reference).abs() <= 3e-6 * scale + 1e-12).all()


@pytest.mark.parametrize("top_k", [1, 7, 64, 299, 300, 400])
def test_picks_are_the_references(top_k: int) -> None:
    q, keys, weights = rounded(11, 5, 64), rounded(300, 64), randn(11, 5)
    end = torch.tensor([300, 0, 1, 64, 65, 120, 299, 300, 300, 8, 200])
    start = torch.tensor([0, 0, 0, 10, 0, 100, 290, 299, 300, 0, 30])
    for name, (query, where) in forms(q, keys).items():
        for first in (None, start):
            wanted = index_scan_reference(q, weights, IndexKeys(keys, 64), first, end, top_k)
            found = index_scan.index_scan(query, weights, where, first, end, top_k)
            assert torch.equal(found, wanted), name


def test_picks_are_the_best_of_the_scores() -> None:
    """Against a sort of the scan's own scores, at a size that the running threshold cuts many times."""
    q, keys, weights = randn(2, 4, 32), randn(20_000, 32), randn(2, 4)
    where, end = IndexKeys(keys, 32), torch.tensor([20_000, 17_001])
    found = index_scan.index_scan(q, weights, where, None, end, 50)
    scores = index_scan.scan_scores(q, weights, where, 20_000)
    for row, picks, last in zip(scores, found, end, strict=True):
        order = row[:last].sort(descending=True, stable=True).indices[:50]
        assert torch.equal(picks, order.sort().values)


@pytest.mark.parametrize("heads", [1, 4, 5, 8, 16, 17, 37])
@pytest.mark.parametrize("lowering", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("per_page", [None, 128, 32, 20])
def test_picks_by_bounds_are_the_best_of_the_scores(heads: int, lowering: float, per_page: int | None) -> None:
    """Packed keys of one group are ruled out by upper bounds where many heads can only lower a score."""
    q, keys = rounded(3, heads, 32, seed=heads), rounded(6000, 32)
    draw = torch.Generator().manual_seed(heads)
    weights = torch.rand(3, heads, generator=draw) * torch.where(torch.rand(3, heads, generator=draw) < lowering, -1, 1)
    packed = cache_codec.encode_index_keys(keys)
    where = IndexKeys(packed, 32) if per_page is None else paged(packed, per_page, 32)
    start, end = torch.tensor([0, 7, 50]), torch.tensor([6000, 5990, 3001])
    exact = index_scan.scan_scores(q, weights, IndexKeys(keys, 32), 6000)
    for top_k in (1, 30, 500):
        found = index_scan.index_scan(q, weights, where, start, end, top_k)
        for row, picks, first, last in zip(exact, found, start.tolist(), end.tolist(), strict=True):
            order = row[first:last].sort(descending=True, stable=True).indices[:top_k] + first
            assert torch.equal(picks, order.sort().values)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_scores_in_the_worst_order(order: str) -> None:
    """Every entry beats the ones before it, or none does, or all are equal: then the first win."""
    step = {"rising": 1.0, "falling": -1.0, "equal": 0.0}[order]
    keys = torch.zeros(5000, 32)
    keys[:, 0] = 6000 + step * torch.arange(5000.0)
    q, weights = torch.zeros(1, 1, 32), torch.ones(1, 1)
    q[..., 0] = 1.0
    found = index_scan.index_scan(q, weights, IndexKeys(keys, 32), None, torch.tensor([5000]), 10)
    wanted = range(4990, 5000) if order == "rising" else range(10)
    assert found[0].tolist() == list(wanted)


def test_ties_go_to_the_lowest_index() -> None:
    """One head whose relu is zero for about half of the entries, with a negative weight: the zeros lead."""
    q, keys, weights = rounded(1, 1, 32), rounded(3000, 32), -torch.ones(1, 1)
    scores = index_scan.scan_scores(q, weights, IndexKeys(keys, 32), 3000)[0]
    zeros = (scores == 0).nonzero().flatten()
    assert 1000 < len(zeros) < 2000
    found = index_scan.index_scan(q, weights, IndexKeys(keys, 32), None, torch.tensor([3000]), 100)
    assert torch.equal(found[0], zeros[:100])


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads() -> None:
    """Alone, in a call of 19, and with two threads: the same bits."""
    q, keys, weights = randn(19, 6, 64), rounded(2000, 64), randn(19, 6)
    q[::3] = round_index_fp4(q[::3])  # some take the path for FP4 numbers, some do not
    end = torch.arange(19) * 100 + 150
    before = torch.get_num_threads()
    try:
        for where in (IndexKeys(keys, 64), IndexKeys(cache_codec.encode_index_keys(keys), 64)):
            scores = index_scan.scan_scores(q, weights, where, 2000)
            together = index_scan.index_scan(q, weights, where, None, end, 40)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for i in range(19):
                    row = slice(i, i + 1)
                    alone = index_scan.index_scan(q[row], weights[row], where, None, end[row], 40)
                    assert torch.equal(alone, together[row])
                    assert torch.equal(index_scan.scan_scores(q[row], weights[row], where, 1500), scores[row, :1500])
                assert torch.equal(index_scan.index_scan(q, weights, where, None, end, 40), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp4, fp32 queries"])
def test_numbers_that_are_not_finite(form: str) -> None:
    """A NaN leads, an infinite score follows its sign, and -inf is never chosen."""
    keys, q, weights = torch.ones(200, 32), torch.ones(1, 1, 32), torch.ones(1, 1)
    keys[150, 3], keys[20, 0], keys[30, 0] = math.nan, math.inf, -math.inf
    query, where = forms(q, keys)[form]
    found = index_scan.index_scan(query, weights, where, None, torch.tensor([200]), 3)[0].tolist()
    if form.startswith("fp4"):  # a group that is not finite is NaN in packed rows
        assert found == [20, 30, 150]
    else:
        assert found == [0, 20, 150]
        minus = index_scan.index_scan(query, -weights, where, None, torch.tensor([200]), 199)[0].tolist()
        assert minus == [i for i in range(200) if i != 20]


def test_a_query_that_is_not_finite_takes_the_first_entries() -> None:
    keys = cache_codec.encode_index_keys(rounded(100, 32))
    q = torch.full((1, 2, 32), math.nan)
    found = index_scan.index_scan(q, torch.ones(1, 2), IndexKeys(keys, 32), None, torch.tensor([100]), 5)
    assert found[0].tolist() == [0, 1, 2, 3, 4]


def test_no_choice_without_places() -> None:
    with pytest.raises(ConfigError, match="index_topk is 0"):
        index_scan.index_scan(
            torch.ones(1, 1, 32), torch.ones(1, 1), IndexKeys(torch.ones(4, 32), 32), None, torch.tensor([4]), 0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "broken"])
@pytest.mark.parametrize("top_k", [1, 16, 100])
def test_blocks(dtype: torch.dtype, kind: str, top_k: int) -> None:
    """Several blocks of scores: what is picked are the best of `scan_scores`, the first among equals."""
    torch.manual_seed(top_k)
    q, weights, keys = torch.randn(40, 16, 32), torch.randn(40, 16), torch.randn(3000, 32)
    if kind == "ties":
        q, weights, keys = q.round(), weights.round(), keys.round()
    elif kind == "zeros":
        weights, keys = weights * 1e-38, torch.where(keys.abs() < 2, 0.0, keys)
    elif kind == "broken":
        keys[100], keys[200], q[3] = torch.nan, torch.inf, torch.nan
    q, keys = q.to(dtype), IndexKeys(keys.to(dtype), 32)
    end = torch.randint(0, 3001, (40,))
    start = torch.minimum(end, torch.randint(0, 1500, (40,)))
    scores = index_scan.scan_scores(q, weights, keys, 3000)
    scores = torch.where(scores.isnan(), torch.inf, scores) + 0.0
    for first in (None, start):
        picks = index_scan.index_scan(q, weights, keys, first, end, top_k)
        for row, (lo, hi) in enumerate(zip((torch.zeros_like(end) if first is None else first), end, strict=True)):
            order = scores[row, lo:hi].sort(descending=True, stable=True).indices[:top_k] + lo
            assert [i for i in picks[row].tolist() if i >= 0] == sorted(order.tolist())
