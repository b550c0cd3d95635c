"""Figures that show trouble before the loss does: residual mixes, router logits, and how often SwiGLU is clamped.

Each is taken from a few tokens of a call (`Trace.probe`), without gradients, and only when `Trace.health` asks. A
figure is [sum, count, largest], so that those of several calls, micro-batches and processes merge exactly.
Source: V4 report (SwiGLU clamp); the mHC paper (amplification of the composed mix); PaLM and ST-MoE (watching z).

P probed tokens, N streams, E experts, A active experts, D hidden, I expert width.
"""

import math

import torch
from torch import Tensor

from rorqual.model.trace import Trace

CLAMP_SLOTS = 64
"""(token, expert) pairs of a layer whose SwiGLU inputs are computed once more to count clamped values."""


def figure(values: Tensor) -> Tensor:
    """[sum, count, largest] of `values`, fp32 on their device."""
    values = values.float().flatten()
    if not len(values):  # no text in this part of the rows
        return values.new_tensor([0.0, 0.0, -math.inf])
    return torch.stack([values.sum(), values.new_tensor(float(values.numel())), values.max()])


def keep_figure(trace: Trace, name: str, new: Tensor) -> None:
    """Add a figure to those of the trace under `name`."""
    old = trace.figures.get(name)
    trace.figures[name] = new if old is None else torch.stack([*(old[:2] + new[:2]), torch.maximum(old[2], new[2])])


@torch.no_grad()
def watch_mix(trace: Trace, name: str, post: Tensor, comb: Tensor, probe: Tensor, *, is_trunk: bool) -> None:
    """Health of one residual mix X' = B X + post y with B = comb^T: post [B, S, N], comb [B, S, N, N].

    Keeps B's mean diagonal, the largest distance of a column sum from 1 (rows sum to 1 by construction of mHC), and the
    mean of post. In the trunk it also goes into the composed mix of all sublayers so far.
    """
    mix = comb.flatten(0, 1)[probe].float().transpose(1, 2)
    n = mix.shape[-1]
    keep_figure(trace, f"mix_diagonal/{name}", figure(mix.diagonal(dim1=1, dim2=2)))
    keep_figure(trace, f"mix_column_error/{name}", figure((mix.sum(1) - 1).abs()))
    keep_figure(trace, f"mix_post/{name}", figure(post.flatten(0, 1)[probe]))
    if is_trunk:
        before = torch.eye(n, device=mix.device).expand_as(mix) if trace.composite is None else trace.composite
        trace.composite = mix @ before


@torch.no_grad()
def watch_composite(trace: Trace) -> None:
    """Amplification of the trunk's composed mix: largest row sum (signals forward) and column sum (gradients back), of
    absolute values, per token. Call it after the last layer.
    """
    if trace.composite is not None and trace.composite.numel():
        size = trace.composite.abs()
        keep_figure(trace, "gain_forward", figure(size.sum(2).amax(1)))
        keep_figure(trace, "gain_backward", figure(size.sum(1).amax(1)))


@torch.no_grad()
def watch_router(trace: Trace, name: str, scores: Tensor, probe: Tensor) -> None:
    """Logits of a router from its scores sqrt(softplus(logit)) [T, E]: the largest, and log sum exp over experts."""
    softplus = scores[probe].float().square().clamp_min(1e-30)
    logits = softplus + torch.log(-torch.expm1(-softplus))
    keep_figure(trace, f"router_logit/{name}", figure(logits.amax(-1)))
    keep_figure(trace, f"router_z/{name}", figure(logits.logsumexp(-1)))


@torch.no_grad()
def watch_clamp(
    trace: Trace, name: str, x: Tensor, experts: Tensor, w1: Tensor, w3: Tensor, limit: float, probe: Tensor
) -> None:
    """Share of SwiGLU inputs beyond `limit` in the routed experts: x [T, D], experts [T, A], w1 and w3 [E, I, D].

    The gate counts only above the limit, the linear part on both sides, as they are clamped. Expert parallel layers,
    whose weights are elsewhere, are passed over.
    """
    if limit <= 0 or not len(probe):
        return
    tokens = probe[:: max(1, -(-len(probe) // CLAMP_SLOTS))]
    slots = experts[tokens, torch.arange(len(tokens), device=x.device) % experts.shape[1]]
    hits = x.new_zeros((), dtype=torch.float32)
    for e in slots.unique().tolist():
        rows = x[tokens[slots == e]]
        gate, up = rows @ w1[e].to(x.dtype).t(), rows @ w3[e].to(x.dtype).t()
        hits += (gate > limit).sum() + (up.abs() > limit).sum()
    count = hits.new_tensor(2.0 * len(tokens) * w1.shape[1])
    keep_figure(trace, f"clamp/{name}", torch.stack([hits, count, hits / count]))
