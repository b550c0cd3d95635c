"""Examples into rows: several in one, as full as can be, none of them seeing another.

Best fit, longest first, over a few thousand shuffled examples at a time. An example that no row can hold is never cut
silently in its answer: it is left out, or cut behind the last answer that is whole, or refused, and counted.

B rows, S tokens a row.
"""

import bisect
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from rorqual.data.packing import RowWriter
from rorqual.errors import DataError
from rorqual.posttrain.example_store import ExampleStore
from rorqual.posttrain.examples import Example
from rorqual.seeds import derive
from rorqual.train.feed import Rows

TooLong = Literal["drop", "trim", "refuse"]

WINDOW = 4096
"""Examples that are packed together."""


@dataclass
class FitReport:
    """What became of examples that were to fit into rows."""

    examples: int = 0
    """Those that are learned."""
    tokens: int = 0
    learned_tokens: int = 0
    dropped: int = 0
    """Left out, because they were too long."""
    trimmed: int = 0
    """Cut behind their last whole answer."""
    lost_answers: int = 0
    """Answers that were not learned, whole ones or begun ones, in trimmed examples."""
    split: int = 0
    """Plain texts that became several examples."""

    def to_dict(self) -> dict[str, int]:
        """As JSON."""
        return asdict(self)


def fit(examples: Iterable[Example], seq_len: int, too_long: TooLong, report: FitReport) -> Iterator[Example]:
    """Examples of at most `seq_len` ids. `too_long` says what happens to longer ones: `drop` leaves them out, `trim`
    keeps the part up to the last answer that is whole within the row, `refuse` raises. Plain texts are split.

    Raises: DataError for a long example with `refuse`.
    """
    for example in examples:
        for part in _parts(example, seq_len, too_long, report):
            report.examples += 1
            report.tokens += len(part)
            report.learned_tokens += part.num_targets
            yield part


def _parts(example: Example, seq_len: int, too_long: TooLong, report: FitReport) -> list[Example]:
    if len(example) <= seq_len:
        return [example] if example.num_targets else []
    if example.is_splittable:
        report.split += 1
        # One id is in both parts: it is the last that is predicted in one, and what the next predicts from.
        starts = range(0, len(example) - 1, seq_len - 1)
        parts = [slice(start, start + seq_len) for start in starts]
        return [replace(example, ids=example.ids[p], loss_mask=example.loss_mask[p]) for p in parts]
    if too_long == "refuse":
        raise DataError(
            f"The example from {example.source or 'somewhere'} has {len(example):,} ids, but rows hold {seq_len:,}. "
            "Raise seq_len, or set too_long to drop or trim."
        )
    mask = example.loss_mask
    stop = seq_len
    while stop and not mask[stop - 1]:  # what follows the last learned id teaches nothing
        stop -= 1
    if mask[seq_len - 1] and mask[seq_len]:  # an answer reaches over the edge: without its begin, too
        while stop and mask[stop - 1]:
            stop -= 1
        while stop and not mask[stop - 1]:
            stop -= 1
    if too_long == "drop" or stop < 2:
        report.dropped += 1
        return []
    report.trimmed += 1
    report.lost_answers += sum(now and not before for before, now in zip(mask[stop - 1 :], mask[stop:], strict=False))
    return [replace(example, ids=example.ids[:stop], loss_mask=mask[:stop])]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of `capacity` with the places of the lengths in them: longest first, each into the fullest that holds it.

    Lengths are at most `capacity`.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room that is left, and the bin; ascending
    for place in order:
        length = lengths[place]
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = free.pop(at)
        bins[number].append(place)
        bisect.insort(free, (room - length, number))
    return bins


def plan_epoch(
    lengths: Sequence[int], numbers: Sequence[int], seq_len: int, *, seed: int, epoch: int, packed: bool
) -> list[list[int]]:
    """The rows of one epoch as numbers of examples, in the order of training: a function of its arguments alone.

    `lengths` are those of all examples, `numbers` the ones to learn. Every example is in exactly one row.
    """
    order = list(numbers)
    random.Random(derive(seed, "sft-order", epoch)).shuffle(order)
    if not packed:
        return [[number] for number in order]
    rows = []
    for start in range(0, len(order), WINDOW):
        part = order[start : start + WINDOW]
        rows += [[part[place] for place in row] for row in best_fit([lengths[n] for n in part], seq_len)]
    random.Random(derive(seed, "sft-rows", epoch)).shuffle(rows)
    return rows


def build_rows(store: ExampleStore, rows: Sequence[Sequence[int]], pad_token_id: int) -> Rows:
    """Packed rows [B, S], as long as the longest needs."""
    longest = max(sum(int(store.lengths[n]) for n in row) for row in rows)
    writer = RowWriter(len(rows), max(longest, 2), pad_token_id)
    for place, row in enumerate(rows):
        for number in row:
            writer.place(place, *store.read(number))
    batch = writer.finish()
    return Rows(batch.tokens, batch.labels, batch.segment_ids, batch.lengths if batch.is_padded else None)


def micro_batches(
    store: ExampleStore, rows: Sequence[Sequence[int]], most_tokens: int, pad_token_id: int
) -> list[Rows]:
    """The rows of a step in parts of at most about `most_tokens` tokens (a row at least), in their order."""
    parts: list[list[Sequence[int]]] = []
    longest = 0
    for row in rows:
        length = int(np.sum(store.lengths[list(row)]))
        longest = max(longest, length)
        if parts and longest * (len(parts[-1]) + 1) <= most_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
            longest = length
    return [build_rows(store, part, pad_token_id) for part in parts]
