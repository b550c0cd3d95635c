"""Routed experts: choose, group tokens by expert, run each expert once, add up in a fixed order.

Source: V4 report section 2.1; checkpoint behaviour. The routing weight is multiplied into the SwiGLU
output, in fp32, before the down projection.

T tokens, D hidden, E experts, A active experts per token, I expert width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import registry, triton
from rorqual.ops.native import fused, inference, infers, usable_typed
from rorqual.ops.swiglu import swiglu

SCORE_FLOOR = 1e-36
"""Keeps the normalisation of scores that all underflow, and the root's gradient there, from 0/0."""

LANES = 16
"""The native kernel's rows are whole vectors of this many floats."""


def router_scores(x: Tensor, weight: Tensor) -> Tensor:
    """sqrt(softplus(x W^T)) in fp32: x [T, D], weight [E, D] -> [T, E]."""
    return F.softplus(x.float() @ weight.float().t()).clamp_min(SCORE_FLOOR).sqrt()


def select_experts(scores: Tensor, bias: Tensor, active: int) -> Tensor:
    """The `active` largest of scores + bias per token, lowest index first among equals: [T, E], [E] -> int64 [T, A].

    The bias only selects; it never weighs.
    """
    return torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :active]


def routing_weights(scores: Tensor, experts: Tensor, scale: float) -> Tensor:
    """Scores of the chosen experts, normalised to sum `scale`: [T, E], [T, A] -> fp32 [T, A]."""
    chosen = scores.gather(-1, experts)
    return chosen / chosen.sum(-1, keepdim=True) * scale


def route_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, active: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], router [E, D] -> experts int64 [T, A], weights fp32 [T, A], scores fp32 [T, E].

    The experts are `chosen`, or the top of scores plus `bias`; the weights are the scores at them in both cases.
    """
    scores = router_scores(x, weight)
    if chosen is None:
        assert bias is not None
        chosen = select_experts(scores.detach(), bias, active)
    return chosen, routing_weights(scores, chosen, scale), scores


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, active: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`route_reference`, by the fastest implementation at hand."""
    if weight.dtype is not x.dtype:
        x, weight = x.float(), weight.float()
    return registry.pick("route", x)(x, weight, bias, chosen, active, scale)


