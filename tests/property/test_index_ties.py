"""Equal index scores: the lowest index wins, with a state and without.

ReLU makes many index scores exactly zero when the indexer has few heads. A top-k that leaves the order of
equal scores open may then pick other entries while decoding than in one pass, because its rows have other
lengths.
"""

import pytest
import torch
from small_models import TOLERANCE, build, config, full, gap, some_tokens
from torch import Tensor

from rorqual.model import Trace, Transformer

PICKS = "layers.0.attn.index_topk"
TOP_K = 3


def zero_scores(part: str) -> Transformer:
    """One CSA layer, four indexer heads, some or all scores exactly zero."""
    model = build(config(num_hidden_layers=1, compress_ratios=[4], num_hash_layers=0, index_topk=TOP_K))
    with torch.no_grad():
        weights = model.get_parameter("layers.0.attn.indexer.weights_proj.weight")
        if part == "all":
            weights.zero_()
        elif part == "three of four heads":
            weights[1:] = 0.0  # one head: its ReLU is exactly zero for about half of the entries
    return model


def picks(trace: Trace, count: int) -> list[list[int]]:
    """The chosen entries of each of `count` queries, ascending; none before the first entry."""
    if PICKS not in trace.captured:
        return [[]] * count
    found = [sorted(i for i in one if i >= 0) for one in trace.captured[PICKS][0].tolist()]
    assert len(found) == count
    return found


def cached_picks(model: Transformer, row: Tensor, chunks: list[int]) -> tuple[list[list[int]], Tensor]:
    """Picks and logits of the row fed in chunks."""
    state, found, logits = model.new_state(), [], []
    for part in row.split(chunks):
        trace = Trace(capture=(PICKS,))
        with torch.no_grad():
            logits.append(model(part[None], state=state, trace=trace)[0])
        found += picks(trace, len(part))
    return found, torch.cat(logits)


@pytest.mark.parametrize("part", ["all", "three of four heads", "none"])
@pytest.mark.parametrize("chunks", [[1] * 61, [30, 31], [5, 4, 3, 2, 1, 1, 1, 44], [47, *[1] * 14]])
def test_cached_and_uncached_picks_are_equal(part: str, chunks: list[int]) -> None:
    """The same entries whatever way the tokens come in."""
    model = zero_scores(part)
    row = some_tokens(model, 61)
    trace = Trace(capture=(PICKS,))
    with torch.no_grad():
        model(row[None], trace=trace)
    found, logits = cached_picks(model, row, chunks)
    assert found == picks(trace, 61)
    assert gap(logits, full(model, row)) < TOLERANCE


def test_the_lowest_index_wins() -> None:
    """All scores zero: the first three visible entries, whatever the number of entries behind them."""
    model = zero_scores("all")
    trace = Trace(capture=(PICKS,))
    with torch.no_grad():
        model(some_tokens(model, 1, 61), trace=trace)
    for t, found in enumerate(picks(trace, 61)):
        assert found == list(range(min(TOP_K, (t + 1) // 4))), f"t = {t}"


def test_ties_are_there() -> None:
    """The network of these tests does tie at the boundary: a stable and an unstable choice would differ."""
    model = zero_scores("three of four heads")
    trace = Trace(capture=(PICKS,))
    with torch.no_grad():
        model(some_tokens(model, 1, 61), trace=trace)
    found = picks(trace, 61)
    # Where the one head's weight is negative for a query, the entries of score zero lead, lowest index first.
    assert any(len(one) == TOP_K for one in found)
