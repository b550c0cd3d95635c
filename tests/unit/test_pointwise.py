"""Functions of one number: near the references, and the same bits wherever a number stands."""

import pytest
import torch

from rorqual.ops import pointwise, registry
from rorqual.ops.native import load

needs_compiler = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


@needs_compiler
@pytest.mark.parametrize("name", ["sigmoid", "silu"])
def test_every_implementation_is_near_the_reference(name: str) -> None:
    x = torch.cat([torch.linspace(-120, 120, 2003), torch.tensor([0.0, -0.0, 1e-30, 3.4e38, -3.4e38])])
    every = registry.implementations(name)
    assert set(every) == {"reference", "native"}
    want = every["reference"](x.double())
    for function in every.values():
        assert torch.allclose(function(x).double(), want, rtol=3e-7, atol=1e-30)


@needs_compiler
@pytest.mark.parametrize("function", [pointwise.sigmoid, pointwise.silu])
def test_a_number_has_the_same_bits_in_every_place(function: object) -> None:
    assert callable(function)
    x = torch.randn(5 * 37 + 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = function(x)
        for size in (1, 3, 16, 37):
            assert torch.equal(torch.cat([function(part) for part in x.split(size)]), whole)
        assert torch.equal(function(x[:150].view(3, 50).t()), whole[:150].view(3, 50).t())


def test_gradients_come_from_the_reference() -> None:
    x = torch.randn(9, dtype=torch.float32, requires_grad=True)
    for function in (pointwise.sigmoid, pointwise.silu):
        assert torch.autograd.grad(function(x).sum(), x)[0].abs().sum() > 0
