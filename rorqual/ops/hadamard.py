"""Walsh-Hadamard rotation of index queries and keys. Source: checkpoint behaviour."""

from functools import lru_cache

import torch
from torch import Tensor

from rorqual.ops.linear import linear


@lru_cache(maxsize=8)
def hadamard_matrix(size: int) -> Tensor:
    """Sylvester-Hadamard matrix, natural order, entries (-1)^popcount(a & b): fp32 [size, size], a power of two."""
    with torch.inference_mode(False):  # the cached matrix must also serve training
        matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return matrix


@lru_cache(maxsize=8)
def _scaled(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return (hadamard_matrix(size) * size**-0.5).to(device, dtype)


def scaled_hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix times size^(-1/2), [size, size]; it must not be written to."""
    return _scaled(size, device, dtype)


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last axis (a power of two, K) by the Hadamard matrix times K^(-1/2): an orthogonal rotation."""
    return linear(x, _scaled(x.shape[-1], x.device, x.dtype))  # the matrix is symmetric