def experts_reference(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float
) -> Tensor:
    """y = sum_a expert_{experts[a]}(x, weights[a]), experts in ascending order, accumulated in fp32.

    Shapes: x [T, D], experts int64 [T, A], weights [T, A], w1 and w3 [E, I, D], w2 [E, D, I] -> fp32 [T, D].
    A repeated expert adds its weights.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(w1.shape[0]):
        gate = (weights * (experts == e)).sum(-1, keepdim=True)
        hidden = swiglu(x @ w1[e].t(), x @ w3[e].t(), limit) * gate
        y = y + (hidden.to(x.dtype) @ w2[e].t()).float()
    return y


class _GroupedExperts(torch.autograd.Function):
    """Tokens sorted by expert, one GEMM per expert and matrix; forward and backward visit only the experts in use."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        limit: float,
    ) -> Tensor:
        tokens, active = experts.shape
        order = experts.flatten().argsort(stable=True)
        token = order // active
        bounds = [0, *torch.bincount(experts.flatten(), minlength=w1.shape[0]).cumsum(0).tolist()]
        xs, gate = x[token], weights.flatten()[order].float()
        a, u = xs.new_empty(len(order), w1.shape[1]), xs.new_empty(len(order), w1.shape[1])
        out = xs.new_empty(len(order), x.shape[1])
        used = [(e, bounds[e], bounds[e + 1]) for e in range(w1.shape[0]) if bounds[e] < bounds[e + 1]]
        for e, lo, hi in used:
            torch.mm(xs[lo:hi], w1[e].t(), out=a[lo:hi])
            torch.mm(xs[lo:hi], w3[e].t(), out=u[lo:hi])
        hidden = registry.pick("swiglu", a)(a, u, gate, limit).to(x.dtype)
        for e, lo, hi in used:
            torch.mm(hidden[lo:hi], w2[e].t(), out=out[lo:hi])
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        ctx.save_for_backward(x, weights, w1, w3, w2, order, inverse, a, u)
        ctx.used, ctx.limit = used, limit
        # fixed order of the sum: ascending expert id, whatever order the router listed them in
        slots = inverse.view(tokens, active).sort(-1).values
        return out[slots.flatten()].view(tokens, active, -1).float().sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, w1, w3, w2, order, inverse, a, u = ctx.saved_tensors
        tokens, active = weights.shape
        token = order // active
        gate = weights.flatten()[order].float()
        dys, xs = grads[0].to(x.dtype)[token], x[token]
        hidden = registry.pick("swiglu", a)(a, u, gate, ctx.limit).to(x.dtype)
        dhidden = torch.empty_like(a)
        dw1, dw3, dw2 = torch.zeros_like(w1), torch.zeros_like(w3), torch.zeros_like(w2)
        for e, lo, hi in ctx.used:
            torch.mm(dys[lo:hi], w2[e], out=dhidden[lo:hi])
            torch.mm(dys[lo:hi].t(), hidden[lo:hi], out=dw2[e])
        da, du, dgate = registry.pick("swiglu_backward", a)(a, u, gate, dhidden, ctx.limit)
        da, du = da.to(x.dtype), du.to(x.dtype)
        dxs = torch.empty_like(xs)
        for e, lo, hi in ctx.used:
            torch.mm(da[lo:hi].t(), xs[lo:hi], out=dw1[e])
            torch.mm(du[lo:hi].t(), xs[lo:hi], out=dw3[e])
            torch.mm(da[lo:hi], w1[e], out=dxs[lo:hi])
            dxs[lo:hi].addmm_(du[lo:hi], w3[e])
        dx = dxs[inverse].view(tokens, active, -1).sum(1)
        dweights = dgate[inverse].view(tokens, active).to(weights.dtype)
        return dx, None, dweights, dw1, dw3, dw2, None


def grouped_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float,
    shared: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`experts_reference` in time proportional to the experts actually used. Weights are cast to x's dtype.

    With `shared` [T, D] that is added in fp32 and the sum comes in x's dtype.
    """
    if experts.numel() and infers(x):
        w1, w3, w2 = (w if w.dtype is x.dtype else w.to(x.dtype) for w in (w1, w3, w2))
        return inference.experts_apply(x, experts, weights, w1, w3, w2, limit, shared)
    if experts.numel() and registry.allows("triton") and triton.usable(x):
        w1, w3, w2 = (w if w.dtype is x.dtype else w.to(x.dtype) for w in (w1, w3, w2))
        routed = _experts_triton(x, experts, weights, w1, w3, w2, limit)
    else:
        routed = _grouped(x, experts, weights, w1, w3, w2, limit)
    return routed if shared is None else (routed + shared.float()).to(x.dtype)


def _grouped(x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float) -> Tensor:
    if not experts.numel():
        return x.float()  # no tokens
    if usable_typed(x) and w1.shape[2] % LANES == 0:
        if odd := -w1.shape[1] % LANES:  # zeros give zeros, and the kernel works in whole vectors
            w1, w3, w2 = F.pad(w1, (0, 0, 0, odd)), F.pad(w3, (0, 0, 0, odd)), F.pad(w2, (0, odd))
        return fused.Experts.apply(x, experts, weights, w1, w3, w2, limit)
    w1, w3, w2 = (w if w.dtype == x.dtype else w.to(x.dtype) for w in (w1, w3, w2))
    return _GroupedExperts.apply(x, experts, weights, w1, w3, w2, limit)


_experts_triton = triton.later("experts", "experts")
registry.register("route", "reference", route_reference)
registry.register("route", "native", inference.router, infers)
