"""The fused decode step against the layer code: the same bits, in streams and in what the states remember."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build, chunkings, config, drawn, models, some_tokens
from torch import Tensor

from rorqual.model import Segment, State, Trace, Transformer, quantised
from rorqual.model.decode import Plan
from rorqual.model.pages import PagePool
from rorqual.ops.native import load

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def by_layers(model: Transformer, tokens: Tensor, state: State) -> Tensor:
    """Streams from the layer code, which runs whatever has a trace."""
    return model.forward_streams(tokens, state=state, trace=Trace())


def uses_step(model: Transformer) -> bool:
    """Whether this model's single tokens go through the fused step."""
    state = model.new_state()
    model(some_tokens(model, 1, 1), state=state)
    plan = model.__dict__.get("decode_plan")
    return isinstance(plan, Plan) and plan.is_usable and state.decoding is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_residue(threads: int, dtype: torch.dtype) -> None:
    """All positions mod 4 and mod 128, twice; window, CSA and HCA, hash and learned routing."""
    model = build(config(compress_ratios=[0, 4, 128, 4], sliding_window=9, index_topk=5)).to(dtype)
    row, fused, layers = some_tokens(model, 1, 290), model.new_state(rewind=3), model.new_state(rewind=3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = torch.cat([model.forward_streams(token, state=fused) for token in row.split(1, 1)], 1)
    finally:
        torch.set_num_threads(before)
    assert uses_step(model)
    assert torch.equal(found, model.forward_streams(row))
    by_layers(model, row[:, :150], layers)
    for token in row[:, 150:].split(1, 1):
        by_layers(model, token, layers)
    for spec, mine, theirs in zip(model.cfg.layers, fused.layers, layers.layers, strict=True):
        for name, value in mine.tensors().items():
            held = 290 // spec.compress_ratio if name in ("entries", "index_keys") else None
            assert torch.equal(value[:, :held], theirs.tensors()[name][:, :held]), f"layer {spec.index}: {name}"


@drawn(10)
@given(model=models(), chunks=chunkings(), is_half=st.booleans(), is_paged=st.booleans())
def test_between_chunks(model: Transformer, chunks: list[int], is_half: bool, is_paged: bool) -> None:
    """Random networks: chunks by the layer code and single tokens by the step continue each other."""
    model = model.to(torch.bfloat16 if is_half else torch.float32)
    row = some_tokens(model, 1, sum(chunks) + 2)
    pool = PagePool(model.cfg, model.reference, 256, 16) if is_paged else None
    state = model.new_state(rewind=2, pool=pool)
    parts = row.split([*chunks, 1, 1], 1)
    found = torch.cat([model.forward_streams(part, state=state) for part in parts], 1)
    assert torch.equal(found, model.forward_streams(row))
    assert uses_step(model)


@drawn(10)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9), steps=st.integers(1, 9), is_half=st.booleans())
def test_many_sequences(lengths: list[int], steps: int, is_half: bool) -> None:
    """Sequences of different lengths, some in pages, and a prompt beside them, give what each gives alone."""
    model = build(config(num_nextn_predict_layers=0)).to(torch.bfloat16 if is_half else torch.float32)
    pool = PagePool(model.cfg, model.reference, 1024, 16)
    rows = [some_tokens(model, n + steps, draw_seed=i) for i, n in enumerate(lengths)]
    states = [model.new_state(pool=pool if i % 3 == 1 else None) for i in range(len(rows))]
    found: list[list[Tensor]] = [[] for _ in rows]
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        if n:
            found[i].append(model.forward_streams(row[None, :n], state=states[i])[0])
    for number in range(steps):
        segments = [Segment(s, row[n + number :][:1]) for s, row, n in zip(states, rows, lengths, strict=True)]
        prompt = Segment(model.new_state(), some_tokens(model, 5))
        streams = model.step([*segments[:1], prompt, *segments[1:]])[0]
        assert torch.equal(streams[1:6], model.forward_streams(prompt.tokens[None])[0])
        for i, out in enumerate(torch.cat([streams[:1], streams[6:]]).split(1)):
            found[i].append(out)
    for row, parts in zip(rows, found, strict=True):
        assert torch.equal(torch.cat(parts), model.forward_streams(row[None])[0])


def test_rows_of_one_state() -> None:
    """Rows of one state that stand at different places."""
    model = build(config())
    rows = [some_tokens(model, 30, draw_seed=r) for r in range(3)]
    state, begun = model.new_state(3), [1, 7, 20]
    tokens = torch.zeros(3, 20, dtype=torch.int64)
    for r, n in enumerate(begun):
        tokens[r, :n] = rows[r][:n]
    model(tokens, lengths=begun, state=state)
    for number in range(10):
        next_ids = torch.stack([rows[r][n + number] for r, n in enumerate(begun)])
        streams = model.forward_streams(next_ids[:, None], state=state)
        for r, n in enumerate(begun):
            assert torch.equal(streams[r, 0], model.forward_streams(rows[r][None, : n + number + 1])[0, -1])
    assert state.lengths == [11, 17, 30]


def other_models() -> list[tuple[str, Transformer]]:
    """Models that only the layer code can run."""
    rounded = build(config(activation_rounding="v4-inputs"))
    stored = build(config())
    quantised.quantise(stored, "fp4")
    hooked = build(config())
    hooked.layers[1].ffn.register_forward_hook(lambda module, given, out: out * 0.5)
    plain = build(config(residual="plain", hc_mult=1))
    return [("rounded", rounded), ("quantised", stored), ("hooked", hooked), ("plain", plain)]


@pytest.mark.parametrize(("name", "model"), [pytest.param(*pair, id=pair[0]) for pair in other_models()])
def test_what_the_step_does_not_know(name: str, model: Transformer) -> None:
    """Such models decode by the layer code, and nothing is left out."""
    row, fused, layers = some_tokens(model, 1, 12), model.new_state(), model.new_state()
    for token in row.split(1, 1):
        assert torch.equal(model.forward_streams(token, state=fused), by_layers(model, token, layers)), name
    assert not model.__dict__["decode_plan"].is_usable


def test_changes_between_steps_are_seen() -> None:
    """Weights changed in place, cast or rounded, and copies of models and states, never leave an old address behind."""
    model = build(config())
    row, state = some_tokens(model, 1, 12), model.new_state()
    model(row, state=state)
    token = row[:, :1]
    model(token, state=state)
    with torch.no_grad():
        model.layers[1].attn_norm.weight.mul_(1.5)  # in place, in the middle of a sequence
    assert torch.equal(model.forward_streams(token, state=state.fork()), by_layers(model, token, state.fork()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.layers[1].ffn.experts.w1.data.mul_(0.5)
        assert torch.equal(twin.forward_streams(row[:, :1], state=twin.new_state()), twin.forward_streams(row[:, :1]))
    other = copy.copy(state)
    other.layers = [layer.map(torch.clone) for layer in state.layers]
    other.lengths, other.tokens, other.floor = [*state.lengths], state.tokens.clone(), [*state.floor]
    assert torch.equal(model.forward_streams(token, state=other), by_layers(model, token, state.fork()))
    assert state.lengths == [13] and other.lengths == [14]
    quantised.quantise(model, "fp8")
    assert torch.equal(model.forward_streams(token, state=state.fork()), by_layers(model, token, state.fork()))
    quantised.release(model)
    model.bfloat16()
    state = model.new_state()
    assert torch.equal(model.forward_streams(token, state=state), model.forward_streams(token)) and uses_step(model)
