"""What a CSA layer's queries attend to under a guard, by the layer code; the fused step does what reads no scores.

B = 1 batch row, T query tokens, J index heads, K index width, C entries, k picks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rorqual.model.cache_format import unpacked_keys
from rorqual.model.guard import Shown
from rorqual.ops.index_scan import IndexKeys, scan_scores
from rorqual.ops.sparse_attention import Visible

if TYPE_CHECKING:
    from rorqual.model.indexer import Indexer

MOST_ADDED = 64
"""Entries that the kinds N and T may add each."""
STEPS_BACK, LAYERS_BACK, TWICE = 4, 3, 2
KEPT = 32
"""Places of which T remembers the picks: drafts may be taken back."""


def choose(
    indexer: Indexer, name: str, q: Tensor, weights: Tensor, keys: Tensor, visible: Visible, shown: Shown, first: int
) -> tuple[Visible, Tensor]:
    """The entries that queries at places `first` and on attend to, and the indexer's own choice int64 [1, T, k].

    q [1, T, J, K], weights [1, T, J], keys [1, C, K] or packed rows.
    """
    own = _budgeted(indexer, q, weights, keys, visible, shown.budgets.tolist())
    parts = [own, shown.entries.to(own.device)[None]]
    rules = shown.rules
    if rules.neighbours:
        parts.append(_neighbours(shown, own))
    if rules.temporal:
        wide = _budgeted(indexer, q, weights, keys, visible, (2 * shown.budgets).tolist())
        parts.append(_temporal(shown, name, own, wide, first))
    if rules.recheck:
        parts.append(_rechecked(indexer, q, weights, keys, visible, shown))
    shown.picked.append(own)
    return Visible(visible.end, visible.start, union(parts)), own


def union(parts: list[Tensor]) -> Tensor:
    """Rows [1, T, *] of entries (-1: none) together, ascending, each once: int64 [1, T, k]; -1 in the places left."""
    both = torch.cat(parts, -1)
    both = torch.where(both < 0, torch.iinfo(torch.int64).max, both).sort(-1).values
    is_twice = torch.zeros_like(both, dtype=torch.bool)
    is_twice[..., 1:] = both[..., 1:] == both[..., :-1]
    return both.masked_fill(is_twice | (both == torch.iinfo(torch.int64).max), -1)


def _budgeted(
    indexer: Indexer, q: Tensor, weights: Tensor, keys: Tensor, visible: Visible, budgets: list[int]
) -> Tensor:
    """The indexer's choice with a number of picks for each query."""
    runs, lo = [], 0
    for hi in range(1, len(budgets) + 1):
        if hi == len(budgets) or budgets[hi] != budgets[lo]:
            part = Visible(visible.end[:, lo:hi], None if visible.start is None else visible.start[:, lo:hi])
            runs.append(indexer.select(q[:, lo:hi], weights[:, lo:hi], keys, part, budgets[lo]).picks)
            lo = hi
    widest = max(run.shape[-1] for run in runs if run is not None)
    return torch.cat(
        [torch.nn.functional.pad(run, (0, widest - run.shape[-1]), value=-1) for run in runs if run is not None], 1
    )


def _rows(rows: list[list[int]], like: Tensor) -> Tensor:
    width = max(1, *map(len, rows)) if rows else 1
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=like.device)[None]


def _neighbours(shown: Shown, own: Tensor) -> Tensor:
    """What two of the three layers before picked for the same token; the latest entries if they are many."""
    before = [part[0].tolist() for part in shown.picked[-LAYERS_BACK:]]
    rows = []
    for t in range(own.shape[1]):
        seen: dict[int, int] = {}
        for layer in before:
            for entry in layer[t]:
                seen[entry] = seen.get(entry, 0) + 1
        rows.append(sorted(entry for entry, times in seen.items() if entry >= 0 and times >= TWICE)[-MOST_ADDED:])
    return _rows(rows, own)


def _temporal(shown: Shown, name: str, own: Tensor, wide: Tensor, first: int) -> Tensor:
    """What this layer picked for two of the four tokens before and ranks among its best 2k."""
    kept, rows = shown.memory.recent, []
    for place in [place for place in kept if place < first - KEPT]:
        del kept[place]
    for t, (mine, more) in enumerate(zip(own[0].tolist(), wide[0].tolist(), strict=True)):
        before = [kept.get(place, {}).get(name, set()) for place in range(first + t - STEPS_BACK, first + t)]
        rows.append(
            [entry for entry in more if entry >= 0 and sum(entry in one for one in before) >= TWICE][-MOST_ADDED:]
        )
        kept.setdefault(first + t, {})[name] = {entry for entry in mine if entry >= 0}
    return _rows(rows, own)


def _rechecked(indexer: Indexer, q: Tensor, weights: Tensor, keys: Tensor, visible: Visible, shown: Shown) -> Tensor:
    """All visible entries where the choice hangs on a small margin or a tie."""
    length = keys.shape[1]
    if q.is_cpu:
        scores = scan_scores(q[0], weights[0].float(), IndexKeys(keys[0], indexer.width), length)
    else:
        from rorqual.ops.index_topk import index_scores

        scores = index_scores(q, weights, unpacked_keys(indexer.cfg, keys, q.dtype))[0]
    rows: list[list[int]] = []
    for t, end in enumerate(visible.end.expand(1, -1)[0].tolist()):
        k, mine = int(shown.budgets[t]), scores[t, :end]
        if end <= k:
            rows.append([])
            continue
        best = mine.topk(k + 1).values
        is_close = float(best[k - 1] - best[k]) <= shown.rules.recheck * float(mine.std())
        shown.memory.rechecked += is_close
        rows.append([*range(end)] if is_close else [])
    return _rows(rows, q)
