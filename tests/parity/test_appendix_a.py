"""The conformance vectors: a toy network whose weights come from a hash, held to published logits and
intermediates.

The numbers (golden.py) were made by DeepSeek's inference code, so agreement here means agreement with it and
not with ourselves. What they do not catch has tests of its own: Sinkhorn passes and YaRN's bounds below,
batches, padding and ties in tests/property, rounding in tests/unit.
"""

import math
from typing import Any

import golden
import numpy as np
import pytest
import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.model import Trace, Transformer
from rorqual.ops import hyper_connections, native
from rorqual.ops.experts import router_scores
from rorqual.ops.hadamard import hadamard, hadamard_matrix
from rorqual.ops.rope import rope_frequencies

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def toy() -> Transformer:
    """The toy network with its hashed weights; every tensor of the model is set and none is left over."""
    model = Transformer(ModelConfig.from_dict(golden.TOY))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    filled = {name: torch.from_numpy(array) for name, array in golden.weights(shapes).items()}
    model.load_state_dict(filled, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.tensor([golden.TOKENS])


def feed(model: Transformer, tokens: Tensor, cuts: list[int]) -> Tensor:
    """Logits of a prompt fed to one state in the pieces between `cuts`."""
    state = model.new_state()
    bounds = [0, *cuts, tokens.shape[1]]
    with torch.no_grad():
        pieces = [model(tokens[:, a:b], state=state) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert state.lengths == [tokens.shape[1]]
    return torch.cat(pieces, dim=1)[0]


def near(found: Tensor, expected: Any, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.double), rtol=0, atol=tolerance)


def check_logits(logits: Tensor) -> None:
    """Every published row, every argmax and every norm."""
    for t, (first, argmax, norm) in golden.LOGITS.items():
        near(logits[t, :6], first)
        assert int(logits[t].argmax()) == argmax
        near(logits[t].norm(), norm)
    assert logits.argmax(-1).tolist() == golden.ARGMAXES


def test_the_generator_itself() -> None:
    """First values of four tensors, so that a failure below is the network's."""
    for name, (shape, first) in golden.WEIGHT_STARTS.items():
        np.testing.assert_allclose(golden.weight(name, shape).ravel()[:3], first, rtol=0, atol=1e-7)
    assert golden.TOKENS[:12] == [5, 15, 39, 13, 1, 3, 19, 49, 29, 23, 31, 53]


def test_one_pass(toy: Transformer, tokens: Tensor) -> None:
    """Logits without a state."""
    with torch.no_grad():
        check_logits(toy(tokens)[0])


def test_one_prefill(toy: Transformer, tokens: Tensor) -> None:
    """Logits with a state, all tokens in one call."""
    check_logits(feed(toy, tokens, []))


def test_token_by_token(toy: Transformer, tokens: Tensor) -> None:
    """Logits with a state, one token a call."""
    check_logits(feed(toy, tokens, list(range(1, 37))))


@pytest.mark.parametrize("draw", range(6))
def test_random_splits(toy: Transformer, tokens: Tensor, draw: int) -> None:
    """Logits with a state, pieces of random lengths."""
    rng = np.random.default_rng(draw)
    cuts = sorted(rng.choice(np.arange(1, 37), size=int(rng.integers(1, 12)), replace=False).tolist())
    check_logits(feed(toy, tokens, cuts))


@pytest.fixture(scope="module")
def captured(toy: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """What a full pass leaves in the trace, first row of the batch."""
    names = {name for name, _, _ in golden.INTERMEDIATES} | {"layers.1.attn.index_topk"}
    trace = Trace(capture=tuple(sorted(names)))
    with torch.no_grad():
        toy(tokens, trace=trace)
    assert names <= set(trace.captured), f"not captured: {sorted(names - set(trace.captured))}"
    return {name: tensor[0] for name, tensor in trace.captured.items()}


@pytest.mark.parametrize(("name", "row", "expected"), golden.INTERMEDIATES, ids=lambda v: str(v))
def test_intermediates(captured: dict[str, Tensor], name: str, row: tuple[int, ...], expected: golden.Vector) -> None:
    """Attention and expert outputs, streams, compressed entries and index keys: first four channels."""
    near(captured[name][row][:4], expected)


def test_last_channels_of_an_entry(captured: dict[str, Tensor]) -> None:
    """The rotated end of a compressed entry."""
    near(captured["layers.1.attn.entries"][1][-4:], golden.ENTRY_1_LAST_FOUR)


def test_index_picks(captured: dict[str, Tensor]) -> None:
    """Which entries the indexer chooses; -1 marks an empty place."""
    for t, expected in golden.PICKS.items():
        picks = [int(i) for i in captured["layers.1.attn.index_topk"][t] if i >= 0]
        assert len(picks) == len(set(picks)) and set(picks) == expected, f"t = {t}"


def test_mtp(toy: Transformer, tokens: Tensor) -> None:
    """The MTP module on the streams of rows 0..35 and the tokens after them."""
    with torch.no_grad():
        streams = toy.forward_streams(tokens)
        logits = toy.logits(toy.mtp_hidden(toy.mtp_streams(streams[:, :36], tokens[:, 1:])))[0]
    near(logits[35, :6], golden.MTP_LOGITS)
    assert int(logits[35].argmax()) == golden.MTP_ARGMAX
    near(logits[35].norm(), golden.MTP_L2)


def test_streams_give_the_logits(toy: Transformer, tokens: Tensor) -> None:
    """`forward_streams`, `final_hidden` and `logits` together are the forward pass."""
    with torch.no_grad():
        apart = toy.logits(toy.final_hidden(toy.forward_streams(tokens)))
        torch.testing.assert_close(apart, toy(tokens), rtol=0, atol=1e-6)


def test_sinkhorn() -> None:
    """Mixing coefficients to six digits, row sums included: they show the number and order of the passes."""
    k = torch.arange(24, dtype=torch.float32)
    scale = torch.tensor([1.0, 0.5, 2.0])
    pre, post, comb = hyper_connections.coefficients(2 * torch.sin(1.7 * k), torch.cos(k), scale, 4, 20, 1e-6)
    near(pre, golden.SINKHORN_PRE, 1e-6)
    near(post, golden.SINKHORN_POST, 1e-6)
    near(comb, golden.SINKHORN_COMB, 1e-6)
    near(comb.sum(0), (0.999999,) * 4, 1e-6)
    near(comb.sum(1), golden.SINKHORN_ROW_SUMS, 1e-6)


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_sinkhorn_of_every_implementation(implementation: str) -> None:
    """The same six digits out of whatever computes a sublayer's coefficients."""
    if implementation == "native" and native.load() is None:
        pytest.skip("no native operations here")
    k = torch.arange(24, dtype=torch.float32)
    streams = torch.zeros(3, 4, 8)
    streams[:, 0, 0] = math.sqrt(32.0)  # unit mean square: the RMS factor is 1 up to eps = 0
    fn = torch.zeros(24, 32)
    fn[:, 0] = 2 * torch.sin(1.7 * k) / math.sqrt(32.0)
    run = hyper_connections.registry.implementations("hc_pre")[implementation]
    y, post, comb = run(streams, fn, torch.cos(k), torch.tensor([1.0, 0.5, 2.0]), 20, 0.0, 1e-6)
    for row in range(3):
        near(y[row, 0] / math.sqrt(32.0), golden.SINKHORN_PRE[0], 1e-6)
        near(post[row], golden.SINKHORN_POST, 1e-6)
        near(comb[row], golden.SINKHORN_COMB, 1e-6)
        near(comb[row].sum(1), golden.SINKHORN_ROW_SUMS, 1e-6)


def test_router_scores() -> None:
    """sqrt(softplus(z)), exact where exp underflows against one and linear beyond 20."""
    logits = torch.tensor([[z] for z in golden.SQRT_SOFTPLUS])
    found = router_scores(logits, torch.ones(1, 1))[:, 0].double()
    expected = torch.tensor(list(golden.SQRT_SOFTPLUS.values()), dtype=torch.double)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=5e-8)
    # -20 alone shows only three digits above; its exact value needs log1p.
    assert float(found[0]) == pytest.approx(math.sqrt(math.log1p(math.exp(-20.0))), rel=1e-6)


def test_hadamard_signs() -> None:
    """Natural (Sylvester) order, entries (-1)^popcount(a & b), orthogonal after scaling."""
    matrix = hadamard_matrix(32)
    assert tuple(matrix[3, :8].tolist()) == golden.HADAMARD_ROW_3
    expected = torch.tensor([[(-1.0) ** (a & b).bit_count() for b in range(32)] for a in range(32)])
    torch.testing.assert_close(matrix, expected, rtol=0, atol=0)
    near(hadamard(torch.eye(32)), (expected / math.sqrt(32)).tolist(), 1e-6)


def test_yarn_frequencies() -> None:
    """The released models' table (floor and ceil of the ramp show here and nowhere else) and the toy's."""
    released = ModelConfig.preset("v4-flash")
    table = rope_frequencies(released.qk_rope_head_dim, released.compress_rope_theta, released.rope_scaling)
    for pair, frequency in golden.YARN_RELEASED.items():
        assert float(table[pair]) == pytest.approx(frequency, rel=2e-7), f"pair {pair}"
    toy = ModelConfig.from_dict(golden.TOY)
    yarn = rope_frequencies(toy.qk_rope_head_dim, toy.compress_rope_theta, toy.rope_scaling)
    assert yarn.tolist() == pytest.approx(golden.YARN_TOY, rel=1e-6)
    assert rope_frequencies(toy.qk_rope_head_dim, toy.rope_theta).tolist() == pytest.approx(golden.PLAIN_TOY, rel=1e-6)
