"""Swaps read what their names say, and what a swap that changes nothing gives is the model's own answer."""

import random

import pytest
import torch
from small_models import build, config

from rorqual.engine.swaps import KINDS, as_mask, as_picks, continue_with, swaps_of
from rorqual.errors import RequestError
from rorqual.model import Segment, Trace, Transformer
from rorqual.model.trace import Swappable
from rorqual.ops.sparse_attention import Visible


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(config(compress_ratios=[0, 4, 8, 4], index_topk=4))


def text(count: int) -> list[int]:
    return [random.Random(9).randrange(20) for _ in range(count)]


@torch.inference_mode()
def logits_with(model: Transformer, ids: list[int], **trace: object) -> torch.Tensor:
    return model(torch.tensor([ids]), state=model.new_state(1), trace=Trace(**trace))  # type: ignore[arg-type]


def test_dense_is_the_dense_stage(model: Transformer) -> None:
    ids = text(90)
    dense = logits_with(model, ids, swaps=swaps_of(model, "DENSE", ids))
    assert torch.equal(dense, logits_with(model, ids, dense=True))
    assert not torch.equal(dense, logits_with(model, ids))


def test_plus_of_what_is_picked_changes_nothing(model: Transformer) -> None:
    """And minus of what no query picked."""
    ids = text(90)
    plain = logits_with(model, ids)
    far = (len(ids) - 2, len(ids))  # tokens of no complete entry
    assert torch.equal(plain, logits_with(model, ids, swaps=swaps_of(model, "MINUS", ids, far)))
    assert torch.equal(plain, logits_with(model, ids, swaps=swaps_of(model, "PLUS", ids, far)))
    assert not torch.equal(plain, logits_with(model, ids, swaps=swaps_of(model, "MINUS", ids, (0, 80))))


@torch.inference_mode()
def test_each_kind_reads_what_it_says(model: Transformer) -> None:
    draw = torch.Generator().manual_seed(0)
    count, k = 20, model.cfg.index_topk
    q, entries = torch.randn(1, 3, 4, 24, generator=draw), torch.randn(1, count, 24, generator=draw)
    end = torch.tensor([[2, 15, 20]])
    used = torch.tensor([[0, 1, -1, -1], [1, 3, 5, 14], [2, 4, 6, 19]])
    at = Swappable(q, entries, Visible(end), used, 0.2, 61)
    ids, needle = text(80), (40, 42)
    found = {}
    for kind in KINDS:
        picks = swaps_of(model, kind, ids, needle)["layers.1.attn"](at).picks
        if kind != "DENSE":
            assert picks is not None
            found[kind] = [{entry for entry in row if entry >= 0} for row in picks[0].tolist()]
    assert all(rows[0] == {0, 1} for rows in found.values())  # no choice
    assert found["RECENT"][1:] == [{11, 12, 13, 14}, {16, 17, 18, 19}]
    assert found["PLUS"][1:] == [{1, 3, 5, 14, 10, 11}, {2, 4, 6, 19, 10, 11}]
    assert found["MINUS"][1:] == [{1, 3, 5, 14}, {2, 4, 6, 19}]
    for row, seen in ((1, 15), (2, 20)):
        mass = sum((q[0, row, h] @ entries[0, :seen].T * 0.2).softmax(-1) for h in range(4))
        assert found["ORACLE"][row] == set(mass.topk(k).indices.tolist())
        assert len(found["RANDOM"][row]) == k and max(found["RANDOM"][row]) < seen
        assert len(found["LEX"][row]) <= k
    alone = swaps_of(model, "RANDOM", ids)["layers.1.attn"](
        Swappable(q[:, 2:], entries, Visible(end[:, 2:]), used[2:], 0.2, 63)
    )
    assert alone.picks is not None and set(alone.picks[0, 0].tolist()) == found["RANDOM"][2]


def test_picks_and_masks_are_the_same() -> None:
    picks = torch.tensor([[1, 4, -1], [-1, -1, -1]])
    assert torch.equal(as_picks(as_mask(picks, 6)), torch.tensor([[1, 4], [-1, -1]]))


@torch.inference_mode()
def test_without_a_swap_it_is_greedy_decoding(model: Transformer) -> None:
    prompt = text(70)
    found = continue_with(model, prompt, None, most=8, stop=-1)
    state, expected, ids = model.new_state(1), list[int](), prompt
    for _ in range(8):
        expected.append(int(model.next_scores([Segment(state, ids)]).best[0]))
        ids = expected[-1:]
    assert found == expected


def test_what_is_no_swap(model: Transformer) -> None:
    with pytest.raises(RequestError, match="without a needle"):
        swaps_of(model, "PLUS", [1])
    with pytest.raises(RequestError, match="There are DENSE"):
        swaps_of(model, "LUCK", [1])  # type: ignore[arg-type]
