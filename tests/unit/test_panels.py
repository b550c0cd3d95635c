"""Products of many rows are those of single rows, bit by bit, whichever way the C code goes."""

import pytest
import torch

from rorqual.ops.experts import grouped_experts
from rorqual.ops.linear import linear, linear_exact
from rorqual.ops.native import load

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("inner", "out", "groups"),
    [(64, 48, 1), (96, 17, 1), (128, 64, 2), (2112, 5, 1), (4160, 20, 1), (40, 33, 3), (256, 20, 1)],
)
def test_linear(dtype: torch.dtype, inner: int, out: int, groups: int) -> None:
    """Whole steps and ragged ones, short rows and long ones, columns that fill no panel, groups."""
    x, weight = torch.randn(101, groups, inner).to(dtype), torch.randn(groups * out, inner).to(dtype)
    x = x[:, 0] if groups == 1 else x
    many = linear(x, weight, groups)
    assert torch.equal(many, torch.cat([linear(row, weight, groups) for row in x.split(1)]))
    assert torch.equal(many[:60], linear(x[:60], weight, groups))
    if groups == 1:
        exact = linear_exact(x, weight)
        assert torch.equal(exact, torch.cat([linear_exact(row, weight) for row in x.split(1)]))
        assert torch.allclose(exact, x.float() @ weight.float().t(), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "inner"), [(64, 96), (32, 40)])
def test_experts(dtype: torch.dtype, d: int, inner: int) -> None:
    """Experts with many rows, with few and with none."""
    x, weights = torch.randn(200, d).to(dtype), torch.rand(200, 2)
    chosen = torch.randint(0, 3, (200, 2))
    chosen[:3, 1] = 3
    w1, w3, w2 = (torch.randn(5, *shape).to(dtype) * 0.1 for shape in ((inner, d), (inner, d), (d, inner)))
    shared = torch.randn(200, d).to(dtype)

    def run(first: int, last: int) -> torch.Tensor:
        part = slice(first, last)
        return grouped_experts(x[part], chosen[part], weights[part], w1, w3, w2, 2.0, shared[part])

    assert torch.equal(run(0, 200), torch.cat([run(i, i + 1) for i in range(200)]))
