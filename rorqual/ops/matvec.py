"""Products of activations with weights kept as they are stored (`ops/packed_weight.py`): weight-only quantisation.

Source: serving practice (weights are read once and unpacked in registers or in cache). Activations are fp32 or bf16,
sums are fp32. A row's result does not depend on the rows beside it: every sum has one order, for one row and for many.
Left out: activations in FP8.

M rows, I input channels, O output channels.
"""

import torch
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.native import load
from rorqual.ops.native.library import call
from rorqual.ops.packed_weight import FORMATS, PackedWeight


def packed_linear(x: Tensor, weight: PackedWeight, groups: int = 1) -> Tensor:
    """x [..., I] (fp32 or bf16) times the transpose of `weight` [O, I] -> [..., O] in x's dtype, without gradient.

    With `groups` G each has its own rows of the weight: x [..., G, I] -> [..., G, O / G].
    """
    return registry.pick("packed_linear", x)(x, weight, groups)


def packed_linear_reference(x: Tensor, weight: PackedWeight, groups: int = 1) -> Tensor:
    """See `packed_linear`: the dequantised weight, products and sums in fp32."""
    numbers = weight.dequantise()
    if groups == 1:
        return (x.float() @ numbers.t()).to(x.dtype)
    return torch.einsum("...gi,goi->...go", x.float(), numbers.unflatten(0, (groups, -1))).to(x.dtype)


def code_arguments(weight: PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes, e8m0 scales and fp32 scales, as the C functions read them; what the format does not have is None."""
    return (
        weight.codes,
        weight.scale if weight.format == "fp4" else None,
        weight.scale if weight.format in ("fp8", "int8") else None,
    )


def _packed_linear_native(x: Tensor, weight: PackedWeight, groups: int = 1) -> Tensor:
    x, (out, width) = x.contiguous(), weight.shape
    y, rows = x.new_empty(*x.shape[:-1], out // groups), x.numel() // (width * groups)
    arguments = code_arguments(weight)
    call("packed_matvec", x, *arguments, FORMATS.index(weight.format), rows, groups, out // groups, width, y)
    return y


def works(x: Tensor) -> bool:
    """Whether the native twins take activations like `x`."""
    return x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and load() is not None


registry.register("packed_linear", "reference", packed_linear_reference)
registry.register("packed_linear", "native", _packed_linear_native, works)
