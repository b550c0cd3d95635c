"""However an index scan is cut into calls, threads, tiles and pages, a query's picks stay the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.ops import cache_codec
from rorqual.ops.index_scan import IndexKeys, index_scan, index_scan_reference, scan_scores
from rorqual.ops.native import load
from rorqual.ops.rounding import round_index_fp4

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


@st.composite
def scans(draw) -> dict:
    """FP4 numbers from few different rows, so that many scores are equal, and ragged visible ranges."""
    heads, width = draw(st.integers(1, 9)), draw(st.sampled_from([16, 32, 64, 128]))
    entries, queries = draw(st.integers(1, 400)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kinds = draw(st.integers(1, 60))
    pool = round_index_fp4(torch.randn(kinds, width, generator=generator))
    end = torch.randint(0, entries + 1, (queries,), generator=generator)
    start = (torch.rand(queries, generator=generator) * end * 0.5).long() if draw(st.booleans()) else None
    return {
        "q": round_index_fp4(torch.randn(queries, heads, width, generator=generator)),
        "weights": torch.randn(queries, heads, generator=generator),
        "keys": pool[torch.randint(0, kinds, (entries,), generator=generator)],
        "start": start,
        "end": end,
        "top_k": draw(st.integers(1, 70)),
        "per_page": draw(st.integers(1, 64)),
        "cut": draw(st.integers(0, queries)),
        "packed": draw(st.booleans()),
    }


@settings(max_examples=60, deadline=None)
@given(scans())
def test_picks_do_not_depend_on_the_cut(case: dict) -> None:
    q, weights, end, top_k, cut = (case[name] for name in ("q", "weights", "end", "top_k", "cut"))
    start, width, keys = case["start"], case["q"].shape[-1], case["keys"]
    rows = cache_codec.encode_index_keys(keys) if case["packed"] else keys
    whole = IndexKeys(rows, width)
    found = index_scan(q, weights, whole, start, end, top_k)
    assert torch.equal(found, index_scan_reference(q, weights, IndexKeys(keys, width), start, end, top_k))
    halves = [
        index_scan(q[part], weights[part], whole, None if start is None else start[part], end[part], top_k)
        for part in (slice(cut), slice(cut, None))
        if len(q[part])
    ]
    assert torch.equal(torch.cat(halves), found)
    pages = -(-len(keys) // case["per_page"])
    pool = torch.zeros(pages * case["per_page"], rows.shape[-1], dtype=rows.dtype)
    pool[: len(rows)] = rows
    table = torch.arange(pages).flip(0)
    paged = IndexKeys(pool.view(pages, case["per_page"], -1).flip(0).contiguous(), width, table)
    assert torch.equal(index_scan(q, weights, paged, start, end, top_k), found)


@settings(max_examples=40, deadline=None)
@given(scans())
def test_scores_do_not_depend_on_what_else_is_there(case: dict) -> None:
    q, weights, keys = case["q"], case["weights"], case["keys"]
    where = IndexKeys(keys, q.shape[-1])
    scores = scan_scores(q, weights, where, len(keys))
    packed = IndexKeys(cache_codec.encode_index_keys(keys), q.shape[-1])
    assert torch.equal(scan_scores(q.bfloat16(), weights, packed, len(keys)), scores)
    row, length = case["cut"] % len(q), 1 + case["cut"] % len(keys)
    alone = scan_scores(q[row : row + 1], weights[row : row + 1], IndexKeys(keys[:length], q.shape[-1]), length)
    assert torch.equal(alone[0], scores[row, :length])
