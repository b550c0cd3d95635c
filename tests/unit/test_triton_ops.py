"""The Triton twins against their references: on a GPU where there is one, else on CPU tensors by Triton's
interpreter, which `conftest.py` turns on.

Skipped where the optional package `triton` is not installed (`pip install "rorqual[gpu]"`).
"""

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type in ("cuda", "xpu")  # type: ignore[union-attr]
pytest.importorskip("triton")

from rorqual.ops import cache_codec, hyper_connections, norms, rope  # noqa: E402
from rorqual.ops import triton as twins  # noqa: E402
from rorqual.ops.experts import experts_reference  # noqa: E402
from rorqual.ops.index_scan import IndexKeys, index_scan_reference, scan_scores_reference  # noqa: E402
from rorqual.ops.packed_experts import packed_experts_reference  # noqa: E402
from rorqual.ops.packed_weight import pack  # noqa: E402
from rorqual.ops.rounding import round_index_fp4  # noqa: E402
from rorqual.ops.sparse_attention import Visible, attention_reference  # noqa: E402

DEVICE = torch.accelerator.current_accelerator() if HAS_GPU else torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def close(found: Tensor, want: Tensor, tolerance: float) -> None:
    """Equal within rounding, relative to the largest number."""
    assert found.shape == want.shape
    assert float((found.float() - want.float()).abs().max()) <= tolerance * float(want.float().abs().max().clamp_min(1))


