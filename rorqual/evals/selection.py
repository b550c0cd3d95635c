"""Whether the queries that write a needle's value could see it: block hits of the indexers' choices, from a second run.

The answered prompt is run once more with the right answer behind it, and for each indexed layer the entries chosen by
the queries that write the value are compared with `cover`, the entries that pool the value's tokens in the text. Beside
the hits stand those of as many entries taken by chance and of the most recent ones. Source: evaluation specification,
sections 1 and 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import torch

from rorqual.model import Segment, Transformer
from rorqual.model.trace import Trace

READ = 256
"""Prompt tokens of a piece."""
MOST_TOKENS = 65_536
FEWEST = 2
"""Rows with fewer than this many times k visible entries are left out: any selector hits there."""


def cover(positions: Sequence[int], ratio: int) -> frozenset[int]:
    """Entries whose pooling window holds one of these tokens: windows are two strides long, so two entries a token."""
    return frozenset(entry for x in positions for entry in (x // ratio, x // ratio + 1))


def span_of(pieces: Sequence[bytes], begin: int, end: int) -> range:
    """Tokens that hold bytes [begin, end) of the text whose tokens are `pieces`."""
    at, first, last = 0, None, 0
    for number, piece in enumerate(pieces):
        if first is None and at + len(piece) > begin:
            first = number
        if at < end:
            last = number + 1
        at += len(piece)
    return range(len(pieces) if first is None else first, last)


def needle_hits(
    model: Transformer, prompt: Sequence[int], answer: Sequence[int], needle: range, queries: range, guard: Any = None
) -> Generator[None, None, dict[str, float]]:
    """Signals of one item, in pieces for `Engine.aside`: `nbh`, `nbh_full`, `nbh_random` and `nbh_recent`, each a mean
    over layers and queries; empty where no row has a choice.

    needle: the value's tokens in the prompt. queries: its tokens in `answer`; each was written by the query before it.
    guard: of the engine's requests (None: none), which then counts as a picker too.
    """
    layers = {spec.index: spec.compress_ratio for spec in model.cfg.layers if spec.has_indexer}
    if not layers or not queries or not needle or len(prompt) + len(answer) > MOST_TOKENS:
        return {}
    state = model.new_state(1)
    if guard is not None:
        state.guard_by(guard)  # type: ignore[attr-defined,unused-ignore]  # of engines that have guards
    first = len(prompt) - 1
    for at in range(0, first, READ):
        model.step([Segment(state, list(prompt[at : min(at + READ, first)]))])
        yield
    written = [prompt[-1], *answer[: queries.stop - 1]]
    names = {index: f"layers.{index}.attn.index_" for index in layers}
    trace = Trace(capture=[name + kind for name in names.values() for kind in ("topk", "used")])
    model.forward_streams(torch.tensor([written], device=model.reference.device), state=state, trace=trace)
    rows: list[tuple[float, float, float, float]] = []
    for index, ratio in layers.items():
        found = trace.captured.get(names[index] + "used", trace.captured.get(names[index] + "topk"))
        if found is None:
            continue
        for query in queries:
            visible = (first + query + 1) // ratio
            wanted = {entry for entry in cover(needle, ratio) if entry < visible}
            if visible < FEWEST * model.cfg.index_topk or not wanted:
                continue
            picked = {int(entry) for entry in found[0, query].tolist() if entry >= 0}
            recent = range(visible - len(picked), visible)
            rows.append(
                (
                    float(bool(picked & wanted)),
                    float(wanted <= picked),
                    by_chance(visible, len(wanted), len(picked)),
                    float(any(entry in recent for entry in wanted)),
                )
            )
    if not rows:
        return {}
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return dict(zip(("nbh", "nbh_full", "nbh_random", "nbh_recent"), means, strict=True))


def by_chance(visible: int, wanted: int, picked: int) -> float:
    """Chance that `picked` of `visible` entries, drawn without order, hold one of `wanted`."""
    return 1 - math.comb(visible - wanted, picked) / math.comb(visible, picked)
