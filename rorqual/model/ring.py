"""Rings: tensors [B, R, ...] that remember the last R tokens of each row, token t in slot t mod R."""

import torch
from torch import Tensor

from rorqual.model.layout import Layout


def ring_write(ring: Tensor, values: Tensor, layout: Layout) -> None:
    """Store the last valid tokens of this call at their position modulo the ring's size; gradients end here."""
    size, values = ring.shape[1], values.detach()

    def slots(start: int, count: int) -> tuple[Tensor, int]:
        keep = min(count, size)
        return torch.arange(start + count - keep, start + count, device=ring.device) % size, count - keep

    if layout.same_start and layout.num_tokens == 1 and not layout.ragged:
        ring[:, layout.start[0] % size] = values[:, 0]
        return
    if layout.same_start and not layout.ragged:
        index, skip = slots(layout.start[0], layout.num_tokens)
        ring.index_copy_(1, index, values[:, skip:].to(ring.dtype))
        return
    for row, (start, count) in enumerate(zip(layout.start, layout.lengths, strict=True)):
        index, skip = slots(start, count)
        ring[row].index_copy_(0, index, values[row, skip:count].to(ring.dtype))


def ring_read(ring: Tensor, layout: Layout, count: int) -> Tensor:
    """The `count` tokens before this call, oldest first: [B, count, ...]; places before position 0 hold anything."""
    size = ring.shape[1]
    back = torch.arange(-count, 0, device=ring.device)
    if layout.same_start:
        return ring.index_select(1, (back + layout.start[0]) % size)
    start = torch.tensor(layout.start, device=ring.device).unsqueeze(-1)
    rows = torch.arange(layout.batch_size, device=ring.device).unsqueeze(-1)
    return ring[rows, (back + start) % size]
