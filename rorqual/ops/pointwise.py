"""Functions of one number for which torch gives other bits at the end of a tensor than inside.

Torch computes what does not fill its vectors by other instructions, so a token's result depends on how many tokens come
with it. Without gradients on the CPU the same instructions run everywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.native import inference, infers


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), any shape, in x's dtype."""
    return registry.pick("sigmoid", x)(x)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), any shape, in x's dtype."""
    return registry.pick("silu", x)(x)


def _works(x: Tensor) -> bool:
    return x.dtype is torch.float32 and infers(x)


registry.register("sigmoid", "reference", torch.sigmoid)
registry.register("sigmoid", "native", inference.sigmoid, _works)
registry.register("silu", "reference", F.silu)
registry.register("silu", "native", inference.silu, _works)
