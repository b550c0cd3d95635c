"""Rows cut into contiguous parts, one a process: what a layout must know so that the parts together are the whole.

Every process knows all token ids and document borders, so it plans for the whole row and keeps its own part: positions,
which entries a query sees and their numbers are those of the whole row. An entry belongs to the part that holds the
last token of its block. What is not known everywhere are hidden states, and those travel in two stages: the last
projections before a part come from the parts before it (`halo`), and the entries of all parts are gathered in order.
Source: V4 report, context parallelism for compressed attention. Left out: how tensors travel (`parallel/context.py`).

B batch, S tokens of a whole row, R parts, E entries a part makes at most, C entries of a whole row, K entry width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rorqual.errors import RequestError
from rorqual.model.layout import EntryPlan, Layout
from rorqual.ops.sparse_attention import Visible


@dataclass(frozen=True)
class Gathering:
    """Where the entries of all parts stand once they are gathered: row by row in order, padding at the end."""

    order: Tensor
    """Entry i of the whole row lies at place part * E + j of the parts laid end to end: int64 [B, C], -1 is padding."""
    inverse: Tensor
    """The other way: int64 [B, R * E], -1 where a part has padding."""


class Context(Protocol):
    """The processes that hold the parts of a row, part `rank` of `size` here. All take part in every call.

    Gradients travel back the same way and are added in the order of the parts.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def halo(self, x: Tensor, count: int, bounds: list[int]) -> Tensor:
        """The `count` tokens before this part, from whichever parts hold them: [B, s, ...] -> [B, count, ...].

        Part i holds tokens bounds[i] to bounds[i + 1]. Places before the first token of the row are zero.
        """

    def gather(self, entries: Tensor, gathering: Gathering) -> Tensor:
        """The entries of all parts: [B, E, K] of this part -> [B, C, K], zero where there is padding."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the parts, the same bits everywhere; constant, no gradient."""


def part_bounds(num_tokens: int, size: int) -> list[int]:
    """Where parts begin and end, [size + 1]; lengths differ by one at most. Raises RequestError with too few tokens."""
    if num_tokens < size:
        raise RequestError(
            f"A row has {num_tokens} tokens, which cannot be cut into {size} parts: some would be empty. "
            "Use longer rows (schedule.seq_lens) or fewer context ranks (parallel.cp)."
        )
    return [i * num_tokens // size for i in range(size + 1)]


class LayoutPart(Layout):
    """The layout of one part of the rows that `whole` describes. Raises RequestError when the rows are too short."""

    is_part = True

    def __init__(self, whole: Layout, context: Context) -> None:
        self.whole, self.context = whole, context
        self.bounds = part_bounds(whole.num_tokens, context.size)
        self.begin, self.end = self.bounds[context.rank], self.bounds[context.rank + 1]
        self.batch_size, self.num_tokens, self.device = whole.batch_size, self.end - self.begin, whole.device
        self.start, self.same_start, self.packed = whole.start, False, whole.packed
        self.lengths = [min(max(n - self.begin, 0), self.num_tokens) for n in whole.lengths]
        self.ragged = any(n != self.num_tokens for n in self.lengths)
        self.positions = whole.positions[:, self.begin : self.end]
        self._plans: dict[int, EntryPlan] = {}
        self._gatherings: dict[int, Gathering] = {}
        self._valid: Tensor | None = None

    @property
    def row_lengths(self) -> list[int]:
        return self.whole.lengths

    def own(self, x: Tensor) -> Tensor:
        return x[:, self.begin : self.end]

    def halo(self, x: Tensor, count: int) -> Tensor:
        return self.context.halo(x, count, self.bounds)

    def gather(self, entries: Tensor | None, ratio: int) -> Tensor | None:
        return None if entries is None else self.context.gather(entries, self._gatherings[ratio])

    def total(self, x: Tensor) -> Tensor:
        return self.context.total(x)

    def entries(self, ratio: int) -> EntryPlan:
        if ratio not in self._plans:
            self._plans[ratio] = self._part_plan(self.whole.entries(ratio))
        return self._plans[ratio]

    def _part_plan(self, whole: EntryPlan) -> EntryPlan:
        begin, end, rank = self.begin, self.end, self.context.rank
        visible = Visible(
            end=whole.visible.end[:, begin:end],
            start=None if whole.visible.start is None else whole.visible.start[:, begin:end],
        )
        if whole.count == 0:
            zeros = [0] * self.batch_size
            return EntryPlan(whole.ratio, 0, 0, zeros, zeros, whole.first, whole.ends, whole.has_previous, visible)
        shape = (self.batch_size, whole.count)
        ends = whole.ends.expand(shape).contiguous()
        edges = torch.tensor(self.bounds, device=self.device).expand(self.batch_size, -1).contiguous()
        counts = torch.tensor(whole.counts, device=self.device).unsqueeze(-1)
        before = torch.searchsorted(ends, edges).minimum(counts)  # entries that end before each border, [B, R + 1]
        made = before.diff(dim=-1)  # by each part, [B, R]
        count = int(made.max())  # every part pads to this, so that all send the same shape
        index = (before[:, rank, None] + torch.arange(count, device=self.device)).clamp(max=whole.count - 1)
        self._gatherings[whole.ratio] = self._gathering(before, made, count, whole.count)
        return EntryPlan(
            whole.ratio, count, whole.total, before[:, rank].tolist(), made[:, rank].tolist(),
            first=whole.first.expand(shape).gather(-1, index),
            ends=(ends.gather(-1, index) - begin).clamp(0, self.num_tokens - 1),
            has_previous=whole.has_previous.expand(shape).gather(-1, index),
            visible=visible,
        )  # fmt: skip

    def _gathering(self, before: Tensor, made: Tensor, count: int, total: int) -> Gathering:
        """From the entries before each border [B, R + 1] and those each part makes [B, R]."""
        entry = torch.arange(total, device=self.device).expand(self.batch_size, -1).contiguous()
        part = torch.searchsorted(before[:, 1:].contiguous(), entry, right=True)
        place = part * count + entry - before.gather(-1, part)
        order = torch.where(entry < before[:, -1:], place, -1)
        slot = torch.arange(count, device=self.device)
        inverse = torch.where(slot < made.unsqueeze(-1), before[:, :-1, None] + slot, -1)
        return Gathering(order, inverse.flatten(1))
