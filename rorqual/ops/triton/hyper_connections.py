"""The mix around a sublayer (mHC). Reference: `ops/hyper_connections.py`.

Two kernels before the sublayer, since all coefficients of a token need all its channels: the dynamic part and the norm;
then coefficients, Sinkhorn and collapse. One after it.

T tokens, N streams, D hidden, M coefficients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""Channels of one step."""


@triton.jit
def _mix(x, fn, mix, width, count, eps, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """mix[t] = fn x[t] rsqrt(mean(x[t]^2) + eps): x [T, N*D], fn fp32 [M, N*D] -> [T, M]."""
    t = tl.program_id(0).to(tl.int64)
    m, lane = tl.arange(0, COUNT), tl.arange(0, BLOCK)
    sums, squares = tl.zeros((COUNT,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        c = first + lane
        value = tl.load(x + t * width + c, mask=c < width, other=0.0).to(tl.float32)
        weight = tl.load(
            fn + m[:, None] * width + c[None, :], mask=(m < count)[:, None] & (c < width)[None, :], other=0.0
        )
        sums += tl.sum(weight * value[None, :], 1)
        squares += value * value
    tl.store(mix + t * count + m, sums * tl.rsqrt(tl.sum(squares, 0) / width + eps), mask=m < count)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _before(x, mix, base, scale, y, post, comb, d, n, count, iters, eps,
            IS_HEAD: tl.constexpr, STREAMS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Coefficients of one token and the collapse of its streams [N, D]; the head has no post and comb."""
    t = tl.program_id(0).to(tl.int64)
    j, lane = tl.arange(0, STREAMS), tl.arange(0, BLOCK)
    there = j < n
    dynamic = tl.load(mix + t * count + j, mask=there, other=0.0)
    pre = _sigmoid(dynamic * tl.load(scale) + tl.load(base + j, mask=there, other=0.0)) + eps
    pre = tl.where(there, pre, 0.0)
    if not IS_HEAD:
        dynamic = tl.load(mix + t * count + n + j, mask=there, other=0.0)
        after = 2.0 * _sigmoid(dynamic * tl.load(scale + 1) + tl.load(base + n + j, mask=there, other=0.0))
        tl.store(post + t * n + j, after, mask=there)
        cell = j[:, None] * n + j[None, :]
        inside = there[:, None] & there[None, :]
        dynamic = tl.load(mix + t * count + 2 * n + cell, mask=inside, other=0.0)
        logits = dynamic * tl.load(scale + 2) + tl.load(base + 2 * n + cell, mask=inside, other=0.0)
        logits = tl.where(there[None, :], logits, float("-inf"))
        grown = tl.exp(logits - tl.max(logits, 1)[:, None])
        m = tl.where(inside, grown / tl.sum(grown, 1)[:, None] + eps, 0.0)
        m = m / (tl.sum(m, 0)[None, :] + eps)
        for _ in range(1, iters):
            m = m / (tl.sum(m, 1)[:, None] + eps)
            m = m / (tl.sum(m, 0)[None, :] + eps)
        tl.store(comb + t * n * n + cell, m, mask=inside)
    for first in range(0, d, BLOCK):
        c = first + lane
        mask = there[:, None] & (c < d)[None, :]
        value = tl.load(x + (t * n + j)[:, None] * d + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y + t * d + c, tl.sum(pre[:, None] * value, 0).to(y.dtype.element_ty), mask=c < d)


@triton.jit
def _after(x, y, post, comb, out, d, n, STREAMS: tl.constexpr, BLOCK: tl.constexpr):
    """out[k] = post[k] y + sum_j comb[j, k] x[j] for one token."""
    t = tl.program_id(0).to(tl.int64)
    k, lane = tl.arange(0, STREAMS), tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + lane
    spread = tl.load(post + t * n + k, mask=k < n, other=0.0)
    value = tl.load(y + t * d + c, mask=c < d, other=0.0).to(tl.float32)
    total = spread[:, None] * value[None, :]
    for j in range(n):
        weight = tl.load(comb + (t * n + j) * n + k, mask=k < n, other=0.0)
        stream = tl.load(x + (t * n + j) * d + c, mask=c < d, other=0.0).to(tl.float32)
        total += weight[:, None] * stream[None, :]
    mask = (k < n)[:, None] & (c < d)[None, :]
    tl.store(out + (t * n + k)[:, None] * d + c[None, :], total.to(out.dtype.element_ty), mask=mask)


def _mixed(streams: Tensor, fn: Tensor, eps: float) -> tuple[Tensor, int]:
    tokens, count = streams.shape[:-2].numel(), fn.shape[0]
    mix = streams.new_empty(tokens, count, dtype=torch.float32)
    if tokens:
        _mix[(tokens,)](
            streams, fn.float().contiguous(), mix, fn.shape[1], count, eps,
            COUNT=triton.next_power_of_2(count), BLOCK=BLOCK,
        )  # fmt: skip
    return mix, tokens


def hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`hyper_connections.hc_pre_reference`."""
    streams, (n, d), lead = streams.contiguous(), streams.shape[-2:], streams.shape[:-2]
    mix, tokens = _mixed(streams, fn, norm_eps)
    y, post, comb = streams.new_empty(*lead, d), mix.new_empty(*lead, n), mix.new_empty(*lead, n, n)
    if tokens:
        _before[(tokens,)](
            streams, mix, base.float(), scale.float(), y, post, comb, d, n, mix.shape[1], iters, eps, IS_HEAD=False,
            STREAMS=triton.next_power_of_2(n), BLOCK=BLOCK,
        )  # fmt: skip
    return y, post, comb


def hc_post(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """`hyper_connections.hc_post_reference`."""
    streams, y, post, comb = streams.contiguous(), y.contiguous(), post.contiguous(), comb.contiguous()
    (n, d), tokens = streams.shape[-2:], streams.shape[:-2].numel()
    out = torch.empty_like(streams)
    if tokens:
        _after[(tokens, triton.cdiv(d, BLOCK))](
            streams, y, post, comb, out, d, n, STREAMS=triton.next_power_of_2(n), BLOCK=BLOCK
        )
    return out


def hc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    """`hyper_connections.hc_head_reference`."""
    streams, (n, d) = streams.contiguous(), streams.shape[-2:]
    mix, tokens = _mixed(streams, fn, norm_eps)
    y = streams.new_empty(*streams.shape[:-2], d)
    if tokens:
        _before[(tokens,)](
            streams, mix, base.float(), scale.float(), y, y, y, d, n, mix.shape[1], 0, eps, IS_HEAD=True,
            STREAMS=triton.next_power_of_2(n), BLOCK=BLOCK,
        )  # fmt: skip
    return y
