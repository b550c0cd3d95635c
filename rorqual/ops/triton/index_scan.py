"""Index scores of many entries and the choice of the best. Reference: `ops/index_scan.py`.

Two kernels: scores, a block of keys at a time for all heads of a query (keys fp32, bf16 or packed FP4, in pages or in a
row); then a choice by threshold, found digit by digit of the scores' bits (8 bits a pass), so that nothing is sorted.

R queries, J index heads, K index width, C entries.
"""

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.triton import is_interpreted

if TYPE_CHECKING:
    from rorqual.ops.index_scan import IndexKeys

GROUP = 32
"""Channels of a packed key that share a scale, at most."""

KEYS = 64
"""Entries of one program of the score kernel."""


@triton.jit
def e2m1(code):
    """FP4 codes 0 to 15 -> their values, fp32."""
    exponent, mantissa = (code >> 1) & 3, (code & 1).to(tl.float32)
    size = tl.where(exponent == 0, 0.5 * mantissa, (1.0 + 0.5 * mantissa) * tl.exp2((exponent - 1).to(tl.float32)))
    return tl.where(code >= 8, -size, size)


@triton.jit
def e8m0(byte):
    """Scale bytes -> 2^(byte - 127), fp32, by their bits; 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte.to(tl.int32) << 23)
    bits = tl.where(byte == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scores(q, weights, keys, table, scores, entries, per_page, row_bytes, heads, width, group,
            IS_PACKED: tl.constexpr, HAS_TABLE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
            KEYS: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """scores[r, c] = sum_j weights[r, j] relu(q[r, j] . keys[c]) of one query and KEYS entries."""
    r = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    j, k = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    row = c.to(tl.int64)
    if HAS_TABLE:
        row = tl.load(table + row // per_page, mask=c < entries, other=0) * per_page + row % per_page
    here = (c < entries)[:, None] & (k < width)[None, :]
    if IS_PACKED:
        at = keys + row[:, None] * row_bytes
        code = tl.load(at + (k // 2)[None, :], mask=here, other=0).to(tl.int32)
        code = tl.where((k % 2)[None, :] == 1, code >> 4, code & 15)
        found = e2m1(code) * e8m0(tl.load(at + (width // 2 + k // group)[None, :], mask=here, other=127))
    else:
        found = tl.load(keys + row[:, None] * width + k[None, :], mask=here, other=0.0)
    query = tl.load(
        q + (r * heads + j)[:, None] * width + k[None, :], mask=(j < heads)[:, None] & (k < width)[None, :], other=0.0
    )
    found = found.to(query.dtype)
    if WIDEN:
        query, found = query.to(tl.float32), found.to(tl.float32)
    dots = tl.dot(query, tl.trans(found), input_precision="ieee")
    gate = tl.load(weights + r * heads + j, mask=j < heads, other=0.0)
    positive = tl.where(dots < 0.0, 0.0, dots)  # a NaN stays
    tl.store(scores + r * entries + c, tl.sum(positive * gate[:, None], 0), mask=c < entries)


@triton.jit
def ordered(score):
    """Scores as numbers from 0 that order alike; a NaN is the largest, -0 and 0 are equal."""
    score = tl.where(score != score, float("inf"), score + 0.0)
    bits = score.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def _choose(scores, start, end, picks, entries, top_k, HAS_START: tl.constexpr, BLOCK: tl.constexpr):
    """The best `top_k` of one row's visible range, ascending, lowest index first among equals; -1 for empty places."""
    r = tl.program_id(0).to(tl.int64)
    last = tl.load(end + r)
    first = tl.zeros_like(last)
    if HAS_START:
        first = tl.load(start + r)
    lane, bins = tl.arange(0, BLOCK), tl.arange(0, 256)
    lowest = 0x007FFFFF  # of -inf, which is never chosen
    prefix = tl.zeros_like(last)  # the threshold's digits that are known
    want = tl.zeros_like(last) + top_k
    everything = last - first <= top_k
    for digit in tl.static_range(4):
        shift: tl.constexpr = 24 - 8 * digit
        count = tl.zeros((256,), tl.int32)
        for at in range(first, last, BLOCK):
            c = at + lane
            rank = ordered(tl.load(scores + r * entries + c, mask=c < last, other=float("-inf")))
            same = (c < last) & (rank > lowest) & ((rank >> (shift + 8)) == (prefix >> (shift + 8)))
            one = ((rank >> shift) & 255).to(tl.int32)
            count += tl.sum(((one[:, None] == bins[None, :]) & same[:, None]).to(tl.int32), 0)
        above = tl.sum(count, 0) - tl.cumsum(count, 0)  # with a larger digit
        chosen = tl.max(tl.where((above + count >= want) & (above < want), bins, 0), 0)
        want -= tl.sum(tl.where(bins == chosen, above, 0), 0)
        prefix += chosen.to(tl.int64) << shift
    taken, equals = tl.zeros_like(last), tl.zeros_like(last)
    for at in range(first, last, BLOCK):
        c = at + lane
        rank = ordered(tl.load(scores + r * entries + c, mask=c < last, other=float("-inf")))
        seen = (c < last) & (rank > lowest)
        equal = (seen & (rank == prefix)).to(tl.int64)
        keep = (seen & (rank > prefix)) | ((equal == 1) & (equals + tl.cumsum(equal, 0) <= want))
        keep = tl.where(everything, c < last, keep).to(tl.int64)
        place = taken + tl.cumsum(keep, 0) - 1
        tl.store(picks + r * top_k + place, c.to(tl.int64), mask=(keep == 1) & (place < top_k))
        taken += tl.sum(keep, 0)
        equals += tl.sum(equal, 0)


def scan_scores(q: Tensor, weights: Tensor, keys: "IndexKeys", length: int) -> Tensor:
    """`index_scan.scan_scores_reference`."""
    r, j, k = q.shape
    rows, q = keys.rows.contiguous(), q.contiguous()
    scores = q.new_empty(r, length, dtype=torch.float32)
    if not scores.numel():
        return scores
    _scores[(triton.cdiv(length, KEYS), r)](
        q, weights.float().contiguous(), rows, rows if keys.table is None else keys.table.contiguous(), scores, length,
        rows.shape[-2], rows.shape[-1], j, k, math.gcd(k, GROUP), IS_PACKED=keys.is_packed,
        HAS_TABLE=keys.table is not None, HEADS=max(16, triton.next_power_of_2(j)),
        WIDTH=max(16, triton.next_power_of_2(k)), KEYS=KEYS, WIDEN=is_interpreted(),
    )  # fmt: skip
    return scores


def index_scan(q: Tensor, weights: Tensor, keys: "IndexKeys", start: Tensor | None, end: Tensor, top_k: int) -> Tensor:
    """`index_scan.index_scan_reference`."""
    length = keys.rows.shape[0] if keys.table is None else keys.table.numel() * keys.rows.shape[1]
    scores = scan_scores(q, weights, keys, length)
    picks = torch.full((len(q), top_k), -1, dtype=torch.int64, device=q.device)
    if len(q):
        _choose[(len(q),)](
            scores, end if start is None else start.contiguous(), end.contiguous(), picks, length, top_k,
            HAS_START=start is not None, BLOCK=256,
        )  # fmt: skip
    return picks
