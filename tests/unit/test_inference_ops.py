"""The operations of inference against their references, and the same bits for a row whatever rows come with it."""

import pytest
import torch
from torch import Tensor

from rorqual.ops import compress, experts, linear, rope, sparse_attention
from rorqual.ops.native import inference, load

pytestmark = [
    pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist"),
    pytest.mark.usefixtures("no_gradients"),
]

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Equal within rounding, relative to the largest number."""
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    assert found.dtype == want.dtype and found.shape == want.shape
    assert float((found.float() - want.float()).abs().max()) <= tolerance * float(want.float().abs().max().clamp_min(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inner"), [(1, 1, 1), (3, 5, 9), (7, 70, 40), (67, 33, 24), (70, 66, 2500), (5, 130, 64)]
)
def test_linear(rows: int, outputs: int, inner: int, dtype: torch.dtype) -> None:
    """Every remainder of rows, outputs and channels, and sums longer than a block."""
    x, weight = randn(rows, inner).to(dtype), (randn(outputs, inner) * inner**-0.5).to(dtype)
    close(linear.linear(x, weight), linear.linear_reference(x, weight), dtype)
    exact = linear.linear_exact(x, weight)
    close(exact, linear.linear_reference(x, weight, exact=True), torch.float32)
    for size in (1, 2, 3, 4, 5):
        assert torch.equal(torch.cat([linear.linear_exact(part, weight) for part in x.split(size)]), exact), size


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_by_groups(dtype: torch.dtype) -> None:
    x, weight = randn(2, 5, 3, 40).to(dtype), (randn(3 * 7, 40) * 0.15).to(dtype)
    want = torch.stack([x[:, :, g] @ weight[7 * g : 7 * g + 7].t() for g in range(3)], 2)
    close(linear.linear(x, weight, 3), want, dtype)
    close(linear.linear_reference(x, weight, 3), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hashed", [False, True])
def test_routed_experts(hashed: bool, dtype: torch.dtype) -> None:
    """Router and experts; more tokens of one expert than are worked on at a time."""
    x, router, bias = randn(150, 40).to(dtype), randn(6, 40).to(dtype), randn(6)
    given = (None, torch.arange(300).view(150, 2) % 5) if hashed else (bias, None)
    chosen, weights, scores = experts.route_reference(x, router, *given, 2, 1.5)
    found = experts.route(x, router, *given, 2, 1.5)
    assert torch.equal(found[0], chosen)
    close(found[1], weights, torch.float32)
    close(found[2], scores, torch.float32)
    w1, w3, w2 = (w.to(dtype) * 0.2 for w in (randn(6, 22, 40), randn(6, 22, 40, seed=1), randn(6, 40, 22)))
    every = experts.grouped_experts(x, chosen, weights, w1, w3, w2, 1.0)
    close(every, experts.experts_reference(x, chosen, weights, w1, w3, w2, 1.0), dtype)
    for i in (0, 77):
        part = slice(i, i + 3)
        assert torch.equal(experts.grouped_experts(x[part], chosen[part], weights[part], w1, w3, w2, 1.0), every[part])


def test_scores_are_right_relative_to_their_size() -> None:
    """sqrt(softplus) where it is an exponential, where it is linear and between, down to its floor; a NaN stays."""
    x = torch.cat([torch.linspace(-100, 45, 2901), torch.tensor([-0.0, 1e-8, -1e-8, float("nan")])])
    row = torch.zeros(len(x), 16)
    row[:, 3] = x
    router = torch.zeros(3, 16)
    router[:, 3] = torch.tensor([1.0, -1.0, 0.5])
    scores = experts.route(row, router, torch.zeros(3), None, 2, 1.5)[2]
    products = row[:-1].double() @ router.double().t()
    want = torch.nn.functional.softplus(products).clamp_min(experts.SCORE_FLOOR).sqrt()
    assert float(((scores[:-1] - want) / want).abs().max()) < 1e-6
    assert scores[-1].isnan().all()


def test_equal_scores_go_to_the_lowest_experts() -> None:
    chosen, weights, _ = experts.route(torch.ones(2, 4), torch.zeros(5, 4), torch.zeros(5), None, 3, 1.5)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 0.5))


@pytest.mark.parametrize("overlap", [False, True])
def test_pooling(overlap: bool) -> None:
    kv, score = randn(30, 24) * 3, randn(30, 24, seed=1) * 3
    index = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:24].view(1, 3, 8)
    skip = torch.tensor([[4, 0, 0]]) if overlap else torch.zeros(1, 3, dtype=torch.int64)
    found = compress.pool_rows(kv, score, index, skip)
    close(found, compress.pool_rows_reference(kv, score, index, skip), torch.float32)


def test_rope_table() -> None:
    positions = torch.tensor([[0, 1, 127, 1_000_003]])
    frequencies = rope.rope_frequencies(16, 1e4)
    found, want = rope.rope_table(positions, frequencies), rope.rope_table_reference(positions, frequencies)
    assert float((found - want).abs().max()) < 3e-7


def pages(entries: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Entries [C, K] as pages [P, rows, K] in another order, and the table."""
    count = -(-len(entries) // rows)
    order = torch.randperm(count + 2, generator=torch.Generator().manual_seed(1))[:count]
    pool = torch.full((count + 2, rows, entries.shape[1]), torch.nan, dtype=entries.dtype)
    for i, page in enumerate(order.tolist()):
        part = entries[i * rows : (i + 1) * rows]
        pool[page, : len(part)] = part
    return pool, order


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(4, 32), (5, 24), (1, 80)])
def test_attention_in_pages(heads: int, width: int, dtype: torch.dtype) -> None:
    """Entries in pages and in one piece give the same bits, and those of the equation but for rounding."""
    entries, window = (randn(70, width) * 0.5).to(dtype), 9
    q, kv, sink = randn(1, 4, heads, width).to(dtype), randn(1, window + 3, width).to(dtype), randn(heads)
    positions, end = torch.arange(280, 284)[None], torch.tensor([[70, 70, 70, 70]])
    pool, table = pages(entries, 16)
    for picks in (None, torch.tensor([0, 3, 4, 66, -1]).expand(1, 4, -1)):
        visible = sparse_attention.Visible(end, None, picks)
        args = (q, kv, sink, positions, window, 0.2)
        want = sparse_attention.attention_reference(*args, entries[None], visible)
        found, lse = inference.attend(*args, entries[None], None, end, picks)
        close(found, want.to(dtype), dtype)
        paged, paged_lse = inference.attend(*args, pool, None, end, picks, table)
        assert torch.equal(paged, found) and torch.equal(paged_lse, lse)
