"""Autograd around the C kernels that keep a whole operation's intermediates in cache.

Attention without its score tensor, experts, the index loss, and the head's cross-entropy. Shapes and
meaning stand with the references (`sparse_attention.py`, `experts.py`, `index_loss.py`, `cross_entropy.py`).
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.ops.native.assignments import Assignments, assign
from rorqual.ops.native.library import call


class Attention(torch.autograd.Function):
    """`sparse_attention.attention_reference` without its score tensor; also the log-sum-exp (no gradient)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, entries: Tensor | None, sink: Tensor, positions: Tensor, start: Tensor | None,
        end: Tensor | None, picks: Tensor | None, window: int, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, kv, sink, positions = (t.contiguous() for t in (q, kv, sink, positions))
        entries, start, end, picks = (None if t is None else t.contiguous() for t in (entries, start, end, picks))
        b, t, h, k = q.shape
        out, lse = torch.empty_like(q), q.new_empty(b, t, h, dtype=torch.float32)
        numbers = (
            b, t, h, k, window, 0 if entries is None else entries.shape[1], positions.shape[0],
            1 if end is None else end.shape[0], 0 if picks is None else picks.shape[-1], scale,
        )  # fmt: skip
        call("attention_forward", q, kv, sink.float(), positions, entries, start, end, picks, *numbers, out, lse)
        ctx.save_for_backward(q, kv, entries, sink, positions, start, end, picks, out, lse)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sink, positions, start, end, picks, out, lse = ctx.saved_tensors
        b = q.shape[0]
        parts = 1 if b >= torch.get_num_threads() else torch.get_num_threads()
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        dkv = torch.zeros(parts, *kv.shape, dtype=torch.float32)
        dentries = None if entries is None else torch.zeros(parts, *entries.shape, dtype=torch.float32)
        call(
            "attention_backward", q, kv, sink.float(), positions, entries, start, end, picks, *ctx.numbers, out, lse,
            grads[0].to(q.dtype).contiguous(), parts, dq, delta, dkv, dentries,
        )  # fmt: skip
        dsink = -((sink.float() - lse).exp() * delta).sum((0, 1)).to(sink.dtype)
        dkv = dkv[0] if parts == 1 else dkv.sum(0)
        if dentries is not None and entries is not None:
            dentries = (dentries[0] if parts == 1 else dentries.sum(0)).to(entries.dtype)
        return dq, dkv.to(kv.dtype), dentries, dsink, None, None, None, None, None, None


class Experts(torch.autograd.Function):
    """`experts.experts_reference`, forward and backward in one call each; weight gradients are fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float
    ) -> Tensor:
        x = x.contiguous()
        matrices = [w.to(x.dtype).contiguous() for w in (w1, w3, w2)]
        (num_experts, inner, d), rows = w1.shape, experts.numel()
        to = assign(experts, weights, num_experts)
        a, u, out = x.new_empty(rows, inner), x.new_empty(rows, inner), x.new_empty(rows, d)
        call("experts_forward", x, to.token, to.bounds, to.gate, *matrices, num_experts, d, inner, limit, a, u, out)
        ctx.save_for_backward(x, *to, *matrices, a, u)
        ctx.limit, ctx.dtypes = limit, (weights.dtype, w1.dtype, w3.dtype, w2.dtype)
        return to.combine(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *sorted_, w1, w3, w2, a, u = ctx.saved_tensors
        to, (num_experts, inner, d) = Assignments(*sorted_), w1.shape
        dy, dxs, dgate = grads[0].to(x.dtype).contiguous(), x.new_empty(len(to.token), d), torch.empty_like(to.gate)
        dw1, dw3, dw2 = (torch.empty(w.shape, dtype=torch.float32) for w in (w1, w3, w2))
        call(
            "experts_backward", x, to.token, to.bounds, to.gate, w1, w3, w2, a, u, dy, num_experts, d, inner, ctx.limit,
            dxs, dgate, dw1, dw3, dw2,
        )  # fmt: skip
        dweights = torch.empty_like(to.gate)
        dweights[to.choice] = dgate
        kinds = ctx.dtypes
        return (
            to.combine(dxs).to(x.dtype), None, dweights.view(to.slots.shape).to(kinds[0]), dw1.to(kinds[1]),
            dw3.to(kinds[2]), dw2.to(kinds[3]), None,
        )  # fmt: skip


class IndexLoss(torch.autograd.Function):
    """`index_loss.index_loss_reference`; the gradients come with the value, since only a factor is missing to them."""

    @staticmethod
    def forward(
        ctx: Any, index_q: Tensor, weights: Tensor, keys: Tensor, q: Tensor, lse: Tensor, entries: Tensor,
        start: Tensor | None, end: Tensor, picks: Tensor | None, valid: Tensor | None, top_k: int, scale: float,
    ) -> Tensor:  # fmt: skip
        index_q, weights, keys, q, lse, entries, end = (
            t.contiguous() for t in (index_q, weights, keys, q, lse, entries, end)
        )
        start, picks = (None if t is None else t.contiguous() for t in (start, picks))
        b, t, j, k = index_q.shape
        parts = 1 if b >= torch.get_num_threads() else torch.get_num_threads()
        sums = torch.zeros(parts * b, 4)
        dq, dweights = torch.empty_like(index_q), torch.empty_like(weights)
        dkeys = torch.zeros(parts, *keys.shape, dtype=torch.float32)
        call(
            "index_loss", index_q, weights, keys, q, lse, entries, start, end, picks,
            None if valid is None else valid.long().contiguous(), b, t, j, k, keys.shape[1], end.shape[0], top_k,
            0 if picks is None else picks.shape[-1], q.shape[2], q.shape[3], scale, parts, sums, dq, dweights, dkeys,
        )  # fmt: skip
        ctx.save_for_backward(dq, dweights, (dkeys[0] if parts == 1 else dkeys.sum(0)).to(keys.dtype))
        return sums.sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0][0]
        dq, dweights, dkeys = ctx.saved_tensors
        return (dq * factor).to(dq.dtype), dweights * factor, (dkeys * factor).to(dkeys.dtype), *[None] * 9


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cross_entropy.cross_entropy_reference`."""
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    (rows, d), vocabulary, parts = hidden.shape, weight.shape[0], torch.get_num_threads()
    log_norm, loss, dhidden = torch.empty(rows), torch.empty(rows), torch.empty(rows, d)
    dweight = torch.zeros(parts, vocabulary, d)
    call(
        "cross_entropy", hidden, weight, labels, rows, d, vocabulary, z_weight, parts, log_norm, loss, dhidden, dweight
    )
    return loss, log_norm, dhidden, dweight[0] if parts == 1 else dweight.sum(0)
