"""Each native operation against its reference: values and every gradient, over shapes that do not divide evenly."""

import pytest
import torch
from torch import Tensor

from rorqual.ops import (
    experts,
    hyper_connections,
    index_topk,
    norms,
    registry,
    rope,
    sparse_attention,
    swiglu,
)
from rorqual.ops.native import functions, load

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")

OPERATIONS = [
    "hc_pre",
    "hc_post",
    "rms_norm",
    "rope",
    "norm_rope",
    "swiglu",
    "swiglu_backward",
    "index_reduce",
]


def both(operation: str, *args: object) -> None:
    """Outputs and gradients of native and reference agree within fp32 rounding."""
    results = []
    implementations = registry.implementations(operation)
    assert set(implementations) == {"reference", "native"}
    for name in ("reference", "native"):
        leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        out = implementations[name](*leaves)
        outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
        generator = torch.Generator().manual_seed(1)
        loss = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        grads = [a.grad for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        results.append([o.detach() for o in outputs] + [g for g in grads if g is not None])
    assert len(results[0]) >= len(results[1]) > 0
    for a, b in zip(results[0], results[1], strict=False):
        scale = a.abs().max().clamp_min(1e-3)
        assert ((a - b).abs().max() / scale) < 2e-5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize(("n", "d", "iters"), [(4, 32, 20), (4, 7, 3), (2, 33, 20), (3, 16, 1), (1, 8, 5)])
def test_hyper_connections(n: int, d: int, iters: int) -> None:
    rows = 2 * n + n * n
    both("hc_pre", randn(2, 5, n, d), randn(rows, n * d) * 0.3, randn(rows), 1 + randn(3), iters, 1e-6, 1e-6)
    comb = hyper_connections.sinkhorn(randn(2, 5, n, n), iters, 1e-6)
    both("hc_post", randn(2, 5, n, d), randn(2, 5, d), randn(2, 5, n), comb)


@pytest.mark.parametrize("d", [3, 16, 33, 128])
def test_rms_norm(d: int) -> None:
    both("rms_norm", randn(3, 5, d) * 4, 1 + randn(d), 1e-6)
    both("rms_norm", randn(3, 5, d), None, 1e-6)
    both("rms_norm", torch.zeros(2, d), 1 + randn(d), 1e-6)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("k", "r"), [(8, 8), (12, 4), (64, 16)])
def test_rope(k: int, r: int, inverse: bool) -> None:
    table = rope.rope_table(torch.tensor([[0, 5, 1_000_003], [1, 2, 3]]), rope.rope_frequencies(r, 1e4))
    both("rope", randn(2, 3, k), table, inverse)
    both("rope", randn(2, 3, 4, k), table.unsqueeze(-2), inverse)
    both("rope", randn(2, 3, 4, k), table[:1].unsqueeze(-2), inverse)
    both("rope", randn(2, 3, k), table[:1], inverse)


@pytest.mark.parametrize(("k", "r"), [(8, 8), (12, 4), (64, 16)])
def test_norm_rope(k: int, r: int) -> None:
    table = rope.rope_table(torch.tensor([[0, 5, 1_000_003], [1, 2, 3]]), rope.rope_frequencies(r, 1e4))
    both("norm_rope", randn(2, 3, k), 1 + randn(k), 1e-6, table)
    both("norm_rope", randn(2, 3, 4, k), None, 1e-6, table[:1].unsqueeze(-2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("choice", ["all", "picks", "none"])
@pytest.mark.parametrize("window", [1, 5])
def test_attention_of_few_queries(window: int, choice: str, packed: bool) -> None:
    """The native loop over keys, the blocked version and the equation agree."""
    b, t, h, k, entries = 2, 3, 4, 24, randn(2, 9, 24)
    q, kv, sink = randn(b, t, h, k), randn(b, t + window - 1, k), randn(h)
    positions = torch.tensor([[20, 21, 22], [0, 1, 2]])
    end = torch.tensor([[9, 9, 9], [0, 1, 1]])
    start = torch.tensor([[2, 2, 3], [0, 0, 0]]) if packed else None
    picks = torch.tensor([[[3, 5, 8]] * 3, [[-1, -1, -1], [0, -1, -1], [0, -1, -1]]]) if choice == "picks" else None
    visible = sparse_attention.Visible(end, start, picks)
    given = (None, None) if choice == "none" else (entries, visible)
    want = sparse_attention.attention_reference(q, kv, sink, positions, window, 0.3, *given)
    blocked, lse = sparse_attention.sparse_attention(q.requires_grad_(), kv, sink, positions, window, 0.3, *given)
    with torch.no_grad():
        few, few_lse = sparse_attention.sparse_attention(q, kv, sink, positions, window, 0.3, *given)
    torch.testing.assert_close(blocked, want)
    torch.testing.assert_close(few, want)
    torch.testing.assert_close(few_lse, lse)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 7, 40])
