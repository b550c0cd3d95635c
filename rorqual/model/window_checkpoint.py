"""Window checkpoints: everything of a sequence at one position that its pages do not hold.

That is the last keys of every layer's window, the projections of open blocks and of the block before them, the entries
of the page that is not full, and for Engram blocks what they look back at. At a multiple of a page's tokens no block is
open, so only the windows and the overlap rows of CSA layers are left. Rows are stored oldest first and only those that
are needed, so that a checkpoint's size follows from the configuration and the position. Source: V4 report sections 3.5
(state cache) and its account of on-disk storage.

Also which tokens to run again when there is no checkpoint: entries are stored for all layers, so a stream that is exact
at a layer's input for tokens from s on is exact at its output from s + window - 1 on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from rorqual.config import LayerSpec, ModelConfig
from rorqual.errors import CacheError
from rorqual.model.cache_format import row_of
from rorqual.model.page_table import Paged, PageTable
from rorqual.model.state import LayerState, State


@dataclass(frozen=True)
class Rows:
    """The rows of one ring or open page that a checkpoint holds: tokens (or entries) [first, first + count)."""

    layer: int
    name: str
    first: int
    count: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return self.count * self.width * self.dtype.itemsize


def checkpoint_rows(cfg: ModelConfig, dtype: torch.dtype, position: int, page_tokens: int) -> list[Rows]:
    """What a checkpoint after `position` tokens holds, in the order of its bytes: wide numbers first, for alignment."""
    out: list[Rows] = []

    def last(layer: int, name: str, count: int, width: int, kind: torch.dtype) -> None:
        count = min(count, position)
        if count:
            out.append(Rows(layer, name, position - count, count, width, kind))

    for spec in cfg.layers:
        last(spec.index, "window", cfg.sliding_window - 1, cfg.head_dim, dtype)
        if spec.compress_ratio:
            parts = [("entries", "pending", cfg.head_dim)]
            if spec.has_indexer:
                parts.append(("index_keys", "index_pending", cfg.index_head_dim))
            for entries, pending, width in parts:
                first = position // page_tokens * page_tokens // spec.compress_ratio
                count = position // spec.compress_ratio - first
                if count:
                    out.append(Rows(spec.index, entries, first, count, *row_of(cfg, entries, dtype)))
                for name in ("kv", "score"):
                    channels = width * (2 if spec.overlap else 1)
                    last(spec.index, f"{pending}.{name}", _pending(spec, position), channels, torch.float32)
        if spec.engram and cfg.engram is not None:
            last(spec.index, "engram.ids", max(1, cfg.engram.max_order - 1), 1, torch.int64)
            if cfg.engram.reach:
                last(spec.index, "engram.value", cfg.engram.reach, cfg.hidden_size, dtype)
                last(spec.index, "engram.gate", cfg.engram.reach, cfg.hc_mult, torch.float32)
    return sorted(out, key=lambda rows: -rows.dtype.itemsize)


def _pending(spec: LayerSpec, position: int) -> int:
    """Tokens of the open block, and for CSA of the block before it."""
    return position % spec.compress_ratio + (spec.compress_ratio if spec.overlap else 0)


def checkpoint_bytes(cfg: ModelConfig, dtype: torch.dtype, position: int, page_tokens: int) -> int:
    """Bytes of a checkpoint after `position` tokens."""
    return sum(rows.nbytes for rows in checkpoint_rows(cfg, dtype, position, page_tokens))


def capture(state: State, position: int | None = None) -> Tensor:
    """The checkpoint of a paged state at `position` (its length, unless given), uint8 [bytes].

    Raises CacheError when the rings no longer reach back so far, or the state is not exact there yet.
    """
    length = state.lengths[0]
    position = length if position is None else position
    assert state.table is not None, "checkpoints are taken of paged states"
    if not max(state.floor[0], 1) <= position <= length or state.interrupted:
        raise CacheError(
            f"A checkpoint at {position} of a state of {length} tokens cannot be taken: its rings reach back to "
            f"{state.floor[0]}" + (", and its last call stopped half-way." if state.interrupted else ".")
            + " Take it as soon as that many tokens are in."
        )  # fmt: skip
    rows = checkpoint_rows(state.model.cfg, state.layers[0].window.dtype, position, state.table.pool.page_tokens)
    out = torch.empty(sum(r.nbytes for r in rows), dtype=torch.uint8)
    for r, view in _views(out, rows):
        view.copy_(_read(state.layers[r.layer], r).reshape(view.shape))
    return out


def install(state: State, tokens: Tensor, position: int, content: Tensor, table: PageTable, frozen: int) -> None:
    """Put an empty paged state where `capture` was: pages in `table`, complete up to `frozen` tokens.

    tokens: the sequence's ids, int [position or more]. With `frozen` beyond `position`, the tokens between are run
    again for their windows, and their entries stay. Raises CacheError when the content has not the size it must have.
    """
    cfg, dtype, size = state.model.cfg, state.layers[0].window.dtype, table.pool.page_tokens
    rows = checkpoint_rows(cfg, dtype, position, size)
    if content.numel() != sum(r.nbytes for r in rows):
        raise CacheError(
            f"A checkpoint at {position} has {content.numel()} bytes, but this model's have "
            f"{sum(r.nbytes for r in rows)}. It belongs to another model; drop it and prefill the prompt again."
        )
    if frozen < position:
        table.ensure(frozen, position)
    _place(state, tokens, position, table, frozen)
    state.floor[0] = position
    for r, view in _views(content, rows):
        _write(state.layers[r.layer], r, view, frozen)


def install_without(state: State, tokens: Tensor, position: int, table: PageTable) -> None:
    """Put an empty paged state where feeding it the tokens up to `position` restores its windows without a checkpoint.

    `table` holds complete entries of `position` tokens, a multiple of its page. The state's length says from where to
    feed; streams and logits of those tokens mean nothing.
    """
    start = replay_starts(state.model.cfg, position)[0]
    _place(state, tokens, start, table, position)
    state.floor[0] = position if start else 0


def _place(state: State, tokens: Tensor, length: int, table: PageTable, frozen: int) -> None:
    state.hold(tokens[:length])
    state.attach(table, frozen)


def replay_starts(cfg: ModelConfig, position: int) -> list[int]:
    """Per layer, the first token whose stream at its input must be exact so that the state at `position` is.

    `position` is a multiple of every ratio. The first number is where to start without any checkpoint.
    """
    starts: list[int] = []
    before = cfg.sliding_window - 1
    for spec in reversed(cfg.layers):
        kept = max(before, _pending(spec, 0) if spec.compress_ratio else 0)
        start = position - kept
        if starts:
            start = min(start, starts[-1] - before)  # the next layer's input is this one's output
        if spec.engram and cfg.engram is not None:
            start -= cfg.engram.max_order - 1 + cfg.engram.reach
        starts.append(max(0, start))
    return starts[::-1]


def _views(content: Tensor, rows: list[Rows]) -> Iterator[tuple[Rows, Tensor]]:
    """Each item's bytes as a tensor [count, width] (or [count] for ids)."""
    at = 0
    for r in rows:
        yield r, content[at : at + r.nbytes].view(r.dtype).view(r.count, r.width)
        at += r.nbytes


