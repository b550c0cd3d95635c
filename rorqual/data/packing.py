"""Packing: documents of many lengths into rows of one length, with little padding and no token lost.

Source: V4 report, section 4.1 (documents are packed to minimise truncation, attention is masked per
document). Rows of one batch are filled together: a document that must stay whole goes into the first row
with room for it, or waits for the next batch; documents that may be cut fill whatever gaps remain and go
on in another row as a new segment.

Letters: B rows, S tokens a row.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rorqual.data.document import Document, Ids, Mask
from rorqual.data.sources import ShardSource, Source
from rorqual.errors import DataError

IGNORE = -100
# After this many documents that fit no row only cuttable ones are drawn, so few wait for the next batch.
_PATIENCE = 8
# And after this many draws in search of a cuttable one the batch is closed with padding.
_MAX_FILL_DRAWS = 64


@dataclass(frozen=True)
class Batch:
    """Packed rows.

    `tokens` int64 [B,S]; `labels` int64 [B,S], the next token of the same segment where it is a target,
    else -100; `segment_ids` int32 [B,S], counting documents from 0 within a row. `lengths`: tokens of each
    row before its padding. Every padding token is a segment of its own, so it completes no compressed entry
    and sees none.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    segment_ids: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def is_padded(self) -> bool:
        """Whether any row ends in padding."""
        return any(length < self.tokens.shape[1] for length in self.lengths)

    @property
    def num_targets(self) -> int:
        """Positions that carry a loss."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.labels.to(device), self.segment_ids.to(device), self.lengths)


class RowWriter:
    """A batch under construction: documents are placed one behind the other in rows."""

    def __init__(self, batch_size: int, seq_len: int, pad_token_id: int) -> None:
        self.tokens = np.full((batch_size, seq_len), pad_token_id, dtype=np.int64)
        self.labels = np.full((batch_size, seq_len), IGNORE, dtype=np.int64)
        self.segments = np.zeros((batch_size, seq_len), dtype=np.int32)
        self.free = [seq_len] * batch_size
        self.counts = [0] * batch_size
        self._seq_len = seq_len

    def place(self, row: int, ids: Ids, mask: Mask) -> None:
        """Put a document, or a part of one, behind those in `row`; it must fit."""
        start = self._seq_len - self.free[row]
        stop = start + len(ids)
        self.tokens[row, start:stop] = ids
        self.labels[row, start : stop - 1] = np.where(mask[1:], ids[1:], IGNORE)
        self.segments[row, start:stop] = self.counts[row]
        self.counts[row] += 1
        self.free[row] -= len(ids)

    def finish(self) -> Batch:
        """The rows, padded."""
        for row, free in enumerate(self.free):
            if free:
                self.segments[row, self._seq_len - free :] = self.counts[row] + np.arange(free)
        tokens, labels, segments = map(torch.from_numpy, (self.tokens, self.labels, self.segments))
        return Batch(tokens, labels, segments, tuple(self._seq_len - free for free in self.free))


@dataclass
class _Waiting:
    """A document not yet placed: which one it is, and how much of it has been placed."""

    source: int
    index: int
    part: int
    offset: int
    document: Document


class Packer:
    """Draws documents from a weighted mixture and packs them. All it remembers is in `state_dict`.

    Weights are shares of tokens: the next document comes from the source furthest behind its share.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int, pad_token_id: int) -> None:
        self.sources = list(sources)
        self.seed = seed
        self.pad_token_id = pad_token_id
        self._cursors = [0] * len(self.sources)
        self._queue: deque[_Waiting] = deque()
        self.set_weights(weights)

    def set_weights(self, weights: Sequence[float]) -> None:
        """Change the shares; what was served before no longer counts."""
        total = sum(weights)
        self.weights = [w / total for w in weights]
        self._served = [0] * len(self.sources)

    # -------------------------------------------------------------- drawing

    def _draw(self, splittable_only: bool) -> bool:
        """Queue the next documents of the source furthest behind; False when no source qualifies."""
        total = sum(self._served)
        chosen, behind = -1, float("-inf")
        for i, (source, weight, served) in enumerate(zip(self.sources, self.weights, self._served, strict=True)):
            deficit = weight * total - served
            if weight > 0 and deficit > behind and (source.has_splittable or not splittable_only):
                chosen, behind = i, deficit
        if chosen < 0:
            return False
        index = self._cursors[chosen]
        for part, document in enumerate(self.sources[chosen].documents(self.seed, index)):
            self._queue.append(_Waiting(chosen, index, part, 0, document))
            self._served[chosen] += len(document)
        self._cursors[chosen] += 1
        return True

    def next_batch(self, batch_size: int, seq_len: int) -> Batch:
        """The next packed batch [batch_size, seq_len]."""
        rows = RowWriter(batch_size, seq_len, self.pad_token_id)
        held: list[_Waiting] = []
        fill_draws = 0
        while any(rows.free):
            if not self._queue:
                is_filling = len(held) >= _PATIENCE
                fill_draws += is_filling
                if fill_draws > _MAX_FILL_DRAWS or not self._draw(splittable_only=is_filling):
                    break
                continue
            waiting = self._queue.popleft()
            ids = waiting.document.ids[waiting.offset :]
            mask = waiting.document.loss_mask[waiting.offset :]
            row = next((r for r, free in enumerate(rows.free) if free >= len(ids)), None)
            if row is not None:
                rows.place(row, ids, mask)
            elif waiting.document.is_splittable or len(ids) > seq_len:
                free = max(rows.free)
                rows.place(rows.free.index(free), ids[:free], mask[:free])
                waiting.offset += free
                self._queue.appendleft(waiting)
            else:
                held.append(waiting)
        self._queue.extendleft(reversed(held))
        return rows.finish()

    # --------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Cursors, tokens served, shares, and what still waits to be placed. Small, JSON-serialisable."""
        return {
            "cursors": list(self._cursors),
            "served": list(self._served),
            "weights": list(self.weights),
            "waiting": [[w.source, w.index, w.part, w.offset] for w in self._queue],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self._cursors = list(state["cursors"])
        self._served = list(state["served"])
        self.weights = list(state["weights"])
        self._queue.clear()
        made: dict[tuple[int, int], list[Document]] = {}
        for source, index, part, offset in state["waiting"]:
            if (source, index) not in made:
                made[source, index] = self.sources[source].documents(self.seed, index)
            self._queue.append(_Waiting(source, index, part, offset, made[source, index][part]))


def heldout_batches(source: ShardSource, batch_size: int, seq_len: int) -> Iterator[Batch]:
    """Every window of `source` once, in its own order, without FIM: the same batches at every evaluation.

    The last batch is padded. A window longer than a row goes on in the next as a new segment, without what
    came before: for meaningful figures build the source with `window_tokens` below `seq_len`.
    """
    position = 0
    rest: tuple[Ids, Mask] | None = None
    while position < len(source) or rest is not None:
        rows = RowWriter(batch_size, seq_len, source.tokenizer.pad_token_id)
        row = 0
        while row < batch_size:
            if rest is None:
                if position == len(source):
                    break
                document = source.window(position)
                position += 1
                rest = (document.ids, document.loss_mask)
            free = rows.free[row]
            rows.place(row, rest[0][:free], rest[1][:free])
            rest = (rest[0][free:], rest[1][free:]) if len(rest[0]) > free else None
            row += rows.free[row] == 0
        yield rows.finish()


def check_shape(batch_size: int, seq_len: int) -> None:
    """Raise DataError for a batch that cannot hold a prediction."""
    if batch_size < 1 or seq_len < 2:
        raise DataError(
            f"A batch of {batch_size} rows of {seq_len} tokens cannot be packed: a row needs a token "
            "and its successor. "
            "Fix: batch_size >= 1 and seq_len >= 2."
        )
