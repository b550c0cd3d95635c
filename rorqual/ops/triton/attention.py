"""Attention over a window and compressed entries with a sink, in one pass. Reference: `ops/sparse_attention.py`.

A program holds some heads of one query and goes over its window, then over its entries: those it picked (CSA) or all
that it may see (HCA), with running maximum and sum. Scores exist for one block of keys at a time.

B batch, T query tokens, H heads, K head width, W window, C entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.triton import is_interpreted

HEADS, KEYS = 16, 32
"""Heads and keys of one step."""


@triton.jit
def _step(query, rows, allowed, k, width, scale, top, total, value, WIDEN: tl.constexpr):
    """Take in the keys at `rows` (addresses), each key its own value."""
    keys = tl.load(rows[:, None] + k[None, :], mask=allowed[:, None] & (k < width)[None, :], other=0.0)
    if WIDEN:
        keys = keys.to(tl.float32)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(allowed[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp(top - higher)
    weights = tl.exp(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    value = value * shrink[:, None] + tl.dot(weights.to(keys.dtype), keys, input_precision="ieee")
    return higher, total, value


@triton.jit
def _attend(q, kv, sink, positions, entries, table, start, end, picks, out, lse, tokens, heads, width, window, scale,
            num_picks, stride, per_page, position_stride, end_stride, start_stride,
            HAS_ENTRIES: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_START: tl.constexpr, HAS_PICKS: tl.constexpr,
            HEADS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // tokens, token % tokens
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    k, lane = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    at = (token * heads + h)[:, None] * width + k[None, :]
    here = (h < heads)[:, None] & (k < width)[None, :]
    query = tl.load(q + at, mask=here, other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    top = tl.load(sink + h, mask=h < heads, other=0.0).to(tl.float32)
    total = tl.full((HEADS,), 1.0, tl.float32)
    value = tl.zeros((HEADS, WIDTH), tl.float32)
    position = tl.load(positions + b * position_stride + t)
    base = kv + (b * (window - 1 + tokens) + t) * width  # the oldest key that the window could hold
    for first in range(0, window, KEYS):
        s = first + lane
        allowed = (s < window) & (window - 1 - s <= position)
        top, total, value = _step(query, base + s * width, allowed, k, width, scale, top, total, value, WIDEN)
    if HAS_ENTRIES:
        last = tl.load(end + b * end_stride + t)
        low = tl.zeros_like(last)
        if HAS_START:
            low = tl.load(start + b * start_stride + t)
        begin, stop = low, last
        if HAS_PICKS:
            begin, stop = tl.zeros_like(last), tl.zeros_like(last) + num_picks
        for first in range(begin, stop, KEYS):
            c = first + lane.to(tl.int64)
            allowed = c < stop
            if HAS_PICKS:
                c = tl.load(picks + token * num_picks + c, mask=allowed, other=-1)
                allowed = allowed & (c >= low) & (c < last)
            row = c
            if HAS_TABLE:
                row = tl.load(table + c // per_page, mask=allowed, other=0) * per_page + c % per_page
            top, total, value = _step(
                query, entries + b * stride + row * width, allowed, k, width, scale, top, total, value, WIDEN
            )
    tl.store(out + at, (value / total[:, None]).to(out.dtype.element_ty), mask=here)
    tl.store(lse + token * heads + h, tl.log(total) + top, mask=h < heads)


def attend(
    q: Tensor, kv: Tensor, sink: Tensor, positions: Tensor, window: int, scale: float, entries: Tensor | None,
    start: Tensor | None, end: Tensor | None, picks: Tensor | None, table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sparse_attention.attention_reference`; also the log-sum-exp. With `table` the entries are pages [P, R, K]."""
    q, kv, sink, positions = q.contiguous(), kv.contiguous(), sink.contiguous(), positions.contiguous()
    b, t, h, k = q.shape
    out, lse = torch.empty_like(q), q.new_empty(b, t, h, dtype=torch.float32)
    has = entries is not None and end is not None
    stride = per_page = 0
    if entries is not None:
        entries = entries.contiguous()
        per_page, stride = entries.shape[1], 0 if table is not None else entries.stride(0)
    start, end, picks, table = (None if x is None else x.contiguous() for x in (start, end, picks, table))

    def row_stride(x: Tensor | None) -> int:  # one row may stand for all
        return 0 if x is None or x.shape[0] == 1 else x.stride(0)

    def pointer(x: Tensor | None) -> Tensor:  # what is absent is not read
        return positions if x is None else x

    if q.numel():
        _attend[(b * t, triton.cdiv(h, HEADS))](
            q, kv, sink, positions, q if entries is None else entries, pointer(table), pointer(start), pointer(end),
            pointer(picks), out, lse, t, h, k, window, scale, 0 if picks is None else picks.shape[-1], stride, per_page,
            row_stride(positions), row_stride(end), row_stride(start), HAS_ENTRIES=has, HAS_TABLE=table is not None,
            HAS_START=start is not None, HAS_PICKS=picks is not None, HEADS=HEADS, KEYS=KEYS,
            WIDTH=max(16, triton.next_power_of_2(k)), WIDEN=is_interpreted(),
        )  # fmt: skip
    return out, lse
