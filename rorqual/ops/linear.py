"""Products with dense weights [out, in], without biases.

Without gradients on the CPU a product is C whose order of additions does not depend on the number of rows, so that a
token's result is the same alone, in a chunk and in a batch; torch's own products promise no such thing.
"""

import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.frozen import frozen_linear
from rorqual.ops.grouped_linear import grouped_linear
from rorqual.ops.native import inference, infers
from rorqual.ops.packed_weight import PackedWeight


def linear_reference(x: Tensor, weight: Tensor, groups: int = 1, *, exact: bool = False) -> Tensor:
    """y = x W^T, [..., in] -> [..., out], or each of `groups` with its own rows of W: [..., G, in] -> [..., G, out].

    `exact`: the result is fp32, else of x's dtype. x and weight have one dtype.
    """
    if exact:
        x, weight = x.float(), weight.float()
    if groups == 1:
        return F.linear(x, weight)
    return grouped_linear(x.flatten(0, -3), weight.view(groups, -1, weight.shape[-1])).unflatten(0, x.shape[:-2])


def linear(x: Tensor, weight: Tensor | PackedWeight, groups: int = 1) -> Tensor:
    """`linear_reference` in x's dtype, to which the weight is cast, by the fastest implementation at hand.

    A packed weight is multiplied as it is, and gets no gradient.
    """
    if isinstance(weight, PackedWeight):
        return frozen_linear(x, weight, groups)
    return registry.pick("linear", x)(x, weight if weight.dtype is x.dtype else weight.to(x.dtype), groups)


def linear_exact(x: Tensor, weight: Tensor) -> Tensor:
    """The product in fp32 whatever x and weight are: [..., in] -> fp32 [..., out]."""
    if weight.dtype is not x.dtype:
        x, weight = x.float(), weight.float()
    return registry.pick("linear", x)(x, weight, exact=True)


registry.register("linear", "reference", linear_reference)
registry.register("linear", "native", inference.linear, infers)