def rounding(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [6, 24, 64])
def test_norms_and_rope(width: int, dtype: torch.dtype) -> None:
    norm, turn, both = (twins.later("rows", name) for name in ("rms_norm", "rope", "norm_rope"))
    twice = 2 * rounding(dtype)  # rounded between norm and rope, and after
    x, weight = randn(2, 5, 3, width).to(dtype), randn(width).to(dtype)
    table = rope.rope_table_reference(torch.arange(5, device=DEVICE)[None] * 7, randn(width // 4).abs())
    for w in (weight, None):
        close(norm(x, w, 1e-6), norms.rms_norm_reference(x, w, 1e-6), rounding(dtype))
        close(
            both(x, w, 1e-6, table.unsqueeze(-2)), rope.norm_rope_reference(x, w, 1e-6, table.unsqueeze(-2)), twice,
        )  # fmt: skip
        keys = x[:, :, 0]
        close(both(keys, w, 1e-6, table), rope.norm_rope_reference(keys, w, 1e-6, table), twice)
    for inverse in (False, True):
        found = turn(x, table.unsqueeze(-2), inverse)
        close(found, rope.apply_rope_reference(x, table.unsqueeze(-2), inverse), rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hyper_connections(dtype: torch.dtype) -> None:
    before, after, head = (twins.later("hyper_connections", name) for name in ("hc_pre", "hc_post", "hc_head"))
    for n, d in ((4, 40), (3, 300)):
        x, y = randn(2, 3, n, d).to(dtype), randn(2, 3, d).to(dtype)
        fn, base, scale = randn(2 * n + n * n, n * d) * 0.1, randn(2 * n + n * n), randn(3)
        want = hyper_connections.hc_pre_reference(x, fn, base, scale, 20, 1e-6, 1e-6)
        found = before(x, fn, base, scale, 20, 1e-6, 1e-6)
        for a, b in zip(found, want, strict=True):
            close(a, b, rounding(dtype))
        close(after(x, y, *want[1:]), hyper_connections.hc_post_reference(x, y, *want[1:]), rounding(dtype))
        want_y = hyper_connections.hc_head_reference(x, fn[:n], base[:n], scale[:1], 1e-6, 1e-6)
        close(head(x, fn[:n], base[:n], scale[:1], 1e-6, 1e-6), want_y, rounding(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp32", "bf16", "fp4", "fp4 in pages"])
def test_index_scan(form: str) -> None:
    """FP4 numbers, whose products are exact in every form; ragged ranges, and more places than entries."""
    scan, score = twins.later("index_scan", "index_scan"), twins.later("index_scan", "scan_scores")
    q, keys, weights = round_index_fp4(randn(7, 5, 64)), round_index_fp4(randn(300, 64)), randn(7, 5)
    end = torch.tensor([300, 0, 1, 64, 65, 299, 280], device=DEVICE)
    start = torch.tensor([0, 0, 0, 10, 0, 290, 3], device=DEVICE)
    rows = keys
    if form.startswith("fp4"):
        rows = cache_codec.encode_index_keys(keys)
    elif form == "bf16":
        q, rows = q.bfloat16(), keys.bfloat16()
    where = IndexKeys(rows, 64)
    if form.endswith("pages"):
        order = torch.tensor([3, 0, 11, 7, 2, 5, 9, 1, 8, 4], device=DEVICE)
        pool = rows.new_full((12, 32, rows.shape[-1]), 99)
        pool[order] = torch.nn.functional.pad(rows, (0, 0, 0, 20)).view(10, 32, -1)
        where = IndexKeys(pool, 64, order)
    found = score(q, weights, where, 300)
    want = scan_scores_reference(q.float(), weights, IndexKeys(keys, 64), 300)
    close(found, want, 1e-5)
    for top_k in (1, 20, 299, 400):
        for first in (None, start):
            picks = scan(q, weights, where, first, end, top_k)
            for row in range(7):  # against a stable sort of the twin's own scores
                lo, hi = 0 if first is None else int(first[row]), int(end[row])
                order = found[row, lo:hi].sort(descending=True, stable=True).indices[:top_k].sort().values + lo
                wanted = torch.full((top_k,), -1, dtype=torch.int64, device=DEVICE)
                wanted[: len(order)] = order
                assert torch.equal(picks[row], wanted), (top_k, row)


def test_index_ties_go_to_the_lowest_and_what_is_not_finite() -> None:
    scan = twins.later("index_scan", "index_scan")
    keys, q, weights = randn(700, 16), randn(1, 1, 16), torch.ones(1, 1, device=DEVICE)
    keys[5::7] = keys[5]
    end = torch.tensor([700], device=DEVICE)
    for sign in (1, -1):  # many zeros, at the end and at the top
        where = IndexKeys(keys, 16)
        want = index_scan_reference(q, sign * weights, where, None, end, 90)
        assert torch.equal(scan(q, sign * weights, where, None, end, 90), want)
    ones = torch.ones(200, 16, device=DEVICE)
    ones[150, 3], ones[20, 0] = torch.nan, torch.inf
    found = scan(torch.ones(1, 1, 16, device=DEVICE), weights, IndexKeys(ones, 16), None, end.clamp(max=200), 3)
    assert found[0].tolist() == [0, 20, 150]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["window", "all entries", "ranges", "picks", "picks in pages"])
def test_attention(kind: str, dtype: torch.dtype) -> None:
    attend = twins.later("attention", "attend")
    b, t, h, k, window, c = 2, 9, 5, 24, 6, 70
    q, kv, sink = randn(b, t, h, k).to(dtype), randn(b, window - 1 + t, k).to(dtype), randn(h)
    positions = torch.arange(t, device=DEVICE)[None] + 2
    entries = randn(b, c, k, seed=1).to(dtype)
    end = torch.tensor([[0, 1, 5, 31, 32, 33, 64, 69, 70]], device=DEVICE)
    start = picks = table = None
    if kind == "ranges":
        end = torch.stack([end[0], end[0].flip(0)])
        start = end // 3
    if kind.startswith("picks"):
        drawn = torch.rand(b, t, c, generator=torch.Generator().manual_seed(3)).argsort(-1)[..., :7].sort(-1).values
        picks = drawn.to(DEVICE)
        picks = picks.masked_fill(picks >= end[..., None], -1)
    visible = Visible(end, start, picks)
    args = (q, kv, sink, positions, window, 0.2)
    if kind == "window":
        want = attention_reference(*args)
        found, _ = attend(*args, None, None, None, None)
        close(found, want, rounding(dtype))
        return
    want = attention_reference(*args, entries, visible)
    if kind.endswith("pages"):
        table = torch.tensor([4, 0, 2, 5, 1], device=DEVICE)
        pool = entries.new_full((6, 14, k), 99)
        pool[table] = entries[0].view(5, 14, k)
        one = slice(0, 1)
        found, _ = attend(q[one], kv[one], sink, positions, window, 0.2, pool, None, end, picks[one], table)  # type: ignore[index]
        close(found, want[one], rounding(dtype))
        return
    found, lse = attend(*args, entries, start, end, picks)
    close(found, want, rounding(dtype))
    assert lse.shape == (b, t, h) and bool(lse.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "fp4"])
@pytest.mark.parametrize(("tokens", "active"), [(1, 3), (40, 2)])
def test_experts(tokens: int, active: int, form: str, dtype: torch.dtype) -> None:
    """Odd widths, experts with no rows and with more than a block's, one chosen twice, and a clamp that is met."""
    num_experts, d, inner = 6, 70, 36
    x = randn(tokens, d).to(dtype)
    choices = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(2)).argsort(-1)[:, :active]
    choices[choices == 4] = 3  # nobody asks for expert 4
    choices[tokens // 3 :, 0] = 1
    choices, weights = choices.to(DEVICE), randn(tokens, active).abs()
    w1, w3, w2 = (randn(num_experts, *s, seed=i) * 0.3 for i, s in enumerate(((inner, d), (inner, d), (d, inner))))
    for limit in (0.0, 1.0):
        if form == "fp4":
            args = (x, choices, weights, *(pack(w, "fp4") for w in (w1, w3, w2)), limit)
            want, found = packed_experts_reference(*args), twins.later("experts", "packed_experts")(*args)  # type: ignore[arg-type]
        else:
            args = (x, choices, weights, *(w.to(dtype) for w in (w1, w3, w2)), limit)  # type: ignore[assignment]
            want, found = experts_reference(*args), twins.later("experts", "experts")(*args)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        close(found, want, 2 * rounding(dtype))  # hidden values are rounded too, and the interpreter rounds down


def test_experts_keep_what_is_not_finite() -> None:
    x, choices, weights = randn(3, 8), torch.tensor([[0], [1], [0]], device=DEVICE), randn(3, 1)
    x[0, 2], x[1, 5] = torch.nan, torch.inf
    w1, w3, w2 = (randn(2, 8, 8, seed=i) for i in range(3))
    args = (x, choices, weights, w1, w3, w2, 1.0)
    want, found = experts_reference(*args), twins.later("experts", "experts")(*args)
    assert torch.equal(found.isnan(), want.isnan()) and bool(found[0].isnan().all())
    close(found[2], want[2], 1e-5)


@pytest.mark.skipif(HAS_GPU, reason="about machines without a GPU")
def test_nothing_of_it_runs_on_the_cpu_by_itself() -> None:
    assert not twins.usable(torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU that Triton compiles for")
def test_the_registry_picks_them_on_a_gpu() -> None:
    x = randn(3, 8)
    assert twins.usable(x)
    close(norms.rms_norm(x, None, 1e-6), norms.rms_norm_reference(x, None, 1e-6), 1e-5)
