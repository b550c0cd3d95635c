"""Manifold-constrained hyper-connections (mHC): the mix that replaces the residual addition.

Per token and sublayer, 2n + n^2 coefficients are read from the n residual streams: `pre` collapses the streams to the
sublayer's input, `post` spreads its output, `comb` mixes the streams. Sinkhorn makes `comb` (nearly) doubly stochastic.
Source: V4 report section 2.2; order of operations as in the checkpoint's inference code.

N streams, D hidden, M = 2N + N^2 coefficients.
"""

import torch
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.native import functions, usable


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Softmax over the last axis, then alternate normalisation, columns last: [..., N, N] -> [..., N, N], fp32.

    `iters` column passes and `iters - 1` row passes besides the softmax. Columns sum to 1; rows nearly.
    """
    m = logits.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def coefficients(
    mix: Tensor, base: Tensor, scale: Tensor, n: int, iters: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients from the mix: [..., M] -> pre [..., N], post [..., N], comb [..., N, N], all fp32.

    pre = sigmoid(.) + eps, post = 2 sigmoid(.), comb = sinkhorn(.); `base` [M] and `scale` [3] are the learned static
    bias and gates. `comb[j][k]` carries stream j into stream k.
    """
    base, scale = base.float(), scale.float()
    pre = torch.sigmoid(mix[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(mix[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (mix[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    return pre, post, sinkhorn(logits, iters, eps)


def mix_logits(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """The dynamic part of the coefficients: RMS-normalised flattened streams times `fn`.

    Shapes: streams [..., N, D], fn [M, N*D] -> fp32 [..., M]. The GEMM comes first, then the scale by
    rsqrt(mean(x^2) + eps): the same value, one pass less.
    """
    x = streams.flatten(-2).float()
    return (x @ fn.float().t()) * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """y = sum_j pre_j X_j in fp32, cast to the streams' dtype: [..., N, D], [..., N] -> [..., D]."""
    return (pre.unsqueeze(-1) * streams.float()).sum(-2).to(streams.dtype)


def hc_pre_reference(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The input of a sublayer and the coefficients for what follows it.

    Shapes: streams [..., N, D], fn [M, N*D], base [M], scale [3] -> y [..., D], post [..., N], comb [..., N, N].
    """
    mix = mix_logits(streams, fn, norm_eps)
    pre, post, comb = coefficients(mix, base, scale, streams.shape[-2], iters, eps)
    return collapse(streams, pre), post, comb


def hc_post_reference(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'_k = post_k y + sum_j comb[j][k] X_j in fp32, cast to the streams' dtype.

    Shapes: streams [..., N, D], y [..., D], post [..., N], comb [..., N, N] -> [..., N, D]. The sum runs over the FIRST
    index of comb: X' = comb^T X + post y^T.
    """
    mixed = comb.transpose(-1, -2) @ streams.float()
    return (mixed + post.unsqueeze(-1) * y.float().unsqueeze(-2)).to(streams.dtype)


def hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_pre_reference`, by the fastest implementation at hand."""
    return registry.pick("hc_pre", streams)(streams, fn, base, scale, iters, norm_eps, eps)


def hc_post(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """`hc_post_reference`, by the fastest implementation at hand."""
    return registry.pick("hc_post", streams)(streams, y, post, comb)


def _fits(streams: Tensor) -> bool:
    return usable(streams) and streams.shape[-2] <= 8  # MAX_STREAMS of the C code


def _native_pre(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float):  # type: ignore[no-untyped-def]
    if iters > 64:  # MAX_ITERS of the C code
        return hc_pre_reference(streams, fn, base, scale, iters, norm_eps, eps)
    return functions.hc_pre(streams, fn, base, scale, iters, norm_eps, eps)


registry.register("hc_pre", "reference", hc_pre_reference)
registry.register("hc_pre", "native", _native_pre, _fits)
registry.register("hc_post", "reference", hc_post_reference)
registry.register("hc_post", "native", functions.hc_post, _fits)
