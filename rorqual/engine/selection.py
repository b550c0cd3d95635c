"""How good an indexer's choice was: measured against dense attention over the same entries, layer by layer.

`look_at` runs some tokens of a text through the real layer code and measures the choice of any of their queries;
`SelectionTap` counts or stores what it finds. Source: evaluation specification, sections 3.4, 5.1 and 5.2. Departure:
`amr_all` is one minus the mass that is lost, with window and sink in the softmax.

T query tokens, H heads, K head width, C visible entries, S chosen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rorqual.errors import ConfigError
from rorqual.model import State, Trace, Transformer
from rorqual.model.block import Block
from rorqual.ops.index_topk import index_scores

Level = Literal[0, 1, 2, 3]
KEPT_MASSES = 4
"""Of a stored row, so many times k of the largest masses."""
_HASH = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)


class Masses(NamedTuple):
    """Attention over all visible entries: mass of each, fp32."""

    heads_HC: Tensor
    """Of each head, over the entries alone."""
    all_HC: Tensor
    """With window and sink in the softmax."""

    @property
    def mean_C(self) -> Tensor:
        """Mean over heads."""
        return self.heads_HC.mean(0)


@dataclass(frozen=True)
class Choice:
    """The figures of one query in one layer; those of a needle are None without one."""

    layer: int
    q_pos: int
    n_visible: int
    k: int
    selected: tuple[int, ...]
    forced: int
    kth_score: float
    ties: int
    """Entries with exactly the k-th score, itself included."""
    plateau: float
    """Share of visible entries with exactly the commonest score."""
    amr: float
    amr_eff: float
    amr_head_min: float
    amr_all: float
    kl: float
    hash: int
    """Of the selection, whatever its order: 64 bits."""
    nbh: bool | None = None
    nbh_full: bool | None = None
    rank: float | None = None
    """Best rank of a needle's entry over all visible entries."""
    margin: float | None = None
    """Best score of a needle's entry above the k-th, in standard deviations of the scores."""
    needle_entries: tuple[int, int] | None = None

    @property
    def has_choice(self) -> bool:
        """Whether averages may count it: below 2k entries any choice looks good."""
        return self.n_visible >= 2 * self.k

    def to_row(self, **more: Any) -> dict[str, Any]:
        """The stored row: selected entries as differences."""
        row = asdict(self)
        picks = self.selected
        row["selected"] = [b - a for a, b in zip((0, *picks[:-1]), picks, strict=True)]
        return {**row, **more}


def masses(q_HK: Tensor, entries_CK: Tensor, window_WK: Tensor, sink_H: Tensor, scale: float) -> Masses:
    """Dense attention of one query over all visible entries, in fp32."""
    q = q_HK.float() * scale
    logits, near = q @ entries_CK.float().T, q @ window_WK.float().T
    everything = torch.cat([logits, near, sink_H.float()[:, None]], 1).softmax(1)
    return Masses(logits.softmax(1), everything[:, : logits.shape[1]])


def measured(
    layer: int, q_pos: int, k: int, used_S: Tensor, own_S: Tensor, scores_C: Tensor, dense: Masses,
    needle: tuple[int, int] | None = None,
) -> Choice:  # fmt: skip
    """The figures of a choice `used_S` (with what was forced), of which the indexer's own are `own_S`."""
    seen = scores_C.shape[0]
    mean_C = dense.mean_C
    best = mean_C.topk(min(len(used_S), seen)).values.sum()
    caught, heads = mean_C[used_S].sum(), dense.heads_HC[:, used_S].sum(1)
    lost = (dense.all_HC.sum(1) - dense.all_HC[:, used_S].sum(1)).mean()
    kth = scores_C.topk(min(k, seen)).values[-1]
    _, counts = scores_C.unique(return_counts=True)
    kl = (mean_C * (mean_C.clamp_min(1e-30).log() - scores_C.log_softmax(0))).sum()
    found: dict[str, Any] = {}
    if needle is not None and needle[0] < min(needle[1], seen):
        first, last = needle[0], min(needle[1], seen)
        held = int(((used_S >= first) & (used_S < last)).sum())
        top = scores_C[first:last].max()
        spread = scores_C.std() if seen > 1 else torch.tensor(0.0)
        found = {
            "nbh": held > 0, "nbh_full": held == last - first, "rank": (int((scores_C > top).sum()) + 1) / seen,
            "margin": float((top - kth) / spread.clamp_min(1e-30)), "needle_entries": (first, last),
        }  # fmt: skip
    picks = tuple(used_S.tolist())
    return Choice(
        layer, q_pos, seen, k, picks, len(picks) - len(own_S), float(kth), int((scores_C == kth).sum()),
        float(counts.max()) / seen, float(caught), float(caught / best.clamp_min(1e-30)), float(heads.min()),
        1.0 - float(lost), float(kl), selection_hash(picks), **found,
    )  # fmt: skip


