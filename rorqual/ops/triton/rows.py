"""Kernels that work on rows: RMS norm, rope, and both at once. References: `ops/norms.py`, `ops/rope.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_rope(x, weight, table, y, width, rope, rows_per_angle, eps, inverse, HAS_NORM: tl.constexpr,
               HAS_WEIGHT: tl.constexpr, HAS_ROPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row: x [rows, width] -> y; table fp32 [rows / rows_per_angle, rope / 2, 2]."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    even, odd = 2 * pair, 2 * pair + 1
    a = tl.load(x + row * width + even, mask=even < width, other=0.0).to(tl.float32)
    b = tl.load(x + row * width + odd, mask=odd < width, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, 0) / width + eps)
        a, b = a * scale, b * scale
        if HAS_WEIGHT:
            a = a * tl.load(weight + even, mask=even < width, other=0.0).to(tl.float32)
            b = b * tl.load(weight + odd, mask=odd < width, other=0.0).to(tl.float32)
        if HAS_ROPE:  # the reference rounds between the two
            a = a.to(y.dtype.element_ty).to(tl.float32)
            b = b.to(y.dtype.element_ty).to(tl.float32)
    if HAS_ROPE:
        first = (width - rope) // 2
        turned = (pair >= first) & (even < width)
        angle = table + (row // rows_per_angle) * rope + 2 * (pair - first)
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + 1, mask=turned, other=0.0) * inverse
        a, b = a * cos - b * sin, a * sin + b * cos
    tl.store(y + row * width + even, a.to(y.dtype.element_ty), mask=even < width)
    tl.store(y + row * width + odd, b.to(y.dtype.element_ty), mask=odd < width)


def _run(x: Tensor, weight: Tensor | None, eps: float, table: Tensor | None, inverse: bool, has_norm: bool) -> Tensor:
    width = x.shape[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // max(width, 1)
    rope, share, angles = 0, 1, x
    if table is not None:
        rope = 2 * table.shape[-1]
        # trailing axes of size 1 (heads) share their angles; other broadcasts are written out
        lead, kept = list(table.shape[:-1]), list(x.shape[:-1])
        while lead and lead[-1] == 1:
            lead.pop()
            share *= kept.pop()
        flat = table.reshape(*lead, rope // 2).expand(*kept, rope // 2)
        angles = torch.view_as_real(flat.resolve_conj().contiguous())
    if rows:
        _norm_rope[(rows,)](
            x, x if weight is None else weight, angles, y, width, rope, share, eps, -1.0 if inverse else 1.0,
            HAS_NORM=has_norm, HAS_WEIGHT=weight is not None, HAS_ROPE=table is not None,
            BLOCK=triton.next_power_of_2((width + 1) // 2),
        )  # fmt: skip
    return y


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`norms.rms_norm_reference`."""
    return _run(x, weight, eps, None, False, True)


def rope(x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """`rope.apply_rope_reference`."""
    return _run(x, None, 0.0, table, inverse, False)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, table: Tensor) -> Tensor:
    """`rope.norm_rope_reference`."""
    return _run(x, weight, eps, table, False, True)
