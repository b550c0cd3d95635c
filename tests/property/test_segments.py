"""A flat batch of several sequences' next tokens: every token as if its sequence were alone, the same bits.

Layer kinds, hash routing, windows and picks are drawn; some sequences decode, others read chunks of their prompts.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import TOLERANCE, build, config, drawn, full, gap, models, some_tokens
from torch import Tensor

from rorqual.errors import CacheError, RequestError
from rorqual.model import Segment, Transformer
from rorqual.model.engram import memories
from rorqual.ops.native import usable

schedules = st.lists(st.lists(st.integers(0, 3) | st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=7)
"""For each step, how many tokens each of the sequences takes; 0: it is not in the step."""


def with_memories(**changes: Any) -> Transformer:
    settings = {"layers": [0, 2], "rows": 41, "orders": [2, 3], "heads": 2, "head_dim": 4, **changes}
    return build(config(engram=settings))


MEMORIES = {
    "paper": with_memories(),
    "v41": with_memories(flavour="v41", pad_token_id=5),
    "host": with_memories(orders=[1, 4], kernel=3, placement="host"),
}


def run(model: Transformer, steps: list[list[int]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Rows, their logits from flat steps, and their logits when the same pieces are fed to one state a row."""
    count = max(len(step) for step in steps)
    steps = [[*step, *[0] * (count - len(step))] for step in steps]
    rows = [some_tokens(model, max(1, sum(step[r] for step in steps)), draw_seed=r) for r in range(count)]
    states, alone = [model.new_state() for _ in rows], [model.new_state() for _ in rows]
    flat: list[list[Tensor]] = [[] for _ in rows]
    single: list[list[Tensor]] = [[] for _ in rows]
    with torch.no_grad():
        for step in steps:
            taken = [r for r, n in enumerate(step) if n]
            parts = {r: rows[r][states[r].lengths[0] :][: step[r]] for r in taken}
            if not taken:
                continue
            streams = model.step([Segment(states[r], parts[r]) for r in taken])
            logits = model.logits(model.final_hidden(streams))[0]
            for r, piece in zip(taken, logits.split([step[r] for r in taken]), strict=True):
                flat[r].append(piece)
                single[r].append(model(parts[r][None], state=alone[r])[0])
    empty = torch.zeros(0, model.cfg.vocab_size)
    for r, (one, other) in enumerate(zip(states, alone, strict=True)):
        assert one.lengths == other.lengths == [sum(step[r] for step in steps)]
        assert torch.equal(one.tokens[:, : one.lengths[0]], other.tokens[:, : other.lengths[0]])
    return rows, [torch.cat([empty, *x]) for x in flat], [torch.cat([empty, *x]) for x in single]


def same(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Bit by bit where the native operations run; the references add up in an order that depends on the batch."""
    return torch.equal(a, b) if usable(torch.zeros(1)) else gap(a, b) < tolerance


def check(model: Transformer, steps: list[list[int]]) -> None:
    for row, flat, single in zip(*run(model, steps), strict=True):
        assert same(flat, single)
        assert same(flat, full(model, row)[: len(flat)])


@drawn()
@given(model=models(), steps=schedules)
def test_segments_do_not_see_each_other(model: Transformer, steps: list[list[int]]) -> None:
    check(model, steps)


@drawn(8)
@given(name=st.sampled_from(sorted(MEMORIES)), steps=schedules)
def test_memories_of_token_runs_stay_within_their_sequence(name: str, steps: list[list[int]]) -> None:
    check(MEMORIES[name], steps)


def test_the_memories_read_here_matter() -> None:
    model = MEMORIES["paper"]
    _, flat, _ = run(model, [[9, 4], [1, 1], [1, 7]])
    for memory in memories(model):
        memory.is_off = True
    _, without, _ = run(model, [[9, 4], [1, 1], [1, 7]])
    for memory in memories(model):
        memory.is_off = False
    assert all(gap(a, b) > 0.05 for a, b in zip(flat, without, strict=True))


def test_bfloat16_too() -> None:
    model = build(config()).to(torch.bfloat16)
    for _, flat, single in zip(*run(model, [[30, 1, 9], [1, 1, 5], [1, 12, 1]]), strict=True):
        assert same(flat, single, 0.05 * float(single.abs().max()))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(config())


def test_impossible_segments_are_refused_and_change_nothing(model: Transformer) -> None:
    good, other = model.new_state(), build(config()).new_state()
    ids = some_tokens(model, 3)
    shared = Segment(good, ids)
    stopped = model.new_state()
    stopped.interrupted = True
    refused = [
        ([], RequestError, "no segments"),
        ([Segment(good, ids[None])], RequestError, "shape"),
        ([Segment(good, ids[:0])], RequestError, "n from 1"),
        ([shared, Segment(model.new_state(), ids + 64)], RequestError, "vocabulary"),
        ([shared, Segment(other, ids)], CacheError, "another model"),
        ([shared, Segment(model.new_state(2), ids)], CacheError, "2 rows"),
        ([shared, shared], CacheError, "share a state"),
        ([shared, Segment(stopped, ids)], CacheError, "stopped half-way"),
    ]
    for segments, error, text in refused:
        with pytest.raises(error, match=text):
            model.step(segments)
    assert good.lengths == [0]
    with torch.no_grad():
        logits = model.logits(model.final_hidden(model.step([shared])))[0]
    assert gap(logits, full(model, ids)) < TOLERANCE
