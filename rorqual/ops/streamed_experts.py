"""Routed experts for inference that are not all in memory: brought in while a call waits for them, a few at a time.

`ops/packed_experts.py` has the arithmetic and `checkpoint/expert_cache.py` brings them in. Every row of a call is one
token at one expert and is computed by itself, so it does not matter in which order experts come, nor how many at once:
results are those of `packed_experts` on all of them, bit by bit.

T tokens, D hidden, E experts, A active experts per token, I expert width.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.matvec import works
from rorqual.ops.native.assignments import assign
from rorqual.ops.native.library import call
from rorqual.ops.packed_weight import FORMATS, PackedFormat, PackedWeight
from rorqual.ops.swiglu import swiglu

PLACES = 6
"""Addresses of an expert: codes and scales of w1, w3 and w2, in this order (`EXPERT_PLACES` of the C side)."""


class StreamedExperts(Protocol):
    """The routed experts of one layer."""

    format: PackedFormat
    shape: tuple[int, int, int]
    """E, I, D."""

    def groups(self, wanted: Sequence[int], *, in_order: bool = False) -> Iterator[Tensor]:
        """Bring in the `wanted` experts, ascending; every one comes once, in some group.

        Yields addresses int64 [E, PLACES] (zeros for experts that are not in the group), good until the next is asked
        for or the iterator is closed. in_order: groups ascend. Raises: CheckpointError when the files cannot be read.
        """
        ...

    def matrices(self, places: Tensor, expert: int) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
        """w1, w3 and w2 of an expert in a group, good as long as the group."""
        ...

    def expect(self, wanted: Sequence[int]) -> None:
        """Say that these experts will be wanted soon."""
        ...


def streamed_experts(x: Tensor, experts: Tensor, weights: Tensor, source: StreamedExperts, limit: float) -> Tensor:
    """y = sum_a expert_{experts[a]}(x, weights[a]), experts in ascending order, accumulated in fp32.

    Shapes: x [T, D] (fp32 or bf16), experts int64 [T, A], weights [T, A] -> fp32 [T, D]; limit 0: no clamp. Rounding as
    in `packed_experts`. Raises: CheckpointError when the files cannot be read.
    """
    return registry.pick("streamed_experts", x)(x, experts, weights, source, limit)


def streamed_experts_reference(
    x: Tensor, experts: Tensor, weights: Tensor, source: StreamedExperts, limit: float
) -> Tensor:
    """See `streamed_experts`: `experts_reference` with one dequantised expert after the other."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    left = experts.unique().tolist()
    for places in source.groups(list(left), in_order=True):
        while left and int(places[left[0], 0]):
            e = left.pop(0)
            w1, w3, w2 = (w.dequantise().to(x.dtype) for w in source.matrices(places, e))
            gate = (weights.float() * (experts == e)).sum(-1, keepdim=True)
            hidden = swiglu(x @ w1.t(), x @ w3.t(), limit) * gate
            y = y + (hidden.to(x.dtype) @ w2.t()).float()
    return y


def _streamed_experts_native(
    x: Tensor, experts: Tensor, weights: Tensor, source: StreamedExperts, limit: float
) -> Tensor:
    x = x.contiguous()
    num_experts, inner, d = source.shape
    to = assign(experts, weights, num_experts)
    out = x.new_empty(experts.numel(), d)
    for places in source.groups(with_rows(to.bounds)):
        call(
            "packed_experts", x, to.token, to.bounds, to.gate, *[None] * 9, FORMATS.index(source.format), len(experts),
            num_experts, d, inner, limit, places, out,
        )  # fmt: skip
    return to.combine(out)


def with_rows(bounds: Tensor) -> list[int]:
    """The experts that have rows, ascending, by bounds int64 [E + 1] of rows sorted by expert."""
    return bounds.diff().nonzero().flatten().tolist()


registry.register("streamed_experts", "reference", streamed_experts_reference)
registry.register("streamed_experts", "native", _streamed_experts_native, works)
