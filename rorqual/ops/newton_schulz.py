"""Newton–Schulz iteration: the nearest (partial) isometry of a matrix, by matrix products alone.

For X = U S Vᵀ the result approaches U Vᵀ. Each iteration applies the odd polynomial aX + (bA + cA²)X with A =
XXᵀ, which acts on the singular values alone: s -> a s + b s³ + c s⁵.

Source: V4 report, Algorithm 1 ("hybrid" schedule: eight fast steps, then two that pin the values to 1, where
the polynomial of the last two steps has derivative zero). Left out: per-step optimal coefficients (Polar
Express).
"""

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

FAST: Coefficients = (3.4445, -4.7750, 2.0315)
PINNED: Coefficients = (2.0, -1.5, 0.5)
HYBRID: tuple[Coefficients, ...] = (FAST,) * 8 + (PINNED,) * 2
"""V4's schedule: singular values end within 2e-3 of 1 when they start above 1e-4 of the Frobenius norm."""
FIVE_STEP: tuple[Coefficients, ...] = (FAST,) * 5
"""The schedule of the first Muon: values end in [0.7, 1.2], so updates come out 10-15% small. For ablations.
"""


def newton_schulz(
    matrices: Tensor,
    steps: tuple[Coefficients, ...] = HYBRID,
    *,
    dtype: torch.dtype | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Orthogonalise every matrix of a batch.

    Shapes: [..., n, m] -> [..., n, m] in the input's dtype; rows (or columns, whichever are fewer) come out
    orthonormal. `dtype` is the working precision: float32 on CPUs and bfloat16 elsewhere unless given. `eps` is
    added to the norm, so an all-zero matrix (an expert that saw no token) gives zeros, not NaN.
    """
    n, m = matrices.shape[-2:]
    if dtype is None:
        dtype = torch.float32 if matrices.is_cpu else torch.bfloat16
    x = matrices.reshape(-1, n, m)
    # The norm is taken in float32: bfloat16 squares of a wide matrix lose the small singular values.
    x = (x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32) + eps)).to(dtype)
    is_tall = n > m
    if is_tall:
        x = x.mT.contiguous()
    for a, b, c in steps:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if is_tall:
        x = x.mT
    return x.reshape(matrices.shape).to(matrices.dtype)
