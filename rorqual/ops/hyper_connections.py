"""Manifold-constrained hyper-connections (mHC): the mix that replaces the residual addition.

Per token and sublayer, 2n + n^2 coefficients are read from the n residual streams: `pre` collapses the streams to the
sublayer's input, `post` spreads its output, `comb` mixes the streams. Sinkhorn makes `comb` (nearly) doubly stochastic.
Source: V4 report section 2.2; order of operations as in the checkpoint's inference code.

Below them, for comparison, the unconstrained hyper-connections (HC) that mHC grew out of: the same three roles, no
bounds on the coefficients. Source: "Hyper-Connections" (Zhu et al., 2024), with RMS norm as in the mHC paper.

N streams, D hidden, M = 2N + N^2 coefficients.
"""

import torch
from torch import Tensor

from rorqual.ops import registry, triton
from rorqual.ops.native import functions, usable_typed

MOST_STREAMS, MOST_ITERS = 8, 64
"""MAX_STREAMS and MAX_ITERS of the C code; beyond them the references run."""


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


def free_coefficients(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Unconstrained coefficients: static value plus a gated tanh, read from each stream by itself.

    Shapes: streams [..., N, D], fn [N + 2, D] (rows: pre, post, then the targets of comb), base [M], scale [3] -> pre
    [..., N], post [..., N], comb [..., N, N], all fp32. Stream j gives pre_j, post_j and the row comb[j]; nothing keeps
    them positive or their sums at 1.
    """
    n = streams.shape[-2]
    x = streams.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)
    dynamic = torch.tanh(x @ fn.float().t())
    base, scale = base.float(), scale.float()
    pre = dynamic[..., 0] * scale[0] + base[:n]
    post = dynamic[..., 1] * scale[1] + base[n : 2 * n]
    return pre, post, dynamic[..., 2:] * scale[2] + base[2 * n :].view(n, n)


def free_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `hc_pre_reference`, with unconstrained coefficients; `hc_post` follows it just the same."""
    pre, post, comb = free_coefficients(streams, fn, base, scale, norm_eps)
    return collapse(streams, pre), post, comb


def hc_head_reference(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    """Collapse of the streams before the final norm, without Sinkhorn: weights need not sum to 1.

    Shapes: streams [..., N, D], fn [N, N*D], base [N], scale [1] -> [..., D].
    """
    pre = torch.sigmoid(mix_logits(streams, fn, norm_eps) * scale.float() + base.float()) + eps
    return collapse(streams, pre)


def hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_pre_reference`, by the fastest implementation at hand."""
    return registry.pick("hc_pre", streams)(streams, fn, base, scale, iters, norm_eps, eps)


def hc_post(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """`hc_post_reference`, by the fastest implementation at hand."""
    return registry.pick("hc_post", streams)(streams, y, post, comb)


def hc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    """`hc_head_reference`, by the fastest implementation at hand."""
    return registry.pick("hc_head", streams)(streams, fn, base, scale, norm_eps, eps)


def _fits(streams: Tensor) -> bool:
    n, d = streams.shape[-2:]
    return usable_typed(streams) and n <= MOST_STREAMS and n * d % 2 == 0  # bf16 goes in pairs


def _native_pre(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float):  # type: ignore[no-untyped-def]
    if iters > MOST_ITERS:
        return hc_pre_reference(streams, fn, base, scale, iters, norm_eps, eps)
    return functions.hc_pre(streams, fn, base, scale, iters, norm_eps, eps)


registry.register("hc_pre", "reference", hc_pre_reference)
registry.register("hc_pre", "native", _native_pre, _fits)
registry.register("hc_post", "reference", hc_post_reference)
registry.register("hc_post", "native", functions.hc_post, _fits)
registry.register("hc_head", "reference", hc_head_reference)
registry.register("hc_head", "native", functions.hc_head, _fits)
for _name in ("hc_pre", "hc_post", "hc_head"):
    registry.register(_name, "triton", triton.later("hyper_connections", _name), triton.usable)
