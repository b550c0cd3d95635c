"""Routed experts on weights in the inputs' dtype or in packed FP4.

References: `ops/experts.py`, `ops/packed_experts.py`.

Choices are sorted by expert, and every expert's rows are cut into blocks, so that a program works for one expert. Two
kernels: gate and up with SwiGLU and the routing weight, then down; both go through a row of the weights in blocks and
unpack FP4 in registers. Nothing waits for the device: there are as many programs as the worst distribution needs, and
those left over end at once.

T tokens, D hidden, E experts, A active experts a token, I expert width; R = T A rows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.packed_weight import PackedWeight
from rorqual.ops.triton import is_interpreted
from rorqual.ops.triton.index_scan import e2m1, e8m0

ROWS, COLUMNS, STEP = 16, 64, 64
"""Rows and columns of a program, and numbers of a row at a time."""

GROUP = 32
"""Numbers of a packed row that share a scale."""


@triton.jit
def _weights(w, scales, n, k, height, width, groups, IS_PACKED: tl.constexpr, GROUP: tl.constexpr):
    """Rows `n` of one expert's matrix [height, width] at columns `k`, as [k, n]."""
    here = (k < width)[:, None] & (n < height)[None, :]
    if IS_PACKED:
        code = tl.load(w + n[None, :] * (width // 2) + (k // 2)[:, None], mask=here, other=0).to(tl.int32)
        code = tl.where((k % 2)[:, None] == 1, code >> 4, code & 15)
        scale = tl.load(scales + n[None, :] * groups + (k // GROUP)[:, None], mask=here, other=127)
        return e2m1(code) * e8m0(scale)
    return tl.load(w + n[None, :] * width + k[:, None], mask=here, other=0.0)


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    b = b.to(a.dtype)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _up(x, token, gate, bounds, blocks, w1, s1, w3, s3, hidden, num_experts, d, inner, groups, limit,
        IS_PACKED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
        WIDEN: tl.constexpr):  # fmt: skip
    """hidden[r] = swiglu(w1 x[token[r]], w3 x[token[r]]) gate[r] for a block of one expert's rows."""
    e = tl.load(blocks + 2 * tl.program_id(0))
    if e < num_experts:
        r = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, ROWS)
        mine = r < tl.load(bounds + e + 1)
        at = tl.load(token + r, mask=mine, other=0)
        n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        row_bytes = d // 2 if IS_PACKED else d
        w1 += e * inner * row_bytes
        w3 += e * inner * row_bytes
        s1 += e * inner * groups
        s3 += e * inner * groups
        a, u = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, d, STEP):
            k = first + tl.arange(0, STEP)
            some = tl.load(x + at[:, None] * d + k[None, :], mask=mine[:, None] & (k < d)[None, :], other=0.0)
            a += _dot(some, _weights(w1, s1, n, k, inner, d, groups, IS_PACKED, GROUP), WIDEN)
            u += _dot(some, _weights(w3, s3, n, k, inner, d, groups, IS_PACKED, GROUP), WIDEN)
        a = tl.where(a > limit, limit, a)  # a NaN stays
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        value = a / (1.0 + tl.exp(-a)) * u * tl.load(gate + r, mask=mine, other=0.0)[:, None]
        tl.store(hidden + r[:, None] * inner + n[None, :], value.to(hidden.dtype.element_ty),
                 mask=mine[:, None] & (n < inner)[None, :])  # fmt: skip


@triton.jit
def _down(hidden, bounds, blocks, w2, s2, out, num_experts, d, inner, groups,
          IS_PACKED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
          WIDEN: tl.constexpr):  # fmt: skip
    """out[r] = w2 hidden[r] for a block of one expert's rows."""
    e = tl.load(blocks + 2 * tl.program_id(0))
    if e < num_experts:
        r = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, ROWS)
        mine = r < tl.load(bounds + e + 1)
        n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        w2 += e * d * (inner // 2 if IS_PACKED else inner)
        s2 += e * d * groups
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, inner, STEP):
            k = first + tl.arange(0, STEP)
            some = tl.load(hidden + r[:, None] * inner + k[None, :], mask=mine[:, None] & (k < inner)[None, :],
                           other=0.0)  # fmt: skip
            y += _dot(some, _weights(w2, s2, n, k, d, inner, groups, IS_PACKED, GROUP), WIDEN)
        tl.store(out + r[:, None] * d + n[None, :], y.to(out.dtype.element_ty),
                 mask=mine[:, None] & (n < d)[None, :])  # fmt: skip


def _blocks(bounds: Tensor, rows: int) -> Tensor:
    """Expert and first row of each program, int64 [P, 2]; expert E for those left over. `bounds` int64 [E + 1]."""
    num_experts = len(bounds) - 1
    programs = triton.cdiv(rows, ROWS) + min(num_experts, rows) - 1  # each expert in use may waste most of a block
    each = (bounds.diff() + ROWS - 1) // ROWS
    ends = each.cumsum(0)
    number = torch.arange(programs, device=bounds.device)
    expert = torch.searchsorted(ends, number, right=True)
    known = expert.clamp(max=num_experts - 1)
    first = bounds[known] + (number - (ends - each)[known]) * ROWS
    return torch.stack([expert, first], 1).contiguous()


def _apply(
    x: Tensor, experts: Tensor, weights: Tensor, matrices: list[tuple[Tensor, Tensor | None]], inner: int,
    num_experts: int, limit: float,
) -> Tensor:  # fmt: skip
    """fp32 [T, D]; `matrices`: w1, w3 and w2, with scales where they are packed."""
    (tokens, active), d = experts.shape, x.shape[1]
    x = x.contiguous()
    order = experts.flatten().argsort(stable=True)
    bounds = torch.searchsorted(experts.flatten()[order], torch.arange(num_experts + 1, device=x.device))
    blocks, gate, token = _blocks(bounds, len(order)), weights.flatten()[order].float(), order // active
    hidden, out = x.new_empty(len(order), inner), x.new_empty(len(order), d)
    options = {
        "IS_PACKED": matrices[0][1] is not None, "GROUP": GROUP, "ROWS": ROWS, "COLUMNS": COLUMNS, "STEP": STEP,
        "WIDEN": is_interpreted(),
    }  # fmt: skip
    codes = [w.contiguous() for w, _ in matrices]
    scales = [code if s is None else s.contiguous() for code, (_, s) in zip(codes, matrices, strict=True)]
    _up[(len(blocks), triton.cdiv(inner, COLUMNS))](
        x, token, gate, bounds, blocks, codes[0], scales[0], codes[1], scales[1], hidden, num_experts, d, inner,
        triton.cdiv(d, GROUP), limit if limit > 0 else math.inf, **options,
    )  # fmt: skip
    _down[(len(blocks), triton.cdiv(d, COLUMNS))](
        hidden, bounds, blocks, codes[2], scales[2], out, num_experts, d, inner, triton.cdiv(inner, GROUP), **options
    )
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=x.device)
    slots = inverse.view(tokens, active).sort(-1).values  # fixed order of the sum: ascending expert id
    return out[slots.flatten()].view(tokens, active, -1).float().sum(1)


def experts(x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float) -> Tensor:
    """`experts.experts_reference`; weights have x's dtype, and there is at least one choice."""
    return _apply(x, experts, weights, [(w, None) for w in (w1, w3, w2)], w1.shape[1], w1.shape[0], limit)


def packed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, limit: float
) -> Tensor:
    """`packed_experts.packed_experts_reference` for FP4 stacks."""
    matrices = [(w.codes, None if w.scale is None else w.scale.view(torch.uint8)) for w in (w1, w3, w2)]
    return _apply(x, experts, weights, matrices, w1.shape[1], w1.shape[0], limit)
