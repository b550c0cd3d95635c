"""Context parallelism: what the parts of a row send each other, over one torch.distributed group.

The tokens before a part go straight to it from whichever ranks hold them (one all-to-all with uneven shares, however
many hops that is); compressed entries are gathered from all ranks and put in order. Backward takes the same way back:
gradients of the halo are added where the tokens are, gradients of entries are scattered to their makers, both in fp32
and in rank order, so results do not depend on timing. Only all-to-all and all-gather are used: gloo has both.
Source: V4 report, context parallelism for compressed attention; the plan is made in `model/context.py`.

B batch, S tokens of this part, R ranks, E entries a part makes at most, C entries of a whole row, K entry width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.model import Transformer
from rorqual.model.context import Gathering
from rorqual.parallel.mesh import Mesh


def install(model: Transformer, mesh: Mesh) -> None:
    """Cut every row over the context ranks of `mesh`; does nothing where there is only one."""
    model.context = ContextGroup(mesh.cp_group) if mesh.cp > 1 and mesh.cp_group is not None else None


class ContextGroup:
    """Implements `rorqual.model.context.Context`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def halo(self, x: Tensor, count: int, bounds: list[int]) -> Tensor:
        """See `Context`."""
        if not count:
            return x[:, :0]
        result: Tensor = _Halo.apply(x, count, bounds, self)
        return result

    def gather(self, entries: Tensor, gathering: Gathering) -> Tensor:
        """See `Context`."""
        result: Tensor = _Gather.apply(entries, gathering, self)
        return result

    @torch.no_grad()
    def total(self, x: Tensor) -> Tensor:
        """See `Context`."""
        every = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(every), x.detach().contiguous(), group=self.group)
        return _ordered_sum(every)


def _ordered_sum(x: Tensor) -> Tensor:
    """Over the first axis, from first to last."""
    total = x[0].clone()
    for part in x[1:]:
        total += part
    return total


def halo_ranges(count: int, bounds: list[int], source: int, target: int) -> tuple[int, int]:
    """Tokens (first, past the last) of the row that part `source` holds and part `target` has in its halo."""
    low, high = max(bounds[source], bounds[target] - count), min(bounds[source + 1], bounds[target])
    return (low, high) if low < high else (0, 0)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, bounds: list[int], context: ContextGroup) -> Tensor:
        rank, begin = context.rank, bounds[context.rank]
        sends = [halo_ranges(count, bounds, rank, other) for other in range(context.size)]
        receives = [halo_ranges(count, bounds, other, rank) for other in range(context.size)]
        tokens = x.transpose(0, 1)  # token by token, as shares are counted in tokens
        sent = torch.cat([tokens[low - begin : high - begin] if high else tokens[:0] for low, high in sends])
        received = _exchange(sent, sends, receives, context)
        ctx.args = sends, receives, context, begin, x.shape, x.dtype
        out = x.new_zeros(x.shape[0], count, *x.shape[2:])
        out[:, count - received.shape[0] :] = received.transpose(0, 1)  # what is missing lies before the row
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sends, receives, context, begin, shape, dtype = ctx.args
        count = sum(high - low for low, high in receives)
        held = grads[0].float()[:, grads[0].shape[1] - count :].transpose(0, 1).contiguous()
        returned = _exchange(held, receives, sends, context)
        dx = torch.zeros(shape, dtype=torch.float32, device=returned.device)
        place = 0
        for low, high in sends:
            if high:
                dx[:, low - begin : high - begin] += returned[place : place + high - low].transpose(0, 1)
                place += high - low
        return dx.to(dtype), None, None, None


def _exchange(
    sent: Tensor, sends: list[tuple[int, int]], receives: list[tuple[int, int]], context: ContextGroup
) -> Tensor:
    """All-to-all over the first axis with shares as long as these ranges; received shares stand in rank order."""
    lengths_out, lengths_in = [high - low for low, high in sends], [high - low for low, high in receives]
    received = sent.new_empty(sum(lengths_in), *sent.shape[1:])
    dist.all_to_all_single(received, sent.contiguous(), lengths_in, lengths_out, group=context.group)
    return received


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries: Tensor, gathering: Gathering, context: ContextGroup) -> Tensor:
        b, e, k = entries.shape
        every = entries.new_empty(context.size, b, e, k)
        dist.all_gather(list(every), entries.contiguous(), group=context.group)
        ctx.args = gathering, context, entries.shape, entries.dtype
        return _pick(every.transpose(0, 1).flatten(1, 2), gathering.order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gathering, context, (b, e, k), dtype = ctx.args
        shares = _pick(grads[0].float(), gathering.inverse).view(b, context.size, e, k).transpose(0, 1).contiguous()
        received = torch.empty_like(shares)
        dist.all_to_all_single(received, shares, group=context.group)
        return _ordered_sum(received).to(dtype), None, None


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] or zero where the index is -1: [B, M, K], [B, I] -> [B, I, K]."""
    picked = x.gather(1, index.clamp_min(0).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return picked.masked_fill_((index < 0).unsqueeze(-1), 0)
