"""A flat batch: the next tokens of several sequences, one behind the other in one row.

What reads a token alone (projections, norms, residual mixes, experts, head) runs over the whole row, so that weights
are read once for all. What looks back (window, compressors, indexer, attention, Engram) runs over one segment after the
other, each with its own state and a layout as it would have alone. Source: continuous batching (Orca, 2022).

T tokens of all segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rorqual.errors import CacheError, RequestError
from rorqual.model.layout import EntryPlan, Layout
from rorqual.model.state import State
from rorqual.model.trace import Trace

if TYPE_CHECKING:
    from rorqual.model.transformer import Transformer


@dataclass(frozen=True)
class Segment:
    """A sequence's next tokens: its state (of one row) and ids int64 [n], n at least 1; a few are best in a list."""

    state: State
    tokens: Tensor | list[int]

    @property
    def ids(self) -> list[int]:
        """The tokens as a list."""
        return self.tokens.tolist() if isinstance(self.tokens, Tensor) else self.tokens


class FlatLayout(Layout):
    """The layout of a flat batch: one row that holds every segment's tokens, and each segment's own layout."""

    is_flat = True

    def __init__(self, segments: Sequence[Layout]) -> None:
        self._segments = segments
        self.sizes = [segment.num_tokens for segment in segments]
        self.batch_size, self.num_tokens, self.device = 1, sum(self.sizes), segments[0].device
        self.start, self.same_start = [0], False
        self.lengths, self.ragged, self.packed = [self.num_tokens], False, False
        self.positions = torch.cat([segment.positions for segment in segments], 1)
        self._valid: Tensor | None = None

    @property
    def segments(self) -> Sequence[Layout]:
        return self._segments

    def split(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(self.sizes, 1)

    def each(self, memory: Any) -> Sequence[tuple[Layout, Any]]:
        return [*zip(self._segments, memory, strict=True)]

    def entries(self, ratio: int) -> EntryPlan:
        raise AssertionError("entries belong to a sequence: ask the layout of a segment")


def check_segments(model: "Transformer", segments: Sequence[Segment]) -> None:
    """Raises RequestError and CacheError as `Transformer.step`."""
    if not segments:
        raise RequestError("step() got no segments, so there is nothing to compute. Give at least one.")
    seen: set[int] = set()
    for segment in segments:
        ids, state = segment.tokens, segment.state
        if isinstance(ids, Tensor) and (ids.ndim != 1 or ids.dtype != torch.int64):
            raise RequestError(
                f"A segment's tokens have shape {tuple(ids.shape)} and dtype {ids.dtype}; give int64 ids [n], n from 1."
            )
        if not len(ids):
            raise RequestError("A segment has no tokens; give int64 ids [n], n from 1.")
        if state.model is not model or state.batch_size != 1:
            raise CacheError(
                f"A segment's state has {state.batch_size} rows"
                + ("" if state.model is model else " and belongs to another model")
                + ", but it stands for one sequence. Make one with model.new_state() for each."
            )
        if id(state) in seen:
            raise CacheError(
                "Two segments share a state, and one sequence cannot take two places in a step. "
                "Join their tokens to one segment, or fork the state."
            )
        seen.add(id(state))
    for segment in segments:
        model.check_ids(segment.tokens)


def flat_step(model: "Transformer", segments: Sequence[Segment], trace: Trace | None = None) -> Tensor:
    """`Transformer.step` by the layer code, for segments that were checked. trace: what to record of the flat row."""
    device = model.reference.device
    tokens = torch.cat([torch.as_tensor(segment.tokens, device=device) for segment in segments]).unsqueeze(0)
    layout = FlatLayout([Layout(1, len(one.tokens), tokens.device, one.state.lengths) for one in segments])
    states = [segment.state for segment in segments]
    for segment, part in zip(segments, layout.segments, strict=True):
        part.shown = segment.state.shown(segment.ids)
    for state in states:
        state.begin()
    streams = model.through(tokens, layout, [*zip(*(state.layers for state in states), strict=True)], trace, None)
    for state, part, ids in zip(states, layout.segments, layout.split(tokens), strict=True):
        state.advance(ids, part)
    return streams
