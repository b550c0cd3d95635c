"""Products with packed weights that pass gradients on to their inputs, for training something beside frozen weights.

Source: adapters on quantised models (QLoRA). The forward pass is that of inference (`matvec.py`, `packed_experts.py`),
bit for bit; the backward pass unpacks one matrix at a time. The weights themselves get no gradient: what they were
rounded from is gone. FP4 and FP8 values are exact in bf16.

T tokens, D hidden, E experts, A active experts per token, I expert width, R adapter rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.matvec import packed_linear
from rorqual.ops.packed_experts import packed_experts
from rorqual.ops.packed_weight import PackedWeight
from rorqual.ops.swiglu import swiglu


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a backward pass may come through these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, groups: int) -> Tensor:
        ctx.weight, ctx.groups = weight, groups
        return packed_linear(x, weight, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dy = grads[0]
        numbers = ctx.weight.dequantise().to(dy.dtype)
        if ctx.groups == 1:
            return dy @ numbers, None, None
        return torch.einsum("...go,goi->...gi", dy, numbers.unflatten(0, (ctx.groups, -1))), None, None


def frozen_linear(x: Tensor, weight: PackedWeight, groups: int = 1) -> Tensor:
    """`packed_linear` with the gradient of x: [..., I] -> [..., O], with groups [..., G, I] -> [..., G, O / G]."""
    return _FrozenLinear.apply(x, weight, groups) if wants_gradient(x) else packed_linear(x, weight, groups)


class _FrozenExperts(torch.autograd.Function):
    """Keeps the inputs alone; what lies between is computed anew, expert by expert, in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight,
        limit: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, experts, weights)
        ctx.packed, ctx.limit = (w1, w3, w2), limit
        return packed_experts(x, experts, weights, w1, w3, w2, limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, experts, weights = ctx.saved_tensors
        dy, active = grads[0].to(x.dtype), experts.shape[1]
        dx, dweights = torch.zeros(x.shape, dtype=torch.float32, device=x.device), torch.zeros_like(weights).flatten()
        for e, slots in _slots(experts):
            w1, w3, w2 = (w[e].dequantise().to(x.dtype) for w in ctx.packed)
            token = slots // active
            xs, gate = x[token], weights.flatten()[slots].float()
            a, u = xs @ w1.T, xs @ w3.T
            da, du, dgate = registry.pick("swiglu_backward", a)(a, u, gate, dy[token] @ w2, ctx.limit)
            dx.index_add_(0, token, (da.to(x.dtype) @ w1 + du.to(x.dtype) @ w3).float())
            dweights[slots] = dgate.to(weights.dtype)
        return dx.to(x.dtype), None, dweights.view_as(weights), None, None, None, None


def _slots(experts: Tensor) -> list[tuple[int, Tensor]]:
    """The experts in use, ascending, each with its places in the flattened [T, A]."""
    flat = experts.flatten()
    counts = torch.bincount(flat).tolist()
    groups = flat.argsort(stable=True).split(counts)
    return [(e, group) for e, group in enumerate(groups) if len(group)]


def frozen_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, limit: float
) -> Tensor:
    """`packed_experts` with the gradients of x [T, D] and of the routing weights [T, A]: -> fp32 [T, D]."""
    if wants_gradient(x, weights):
        return _FrozenExperts.apply(x, experts, weights, w1, w3, w2, limit)
    return packed_experts(x, experts, weights, w1, w3, w2, limit)


@dataclass(frozen=True)
class LowRank:
    """A low-rank change of a stack of matrices [E, out, in]: scaling x b a."""

    a: Tensor
    """[E, R, in]."""
    b: Tensor
    """[E, out, R]."""
    scaling: float

    def delta(self) -> Tensor:
        """[E, out, in]."""
        return torch.bmm(self.b, self.a) * self.scaling

    def product(self, x: Tensor, expert: int) -> Tensor:
        """What it adds to one expert's product: [n, in] -> [n, out]."""
        a, b = self.a[expert].to(x.dtype), self.b[expert].to(x.dtype)
        return (x @ a.T) @ b.T * self.scaling


def adapted_packed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, limit: float,
    low_rank: Mapping[str, LowRank],
) -> Tensor:  # fmt: skip
    """`frozen_experts` with low-rank changes of some of `w1`, `w3` and `w2`, which get gradients: -> fp32 [T, D].

    Expert by expert, so it is slower; the order in which a token's experts are added up is the same.
    """
    packed = {"w1": w1, "w3": w3, "w2": w2}

    def product(rows: Tensor, name: str, e: int) -> Tensor:
        base = frozen_linear(rows, packed[name][e])
        return base + low_rank[name].product(rows, e) if name in low_rank else base

    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e, slots in _slots(experts):
        token = slots // experts.shape[1]
        xs, gate = x[token], weights.flatten()[slots].float().unsqueeze(-1)
        hidden = (swiglu(product(xs, "w1", e), product(xs, "w3", e), limit) * gate).to(x.dtype)
        y = y.index_add(0, token, product(hidden, "w2", e).float())
    return y
