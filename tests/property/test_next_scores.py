"""Scores behind a step's tokens, in one call, against the layer code: the same bits in hidden states and logits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build, config, drawn, networks, some_tokens
from torch import Tensor

from rorqual.errors import RequestError
from rorqual.model import Segment, State, Trace, Transformer
from rorqual.model.decode import Plan
from rorqual.model.packed_weights import WEIGHTS, pack_weights
from rorqual.ops.native import load

needs_native = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def by_layers(model: Transformer, tokens: Tensor, state: State) -> Tensor:
    """Logits from the layer code, which runs whatever has a trace."""
    return model(tokens, state=state, trace=Trace())


def plan_of(model: Transformer) -> Plan:
    plan = model.__dict__.get("decode_plan")
    assert isinstance(plan, Plan)
    return plan


@needs_native
@drawn(15)
@given(
    model=networks(),
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 18)), min_size=1, max_size=5),
    threads=st.sampled_from([1, 2]),
    draw=st.data(),
)
def test_any_rows_of_a_step(
    model: Transformer, sizes: list[tuple[int, int]], threads: int, draw: st.DataObject
) -> None:
    """Segments of one token or several, behind texts of any length; some rows or all, some ids or all."""
    rows = [some_tokens(model, known + new, draw_seed=i) for i, (known, new) in enumerate(sizes)]
    states = [model.new_state() for _ in rows]
    for row, state, (known, _) in zip(rows, states, sizes, strict=True):
        if known:
            model.forward_streams(row[None, :known], state=state)
    twins = [state.fork() for state in states]
    parts = [row[known:] for row, (known, _) in zip(rows, sizes, strict=True)]
    total = sum(len(part) for part in parts)
    wanted = draw.draw(st.lists(st.integers(0, total - 1), unique=True) | st.none())
    choices = draw.draw(st.integers(1, model.cfg.vocab_size) | st.none())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = parts if draw.draw(st.booleans()) else [part.tolist() for part in parts]
        found = model.next_scores([Segment(*pair) for pair in zip(states, given, strict=True)], wanted, choices)
    finally:
        torch.set_num_threads(before)
    streams = torch.cat(
        [model.forward_streams(p[None], state=s, trace=Trace()) for p, s in zip(parts, twins, strict=True)], 1
    )
    ends = torch.tensor([len(part) for part in parts]).cumsum(0) - 1
    at = ends if wanted is None else torch.tensor(wanted, dtype=torch.int64)
    hidden = model.final_hidden(streams[:, at])
    logits = model.logits(hidden)[..., :choices]
    assert torch.equal(found.streams, streams)
    assert torch.equal(found.hidden, hidden) and found.hidden.dtype is hidden.dtype
    assert torch.equal(found.logits, logits) and found.logits.dtype is torch.float32
    assert found.best == logits[0].numpy().argmax(-1).tolist()


@needs_native
@drawn(10)
@given(model=networks(), rows=st.integers(1, 5), count=st.integers(1, 12))
def test_a_call_of_the_model(model: Transformer, rows: int, count: int) -> None:
    """`model(tokens, state=state)` token by token, one sequence or a batch of them."""
    tokens = some_tokens(model, rows, count + 3)
    state, twin = model.new_state(rows), model.new_state(rows)
    for part in tokens.split([3, *[1] * count], 1):
        assert torch.equal(model(part, state=state), by_layers(model, part, twin))
    plan = plan_of(model)
    assert plan.is_usable and plan.network.head is not None


@needs_native
@pytest.mark.parametrize("weights", WEIGHTS)
def test_packed_weights_and_mtp(weights: str) -> None:
    model = build(config(num_nextn_predict_layers=1, compress_ratios=[0, 4, 8, 4, 0], index_topk=5))
    pack_weights(model, weights)
    tokens, state, twin = some_tokens(model, 1, 20), model.new_state(), model.new_state()
    for part in tokens.split(1, 1):
        assert torch.equal(model(part, state=state), by_layers(model, part, twin))
    assert plan_of(model).network.head is not None


def test_what_the_fused_head_does_not_know() -> None:
    """A head in another precision, or hooks: the layer code answers, and nothing is left out."""
    other = build(config()).to(torch.bfloat16)
    other.head.float()
    hooked = build(config())
    hooked.norm.register_forward_hook(lambda module, given, out: out * 0.5)
    for model in (other, hooked):
        tokens, state, twin, third = some_tokens(model, 1, 12), *(model.new_state() for _ in range(3))
        for part in tokens.split(1, 1):
            expected = by_layers(model, part, twin)
            assert torch.equal(model(part, state=state), expected)
            found = model.next_scores([Segment(third, part[0])])
            assert torch.equal(found.logits, expected) and found.best == [int(expected.argmax())]


@needs_native
@pytest.mark.parametrize("vocab_size", [7, 64, 75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_of_equals_and_of_broken_scores(vocab_size: int, dtype: torch.dtype) -> None:
    """The first among equals; NaN and infinity are found wherever they stand, as numpy finds them."""
    model = build(config(vocab_size=vocab_size, num_hash_layers=0)).to(dtype)
    draw = np.random.default_rng(0)
    for value in (0.0, 1.0, float("nan"), float("inf"), -float("inf")):
        for _ in range(5):
            places = draw.integers(0, vocab_size, 3)
            model.head.weight[places] = value
            found = model.next_scores([Segment(model.new_state(), torch.tensor([1])) for _ in range(3)])
            assert found.best == found.logits[0].numpy().argmax(-1).tolist()
    model.head.weight.zero_()
    assert model.next_scores([Segment(model.new_state(), torch.tensor([1]))]).best == [0]


def test_what_cannot_be_asked_for() -> None:
    model = build(config())
    state = model.new_state()
    segment = Segment(state, some_tokens(model, 4))
    for wanted, choices, text in (
        ([4], None, "the step has 4"), ([-1], None, "the step has 4"), ([0] * 5, None, "the step has 4"),
        ([0], 0, "0 ids were to be scored"), ([0], 10**6, "1000000 ids were to be scored"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=text):
            model.next_scores([segment], wanted, choices)
    assert state.lengths == [0], "nothing was read"
