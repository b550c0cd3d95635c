"""The grouped product against one matrix product a group, in both ways of computing it."""

import pytest
import torch

from rorqual.ops import registry
from rorqual.ops.grouped_linear import grouped_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "groups", "width", "rank"), [(1, 1, 8, 3), (7, 2, 16, 5), (33, 4, 6, 6), (0, 2, 4, 4)]
)
@pytest.mark.parametrize("name", ["reference", "by_group"])
def test_equals_a_product_a_group(
    name: str, tokens: int, groups: int, width: int, rank: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, groups, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(groups, rank, width, generator=generator).requires_grad_()
    up = torch.randn(tokens, groups, rank, generator=generator).to(dtype)
    want = torch.stack([x[:, g] @ weight[g].to(dtype).t() for g in range(groups)], 1)
    gradients = torch.autograd.grad(want, (x, weight), up)
    got = registry.implementations("grouped_linear")[name](x, weight)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(got, want, **close)
    for mine, theirs in zip(torch.autograd.grad(got, (x, weight), up), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def test_is_contiguous() -> None:
    x, weight = torch.randn(5, 2, 8), torch.randn(2, 3, 8)
    assert grouped_linear(x, weight).is_contiguous()
    assert grouped_linear(x.to("meta"), weight.to("meta")).shape == (5, 2, 3)