def _read(layer: LayerState, r: Rows) -> Tensor:
    part = attrgetter(r.name)(layer)
    if isinstance(part, Paged):
        page, row = divmod(r.first, part.rows_per_page)  # all in the page that is not full
        return part.pool[part.table[page], row : row + r.count]
    ring = part[0]
    slot, before_end = _slots(ring, r)
    head = ring[slot : slot + before_end]
    return head if before_end == r.count else torch.cat([head, ring[: r.count - before_end]])


def _write(layer: LayerState, r: Rows, values: Tensor, frozen: int) -> None:
    part = attrgetter(r.name)(layer)
    if isinstance(part, Paged):
        if frozen <= r.first * part.ratio:
            part.append(values.unsqueeze(0), r.first)
        return
    ring = part[0]
    slot, before_end = _slots(ring, r)
    values = values.reshape(r.count, *ring.shape[1:])
    ring[slot : slot + before_end] = values[:before_end]
    if before_end < r.count:
        ring[: r.count - before_end] = values[before_end:]


def _slots(ring: Tensor, r: Rows) -> tuple[int, int]:
    """The first slot of these rows in a ring [R, ...], and how many come before it starts anew."""
    slot = r.first % ring.shape[0]
    return slot, min(r.count, ring.shape[0] - slot)