def selection_hash(picks: Sequence[int]) -> int:
    """64 bits that do not depend on the order."""
    total = 0
    for pick in picks:
        x = ((pick + 1) * _HASH[0]) & (2**64 - 1)
        total += (x ^ (x >> 31)) * _HASH[1]
    return total & (2**64 - 1)


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """Overlap of two selections; 1 for two empty ones."""
    mine, theirs = set(a), set(b)
    return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0


def captures(model: Transformer) -> list[str]:
    """What a `Trace` has to keep for `choices_of`."""
    parts = ("index_topk", "index_used", "index_q", "index_weights", "index_entries", "q", "keys", "entries")
    return [f"layers.{spec.index}.attn.{part}" for spec in model.cfg.layers if spec.has_indexer for part in parts]


def choices_of(
    model: Transformer, trace: Trace, first: int, rows: Sequence[int], needle: tuple[int, int] | None = None
) -> list[Choice]:
    """The choices of the queries `rows` of a call whose first token stood at `first`; needle: tokens [begin, end)."""
    out = []
    for spec in model.cfg.layers:
        block = model.layers[spec.index]
        if not spec.has_indexer or not isinstance(block, Block):
            continue
        kept = {
            part: trace.captured[f"layers.{spec.index}.attn.{part}"][0]
            for part in (
                "index_topk",
                "index_used",
                "q",
                "keys",
                "entries",
                "index_q",
                "index_weights",
                "index_entries",
            )
            if f"layers.{spec.index}.attn.{part}" in trace.captured
        }
        if "index_entries" not in kept:
            continue
        window = model.cfg.sliding_window
        for row in rows:
            place = first + row
            seen = (place + 1) // spec.compress_ratio
            if not seen:
                continue
            scores = index_scores(kept["index_q"][None, row : row + 1], kept["index_weights"][None, row : row + 1],
                                  kept["index_entries"][None, :seen])[0, 0].float()  # fmt: skip
            near = kept["keys"][row + window - min(place + 1, window) : row + window]
            dense = masses(kept["q"][row], kept["entries"][:seen], near, block.attn.attn_sink, block.attn.scale)
            own, used = (kept[part][row] for part in ("index_topk", "index_used"))
            own, used = own[own >= 0], used[used >= 0]
            cover = None if needle is None else model.cover(spec.index, *needle, place + 1)
            out.append(measured(spec.index, place, model.cfg.index_topk, used, own, scores, dense, cover))
    return out


@torch.inference_mode()
def look_at(
    model: Transformer, state: State, ids: Sequence[int], rows: Sequence[int] | None = None,
    needle: tuple[int, int] | None = None, tap: SelectionTap | None = None,
) -> list[Choice]:  # fmt: skip
    """Read `ids` into a state of one row by the layer code, and measure the choices of some of them (all: None).

    needle: tokens [begin, end) of the text. The state's guard counts. The numbers are those of the fused step.
    """
    first, trace = state.lengths[0], Trace(capture=captures(model))
    model.forward_streams(torch.tensor([list(ids)], device=model.reference.device), state=state, trace=trace)
    found = choices_of(model, trace, first, range(len(ids)) if rows is None else rows, needle)
    if tap is not None:
        for one in found:
            tap.on_select(one)
    return found


@dataclass
class Counters:
    """Of one layer."""

    queries: int = 0
    tied: int = 0
    """Queries whose k-th score some entry outside shares, or shared by several inside."""
    plateau: float = 0.0
    forced: int = 0
    amr: float = 0.0
    hash: int = 0

    def add(self, one: Choice) -> None:
        """Count a choice."""
        self.queries += 1
        self.tied += one.ties > 1
        self.plateau += one.plateau
        self.forced += one.forced
        self.amr += one.amr
        self.hash = (self.hash + one.hash * (2 * one.q_pos + 1)) & (2**64 - 1)


@dataclass
class SelectionTap:
    """What becomes of choices that were measured: 0 nothing, 1 counters by layer, 2 every `every`th row, 3 all rows."""

    level: Level = 1
    every: int = 64
    counters: dict[int, Counters] = field(default_factory=dict)
    rows: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.level not in (0, 1, 2, 3) or self.every < 1:
            raise ConfigError(
                f"A tap of level {self.level!r} that keeps every {self.every!r}th row: levels go from 0 to 3, and rows "
                "are kept from every 1st on."
            )

    def on_select(self, one: Choice) -> None:
        """Take a choice in."""
        if not self.level:
            return
        mine = self.counters.setdefault(one.layer, Counters())
        if self.level == 3 or (self.level == 2 and mine.queries % self.every == 0):
            self.rows.append(one)
        mine.add(one)

    def figures(self) -> dict[str, float]:
        """Means over rows that have a choice."""
        usable = [row for row in self.rows if row.has_choice]
        names = ("amr", "amr_eff", "amr_head_min", "amr_all", "kl", "plateau", "ties")
        return {name: sum(getattr(row, name) for row in usable) / len(usable) for name in names} if usable else {}
