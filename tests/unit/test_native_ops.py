"""Each native operation against its reference: values and every gradient, over shapes that do not divide evenly."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rorqual.ops import (
    cross_entropy,
    experts,
    hyper_connections,
    index_loss,
    index_scan,
    index_topk,
    norms,
    registry,
    rope,
    sparse_attention,
    swiglu,
)
from rorqual.ops.native import fused, load

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
    "hc_head",
    "index_loss",
    "cross_entropy",
]
# test_cache_codec.py, test_index_scan.py, test_matvec.py, test_inference_ops.py, test_pointwise.py, test_streaming.py,
# test_index_groups.py
ELSEWHERE = {
    "encode_entries", "decode_entries", "encode_index_keys", "decode_index_keys", "index_scan", "scan_scores",
    "packed_linear", "packed_experts", "streamed_experts", "linear", "route", "pool_rows", "rope_table",
    "sigmoid", "silu", "index_groups", "index_search",
}  # fmt: skip


def both(operation: str, *args: object, data: tuple[int, ...] = (0,)) -> None:
    """Outputs and gradients of native and reference agree within fp32 rounding, and, with the arguments `data` given as
    bf16, within bf16 rounding.
    """
    compare(operation, args, 2e-5)
    halves = [a.bfloat16() if i in data and isinstance(a, Tensor) else a for i, a in enumerate(args)]
    if not (operation.startswith("hc_") and halves[0].shape[-1] * halves[0].shape[-2] % 2):  # type: ignore[attr-defined]
        compare(operation, halves, 2e-2)


def compare(operation: str, args: Sequence[object], tolerance: float) -> None:
    results = []
    implementations = registry.implementations(operation)
    assert set(implementations) - {"triton"} == {"reference", "native"}
    for name in ("reference", "native"):
        leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        out = implementations[name](*leaves)
        outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
        generator = torch.Generator().manual_seed(1)
        loss = sum((o.float() * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        grads = [a.grad for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        results.append([o.detach() for o in outputs] + [g for g in grads if g is not None])
    assert len(results[0]) >= len(results[1]) > 0
    for a, b in zip(results[0], results[1], strict=False):
        assert a.dtype == b.dtype
        scale = a.abs().max().clamp_min(1e-3)
        assert ((a.float() - b.float()).abs().max() / scale) < tolerance


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize(("n", "d", "iters"), [(4, 32, 20), (4, 7, 3), (2, 33, 20), (3, 16, 1), (1, 8, 5)])
def test_hyper_connections(n: int, d: int, iters: int) -> None:
    rows = 2 * n + n * n
    both("hc_pre", randn(2, 5, n, d), randn(rows, n * d) * 0.3, randn(rows), 1 + randn(3), iters, 1e-6, 1e-6)
    comb = hyper_connections.sinkhorn(randn(2, 5, n, n), iters, 1e-6)
    both("hc_post", randn(2, 5, n, d), randn(2, 5, d), randn(2, 5, n), comb, data=(0, 1))
    both("hc_head", randn(2, 5, n, d), randn(n, n * d) * 0.3, randn(n), 1 + randn(1), 1e-6, 1e-6)


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


@pytest.mark.parametrize("hashed", [False, True])
def test_moe_of_few_tokens(hashed: bool) -> None:
    x, router, bias = randn(3, 16), randn(6, 16), randn(6)
    w1, w3, w2 = randn(6, 10, 16), randn(6, 10, 16, seed=1), randn(6, 16, 10)
    given = (None, torch.tensor([[1, 5], [0, 3], [2, 2]])) if hashed else (bias, None)
    chosen, weights, scores = experts.route_reference(x, router, *given, 2, 1.5)
    want = experts.experts_reference(x, chosen, weights, w1, w3, w2, 1.0)
    torch.testing.assert_close(experts.grouped_experts(x, chosen, weights, w1, w3, w2, 1.0), want)
    with torch.no_grad():
        found = experts.route(x, router, *given, 2, 1.5)
        assert torch.equal(found[0], chosen)
        torch.testing.assert_close(found[1:], (weights, scores))
        torch.testing.assert_close(experts.grouped_experts(x, chosen, weights, w1, w3, w2, 1.0), want)


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


BOTH_TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def close(got: Tensor, want: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Equal up to rounding, as a share of the whole tensor's norm."""
    distance = (got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-6)
    assert distance < factor * (1e-5 if dtype == torch.float32 else 1e-2), float(distance)


