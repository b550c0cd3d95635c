"""Twins of the inference operations for GPUs, in Triton: what `native/` is for the CPU.

They are used where the optional package `triton` is installed, a tensor lies on a GPU that it compiles for, and no
gradients are wanted; nothing here is imported before that. Each is held to its reference by `tests/unit/
test_triton_ops.py`: on a GPU where there is one, else by Triton's interpreter, which runs kernels on CPU tensors. The
sums' order is that of the blocks, so numbers agree with the CPU's within rounding, not bit by bit.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

DEVICES = frozenset(("cuda", "xpu"))
"""Kinds of device that Triton compiles for; torch calls AMD's GPUs `cuda` too."""


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which multiplies no bf16 matrices: kernels widen them first."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def usable(tensor: Tensor) -> bool:
    """Whether the Triton twins can work on tensors like this one: on such a GPU, fp32 or bf16, without gradients."""
    return (
        tensor.device.type in DEVICES
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(tensor.device.type)
        and installed()
    )


def later(module: str, function: str) -> Callable[..., Any]:
    """`function` of `rorqual.ops.triton.<module>`, imported when it is called first."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"rorqual.ops.triton.{module}"), function)(*args, **kwargs)

    return call