def test_selection_for_few_queries(top_k: int, ties: bool) -> None:
    q, weights, keys = randn(2, 3, 2, 8), randn(2, 3, 2), randn(2, 30, 8)
    if ties:
        q, weights, keys = q.round(), weights.round(), keys.round()
    end = torch.tensor([[30, 29, 5], [0, 1, 30]])
    scores = index_topk.index_scores(q, weights, keys)
    scores = scores.masked_fill(torch.arange(30) >= end.unsqueeze(-1), float("-inf"))
    want = index_topk.select_entries(scores, top_k)
    got = functions.index_select_small(q, weights, keys, None, end, top_k)
    assert [[sorted(i for i in row if i >= 0) for row in b] for b in want.tolist()] == [
        [[i for i in row if i >= 0] for row in b] for b in got.tolist()
    ]


@pytest.mark.parametrize("hashed", [False, True])
def test_moe_of_few_tokens(hashed: bool) -> None:
    x, router, bias = randn(3, 16), randn(6, 16), randn(6)
    w1, w3, w2 = randn(6, 10, 16), randn(6, 10, 16, seed=1), randn(6, 16, 10)
    s1, s3, s2 = randn(10, 16), randn(10, 16, seed=1), randn(16, 10)
    scores = experts.router_scores(x, router)
    chosen = torch.tensor([[1, 5], [0, 3], [2, 2]]) if hashed else experts.select_experts(scores, bias, 2)
    weights = experts.routing_weights(scores, chosen, 1.5)
    want = experts.experts_reference(x, chosen, weights, w1, w3, w2, 1.0)
    want = want + swiglu.swiglu(x @ s1.t(), x @ s3.t(), 1.0) @ s2.t()
    torch.testing.assert_close(
        experts.grouped_experts(x, chosen, weights, w1, w3, w2, 1.0),
        experts.experts_reference(x, chosen, weights, w1, w3, w2, 1.0),
    )
    given = (None, chosen) if hashed else (bias, None)
    got = functions.moe_small(x, router, *given, (w1, w3, w2), (s1, s3, s2), 2, 1.5, 1.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [0.0, 0.5, 10.0])
def test_swiglu(limit: float) -> None:
    gate, up, weight, dout = randn(9, 13) * 3, randn(9, 13, seed=1) * 3, randn(9), randn(9, 13, seed=2)
    with torch.no_grad():
        for w in (weight, None):
            for operation, args in (
                ("swiglu", (gate, up, w, limit)),
                ("swiglu_backward", (gate, up, w, dout, limit)),
            ):
                found = registry.implementations(operation)
                want, got = found["reference"](*args), found["native"](*args)
                pairs = zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]
                for a, b in pairs:
                    assert (a is None) == (b is None)
                    if a is not None:
                        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_swiglu_gradient_is_that_of_the_equation() -> None:
    gate, up = (randn(4, 6) * 2).requires_grad_(), (randn(4, 6, seed=1) * 2).requires_grad_()
    torch.nn.functional.silu(gate.clamp(max=1.0)).mul(up.clamp(-1.0, 1.0)).square().sum().backward()
    want = gate.grad, up.grad
    gate.grad = up.grad = None
    swiglu.swiglu(gate, up, 1.0).square().sum().backward()
    torch.testing.assert_close(gate.grad, want[0])
    torch.testing.assert_close(up.grad, want[1])


def test_index_reduce() -> None:
    both("index_reduce", randn(2, 3, 5, 11), randn(2, 3, 5))
    q, w, keys = randn(2, 3, 5, 8), randn(2, 3, 5), randn(2, 11, 8)
    want = torch.einsum("btj,btjc->btc", w, torch.einsum("btjk,bck->btjc", q, keys).relu())
    torch.testing.assert_close(index_topk.index_scores(q, w, keys), want)


def test_every_twin_is_tested_here() -> None:
    assert norms.rms_norm is not None
    with_twins = [op for op in registry.operations() if "native" in registry.implementations(op)]
    assert sorted(with_twins) == sorted(OPERATIONS)


def test_results_do_not_depend_on_threads() -> None:
    streams, fn, base, scale = randn(1, 257, 4, 32), randn(24, 128), randn(24), randn(3)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(hyper_connections.hc_pre(streams, fn, base, scale, 20, 1e-6, 1e-6))
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)
