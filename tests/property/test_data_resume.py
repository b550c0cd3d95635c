"""For any mixture, shapes and interruption: no token is lost, and a resumed stream is the same stream."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import Batch, Document, PackedLoader
from rorqual.seeds import derive

PAD = 2


@dataclass
class DrawnSource:
    """Units of one to three documents of hashed lengths; every token is a number of its own."""

    name: str
    number: int
    max_length: int
    has_splittable: bool
    fingerprint: str = "f"

    def documents(self, seed: int, index: int) -> list[Document]:
        made = []
        for part in range(1 + derive(seed, self.name, index) % 3):
            draw = derive(seed, self.name, index, part)
            n = draw % self.max_length
            first = 10 + ((self.number * 10_000 + index) * 3 + part) * 1000
            ids = np.concatenate([[0], first + np.arange(n)]).astype(np.int64)
            mask = np.array([False] + [derive(draw, i) % 3 > 0 for i in range(n)])
            made.append(Document(ids, mask, self.has_splittable and draw % 5 > 0))
        return made


sources_strategy = st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=3).map(
    lambda kinds: [DrawnSource(f"s{i}", i, n, split) for i, (n, split) in enumerate(kinds)]
)
plan_strategy = st.lists(st.tuples(st.sampled_from([8, 33, 96]), st.integers(1, 4)), min_size=2, max_size=7)


def make(sources: list[DrawnSource], seed: int, prefetch: int = 0) -> PackedLoader:
    return PackedLoader(sources, seq_len=16, batch_size=2, seed=seed, pad_token_id=PAD, prefetch=prefetch)


def follow(data: PackedLoader, plan: list[tuple[int, int]]) -> list[Batch]:
    batches = []
    for seq_len, batch_size in plan:
        data.set_seq_len(seq_len)
        data.set_batch_size(batch_size)
        batches.append(next(data))
    return batches


@settings(max_examples=60, deadline=None)
@given(sources_strategy, plan_strategy, st.integers(0, 3), st.data())
def test_resume_is_exact(
    sources: list[DrawnSource], plan: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(plan)))
    expected = follow(make(sources, seed), plan)
    with make(sources, seed, prefetch=data.draw(st.sampled_from([0, 2]))) as first:
        follow(first, plan[:cut])
        saved: dict[str, Any] = json.loads(json.dumps(first.state_dict()))
    second = make(sources, seed)
    second.load_state_dict(saved)
    for mine, theirs in zip(follow(second, plan[cut:]), expected[cut:], strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert torch.equal(mine.labels, theirs.labels)
        assert torch.equal(mine.segment_ids, theirs.segment_ids)


@settings(max_examples=60, deadline=None)
@given(sources_strategy, plan_strategy, st.integers(0, 3))
def test_no_token_is_lost_or_doubled(sources: list[DrawnSource], plan: list[tuple[int, int]], seed: int) -> None:
    loader = make(sources, seed)
    placed: list[int] = []
    for batch in follow(loader, plan):
        assert not ((batch.labels != -100) & (batch.tokens == PAD)).any()
        placed += [t for t in batch.tokens.flatten().tolist() if t >= 10]
    state = loader.state_dict()["packer"]
    drawn: list[int] = []
    for source, cursor in zip(sources, state["cursors"], strict=True):
        for index in range(cursor):
            for document in source.documents(seed, index):
                drawn += document.ids[1:].tolist()
    waiting: list[int] = []
    for number, index, part, offset in state["waiting"]:
        rest = sources[number].documents(seed, index)[part].ids[offset:]
        waiting += [t for t in rest.tolist() if t >= 10]
    assert sorted(placed + waiting) == sorted(drawn)
    assert len(state["waiting"]) < 8 + 3 * 70