@BOTH_TYPES
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "width", "window", "entries", "picks"), [
    (4, 32, 8, 0, 0), (4, 32, 8, 19, 0), (4, 32, 8, 19, 5), (3, 16, 16, 7, 0), (64, 16, 1, 12, 4), (1, 48, 5, 200, 9),
])  # fmt: skip
def test_attention(
    heads: int, width: int, window: int, entries: int, picks: int, packed: bool, dtype: torch.dtype
) -> None:
    """Values and gradients of the fused kernel are those of the equation, at sizes that fill no tile."""
    b, t = 2, 77
    q, kv = randn(b, t, heads, width).to(dtype), randn(b, window - 1 + t, width).to(dtype)
    sink, upstream = randn(heads), randn(b, t, heads, width, seed=3)
    positions = (torch.arange(t) % 37)[None] if packed else torch.arange(t)[None]
    given, visible = None, None
    if entries:
        given, end = randn(b, entries, width).to(dtype), (torch.arange(1, t + 1) * entries // t)[None]
        start = (end - 3).clamp_min(0) if packed else None
        chosen = None
        if picks:
            scores = torch.rand(b, t, entries, generator=torch.Generator().manual_seed(0))
            chosen = scores.topk(min(picks, entries), -1).indices.sort(-1).values
            chosen = torch.where(chosen < end.unsqueeze(-1), chosen, -1)
        visible = sparse_attention.Visible(end, start, chosen)
    results = []
    for run in (sparse_attention.attention_reference, sparse_attention.sparse_attention):
        leaves = [x.clone().requires_grad_() for x in (q, kv, sink, given) if x is not None]
        out = run(*leaves[:3], positions, window, 0.3, leaves[3] if entries else None, visible)
        out = out if isinstance(out, Tensor) else out[0]
        (out.float() * upstream).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for want, got in zip(*results, strict=True):
        close(got, want, dtype)


@BOTH_TYPES
@pytest.mark.parametrize(
    ("tokens", "inner", "num", "active"), [(1, 16, 3, 2), (50, 48, 5, 2), (300, 32, 2, 1), (7, 16, 9, 9)]
)
def test_experts(tokens: int, inner: int, num: int, active: int, dtype: torch.dtype) -> None:
    d = 32
    x, weights = randn(tokens, d).to(dtype), torch.rand(tokens, active, generator=torch.Generator().manual_seed(1))
    matrices = [randn(num, inner, d) * 0.2, randn(num, inner, d, seed=5) * 0.2, randn(num, d, inner) * 0.2]
    scores = torch.rand(tokens, num, generator=torch.Generator().manual_seed(2))
    chosen = scores.topk(active, -1).indices
    upstream = randn(tokens, d, seed=9)
    results = []
    for run in (experts.experts_reference, fused.Experts.apply):
        leaves = [
            t.clone().requires_grad_()
            for t in (x.float() if run is experts.experts_reference else x, weights, *matrices)
        ]
        y = run(leaves[0], chosen, leaves[1], *leaves[2:], 0.0)
        (y * upstream).sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for want, got in zip(*results, strict=True):
        close(got, want, dtype, 2.0)


def test_experts_of_an_odd_width() -> None:
    x, weights = randn(20, 32), torch.rand(20, 2, generator=torch.Generator().manual_seed(1))
    matrices = [randn(4, 21, 32), randn(4, 21, 32, seed=5), randn(4, 32, 21)]
    chosen = torch.rand(20, 4, generator=torch.Generator().manual_seed(2)).topk(2, -1).indices
    results = []
    for run in (experts.experts_reference, experts.grouped_experts):
        leaves = [t.clone().requires_grad_() for t in (x, weights, *matrices)]
        y = run(leaves[0], chosen, leaves[1], *leaves[2:], 1.0)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for want, got in zip(*results, strict=True):
        assert want.shape == got.shape
        close(got, want, torch.float32)


def test_experts_without_tokens() -> None:
    none = torch.empty(0, 2, dtype=torch.int64)
    out = experts.grouped_experts(
        randn(0, 32), none, randn(0, 2), randn(4, 16, 32), randn(4, 16, 32), randn(4, 32, 16), 1.0
    )
    assert out.shape == (0, 32)


def test_an_experts_row_does_not_depend_on_its_neighbours() -> None:
    x, weights = randn(200, 32), torch.rand(200, 2, generator=torch.Generator().manual_seed(1))
    matrices = [randn(4, 16, 32), randn(4, 16, 32, seed=5), randn(4, 32, 16)]
    chosen = torch.rand(200, 4, generator=torch.Generator().manual_seed(2)).topk(2, -1).indices
    whole = fused.Experts.apply(x, chosen, weights, *matrices, 1.0)
    part = fused.Experts.apply(x[37:41], chosen[37:41], weights[37:41], *matrices, 1.0)
    assert torch.equal(whole[37:41], part)


@BOTH_TYPES
@pytest.mark.parametrize("use_picks", [False, True])
@pytest.mark.parametrize(("entries", "top_k", "packed"), [(15, 4, False), (37, 40, False), (40, 6, True)])
def test_index_loss(entries: int, top_k: int, packed: bool, use_picks: bool, dtype: torch.dtype) -> None:
    b, t, heads, width = 2, 60, 3, 16
    index_q, weights, keys = randn(b, t, heads, width).to(dtype), randn(b, t, heads), randn(b, entries, width).to(dtype)
    q, lse, attended = randn(b, t, 4, 32).to(dtype), randn(b, t, 4) + 4, randn(b, entries, 32).to(dtype)
    end = (torch.arange(1, t + 1) * entries // t)[None].expand(b, -1)
    start, valid = ((end - 9).clamp_min(0), randn(b, t) > -1) if packed else (None, None)
    every = sparse_attention.Visible(end, start)
    scores = index_topk.index_scores(index_q, weights, keys).masked_fill(~every.mask(0, t, entries), float("-inf"))  # type: ignore[operator]
    picks = index_topk.select_entries(scores, top_k)
    if dtype == torch.float32:  # in bf16 two scores may round to one
        for r in range(b):
            keys_r, start_r = index_scan.IndexKeys(keys[r], width), None if start is None else start[r]
            assert torch.equal(
                index_scan.index_scan(index_q[r], weights[r], keys_r, start_r, end[r], picks.shape[-1]), picks[r]
            )
    visible = sparse_attention.Visible(end, start, picks) if use_picks else every
    results = []
    for run in registry.implementations("index_loss").values():
        leaves = [x.clone().requires_grad_() for x in (index_q, weights, keys)]
        sums = run(*leaves, visible, every, q, lse, attended, 0.2, valid, top_k)
        sums[0].backward()
        results.append([sums, *(leaf.grad for leaf in leaves)])
    for want, got in zip(*results, strict=True):
        close(got, want, dtype)
    assert results[0][0][3] > 0 or top_k >= entries
    assert index_loss.index_loss(index_q, weights, keys, visible, every, q, lse, attended, 0.2, valid, top_k).shape == (
        4,
    )


@BOTH_TYPES
@pytest.mark.parametrize(
    ("rows", "vocabulary", "z_weight"), [(0, 48, 0.0), (1, 48, 0.0), (77, 48, 0.1), (130, 512, 0.0)]
)
def test_cross_entropy(rows: int, vocabulary: int, z_weight: float, dtype: torch.dtype) -> None:
    hidden, weight = randn(rows, 32).to(dtype), randn(vocabulary, 32).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(4))
    found = registry.implementations("cross_entropy")
    for want, got in zip(
        *(found[n](hidden, weight, labels, 50, z_weight) for n in ("reference", "native")), strict=True
    ):
        assert want.shape == got.shape
        if rows:
            close(got, want, dtype)
    leaf = hidden.float().requires_grad_()
    if rows and not z_weight:
        torch.nn.functional.cross_entropy(leaf @ weight.float().T, labels, reduction="sum").backward()
        close(cross_entropy.cross_entropy(hidden, weight, labels, 50)[2], leaf.grad, dtype, 2.0)  # type: ignore[arg-type]


@BOTH_TYPES
def test_swiglu_in_both_types(dtype: torch.dtype) -> None:
    gate, up, weight, dout = (
        x.to(dtype) for x in (randn(9, 33) * 3, randn(9, 33, seed=1) * 3, randn(9), randn(9, 33, seed=2))
    )
    for operation, args in (
        ("swiglu", (gate, up, weight.float(), 4.0)),
        ("swiglu_backward", (gate, up, weight.float(), dout, 4.0)),
    ):
        found = [registry.implementations(operation)[name](*args) for name in ("reference", "native")]
        for want, got in zip(*(f if isinstance(f, tuple) else (f,) for f in found), strict=True):
            close(got, want, dtype)


def test_every_twin_is_tested_here() -> None:
    assert norms.rms_norm is not None
    with_twins = {op for op in registry.operations() if "native" in registry.implementations(op)}
    assert sorted(with_twins - ELSEWHERE) == sorted(OPERATIONS)


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
