"""Where the tokens of one call stand: positions, documents, and the compressed entries they complete.

Built once per forward call and shared by all layers. It answers three questions for any mix of rows of different
lengths, packed documents and continued sequences: at which position is a token, which blocks of m tokens does this call
complete, and which entries may a query use. Blocks are aligned to each sequence's (or document's) own position 0.
Source: V4 report section 2.3 (visibility) and its account of packed samples.

B batch, S tokens of this call, E entries completed by this call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import RequestError
from rorqual.model.guard import Shown
from rorqual.ops.sparse_attention import Visible


@dataclass(frozen=True)
class EntryPlan:
    """Blocks of `ratio` tokens completed in this call; a row with fewer than E of them has padding at the end."""

    ratio: int
    count: int
    """E: most entries any row completes."""
    total: int
    """Most entries any row has after this call, cached ones included."""
    base: list[int]
    """Entries each row had before this call."""
    counts: list[int]
    """Entries each row completes in this call."""
    first: Tensor
    """Position of the block's first token (its rope position), int64 [B or 1, E]."""
    ends: Tensor
    """Index within this call of the block's last token, int64 [B or 1, E]."""
    has_previous: Tensor
    """Whether an earlier block of the same document exists, bool [B or 1, E]."""
    visible: Visible


class Layout:
    """The tokens of one call.

    `start` is the number of tokens each row already holds; `lengths` the valid tokens of each row in this call
    (the rest is right padding); `segment_ids` int [B, S] marks packed documents (a change of id starts a new document).
    Raises RequestError when the three do not fit together.
    """

    is_part = False
    """Whether these are parts of rows whose other parts are elsewhere (see `context.py`)."""
    shown: Shown | None = None
    """What a guard shows this call's queries besides the indexer's picks; one row, one state."""
    is_flat = False
    """Whether several sequences stand one behind the other in one row (see `segments.py`)."""

    def __init__(
        self,
        batch_size: int,
        num_tokens: int,
        device: torch.device,
        start: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        segment_ids: Tensor | None = None,
    ) -> None:
        self.batch_size, self.num_tokens, self.device = batch_size, num_tokens, device
        self.start = list(start) if start is not None else [0] * batch_size
        self.lengths = list(lengths) if lengths is not None else [num_tokens] * batch_size
        if len(self.lengths) != batch_size or not all(0 <= n <= num_tokens for n in self.lengths):
            raise RequestError(
                f"lengths is {self.lengths} for tokens of shape [{batch_size}, {num_tokens}]. Give one length per row, "
                "between 0 and the number of columns.",
                param="lengths",
            )
        self.ragged = any(n != num_tokens for n in self.lengths)
        self.same_start = all(s == self.start[0] for s in self.start)
        self.packed = segment_ids is not None
        step = torch.arange(num_tokens, device=device)
        if segment_ids is not None:
            if any(self.start):
                raise RequestError(
                    "segment_ids came with a state that already holds tokens; packed documents start at position 0. "
                    "Feed documents one by one, or start from an empty state.",
                    param="segment_ids",
                )
            if segment_ids.shape != (batch_size, num_tokens):
                raise RequestError(
                    f"segment_ids has shape {tuple(segment_ids.shape)} for tokens of shape "
                    f"({batch_size}, {num_tokens}); they must agree.",
                    param="segment_ids",
                )
            fresh = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
            fresh[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
            begin = torch.where(fresh, step, 0).cummax(-1).values
            self.positions = step - begin
        elif self.same_start:
            self.positions = (step + self.start[0]).unsqueeze(0)
        else:
            self.positions = torch.tensor(self.start, device=device).unsqueeze(-1) + step
        self._plans: dict[int, EntryPlan] = {}
        self._valid: Tensor | None = None

    @property
    def segments(self) -> "Sequence[Layout]":
        """What attention, compressors and memories work on one by one: in a flat batch each sequence, else all rows."""
        return (self,)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The tokens [B, S, ...] of each segment."""
        return (x,)

    def each(self, memory: Any) -> "Sequence[tuple[Layout, Any]]":
        """Each segment with its part of a layer's memory (`Any`: a `LayerState` or `Recall`, in a flat batch one for
        each segment; None without a state).
        """
        return ((self, memory),)

    @property
    def row_lengths(self) -> list[int]:
        """Valid tokens of each whole row; `lengths` unless the rows are cut into parts (see `context.py`)."""
        return self.lengths

    def own(self, x: Tensor) -> Tensor:
        """The tokens of whole rows [B, S, ...] that this layout describes; all, unless the rows are cut into parts."""
        return x

    def halo(self, x: Tensor, count: int) -> Tensor:
        """The `count` tokens before these in the rows: [B, S, ...] -> [B, count, ...], zero before the first."""
        return x.new_zeros(x.shape[0], count, *x.shape[2:])

    def gather(self, entries: Tensor | None, ratio: int) -> Tensor | None:
        """The entries of whole rows in order, from those that these tokens complete: [B, E, K] -> [B, C, K]."""
        return entries

    def total(self, x: Tensor) -> Tensor:
        """The sum of a statistic over whole rows, from its share here; constant, no gradient."""
        return x.detach()

    @property
    def valid(self) -> Tensor | None:
        """bool [B, S], False on right padding; None when there is none."""
        if self.ragged and self._valid is None:
            lengths = torch.tensor(self.lengths, device=self.device)
            self._valid = torch.arange(self.num_tokens, device=self.device) < lengths.unsqueeze(-1)
        return self._valid

    def entries(self, ratio: int) -> EntryPlan:
        """The plan for blocks of `ratio` tokens, made at first use."""
        if ratio not in self._plans:
            self._plans[ratio] = self._packed_plan(ratio) if self.packed else self._plain_plan(ratio)
        return self._plans[ratio]

    def _plain_plan(self, ratio: int) -> EntryPlan:
        base = [s // ratio for s in self.start]
        after = [(s + n) // ratio for s, n in zip(self.start, self.lengths, strict=True)]
        counts = [a - b for a, b in zip(after, base, strict=True)]
        count, total = max(counts), max(after)
        end = (self.positions + 1) // ratio
        visible = Visible(
            end=end.clamp(max=total) if self.ragged else end,  # padding sees no more than there is
            everything=self.num_tokens == 1 and min(after) == total,
        )
        if count == 0:
            none = self.positions[:, :0]
            return EntryPlan(ratio, 0, total, base, counts, none, none, none > 0, visible)
        index = torch.arange(count, device=self.device).unsqueeze(0)
        if self.same_start:
            block, start = index + base[0], torch.full((1, 1), self.start[0], device=self.device)
        else:
            block = index + torch.tensor(base, device=self.device).unsqueeze(-1)
            start = torch.tensor(self.start, device=self.device).unsqueeze(-1)
        ends = block * ratio + (ratio - 1) - start
        return EntryPlan(
            ratio, count, total, base, counts,
            first=block * ratio,
            ends=ends.clamp(max=max(self.num_tokens - 1, 0)),
            has_previous=block > 0,
            visible=visible,
        )  # fmt: skip

    def _packed_plan(self, ratio: int) -> EntryPlan:
        closes = (self.positions + 1) % ratio == 0
        if self.valid is not None:
            closes = closes & self.valid
        counts = closes.sum(-1)
        count = int(counts.max())
        order = torch.where(closes, torch.arange(self.num_tokens, device=self.device), self.num_tokens)
        ends = order.sort(-1).values[:, :count].clamp(max=self.num_tokens - 1)
        last = self.positions.gather(-1, ends)
        end = closes.cumsum(-1)
        return EntryPlan(
            ratio, count, count, [0] * self.batch_size, counts.tolist(),
            first=(last - (ratio - 1)).clamp_min(0),
            ends=ends,
            has_previous=last >= 2 * ratio - 1,
            visible=Visible(end=end, start=(end - (self.positions + 1) // ratio).clamp_min(0)),
        )  # fmt: skip
