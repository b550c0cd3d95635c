"""One layer's memory: window, entries, index keys, pending, and what an Engram block looks back at.

Rings (window, pending, recall) hold token t in slot t mod R; entries and index keys grow, either in tensors of their
own or in pages of a pool (`pages.py`). What a sequence as a whole remembers: `state.py`.

B batch rows, R ring slots, K head width, C entries.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.cache_format import row_of
from rorqual.model.layout import EntryPlan, Layout
from rorqual.model.page_table import Paged
from rorqual.model.ring import ring_read, ring_write


def _put_entries(target: Tensor, new: Tensor, plan: EntryPlan) -> Tensor:
    """Write each row's completed entries behind its earlier ones, in place."""
    if len(set(plan.base)) == 1 and min(plan.counts) == plan.count:
        target[:, plan.base[0] : plan.base[0] + plan.count] = new
    else:
        for row, (base, count) in enumerate(zip(plan.base, plan.counts, strict=True)):
            target[row, base : base + count] = new[row, :count]
    return target


@dataclass
class Pending:
    """Compressor projections of recent tokens: `kv` and `score` (ape added), fp32 [B, R, channels]."""

    kv: Tensor
    score: Tensor

    @property
    def size(self) -> int:
        """Slots of the ring."""
        return self.kv.shape[1]

    def write(self, kv: Tensor, score: Tensor, layout: Layout) -> None:
        """Remember this call's tokens."""
        ring_write(self.kv, kv, layout)
        ring_write(self.score, score, layout)


@dataclass
class Recall:
    """What an Engram block looks back at: compressed token ids int64 [B, R] and, where it has a convolution, the values
    [B, R', D] that were read and their gates fp32 [B, R', N] (together a fourth of the gated streams they stand for).
    """

    ids: Tensor
    value: Tensor | None = None
    gate: Tensor | None = None


@dataclass
class LayerState:
    """One layer's memory. `entries` [B, capacity, K] and `index_keys` are present only where the layer has them; in a
    paged state they are `Paged`. Their rows are packed where the model's cache format says so (`cache_format.py`).
    """

    window: Tensor
    entries: Tensor | Paged | None = None
    index_keys: Tensor | Paged | None = None
    pending: Pending | None = None
    index_pending: Pending | None = None
    engram: Recall | None = None
    groups: Any = None
    """`index_groups.IndexGroups` of the index keys, made when a step needs them; no part of what is remembered."""

    def past_window(self, layout: Layout, count: int) -> Tensor:
        """The `count` keys before this call, oldest first: [B, count, K]; places before position 0 hold anything."""
        return ring_read(self.window, layout, count)

    def write_window(self, kv: Tensor, layout: Layout) -> None:
        """Put this call's keys into the ring."""
        ring_write(self.window, kv, layout)

    def append(self, part: str, new: Tensor | None, plan: EntryPlan) -> Tensor | None:
        """Store entries completed in this call; returns all of them, [B, plan.total, K], None while there is none."""
        stored: Tensor | Paged = getattr(self, part)
        if isinstance(stored, Paged):
            stored.append(new, plan.base[0])
            return stored.gather(plan.total) if plan.total else None
        stored = self._grown(part, stored, plan.total)
        if new is not None:
            _put_entries(stored, new.detach(), plan)
        if not plan.total:
            return None
        if new is not None and new.requires_grad and torch.is_grad_enabled():
            return _put_entries(stored[:, : plan.total].clone(), new, plan)  # this call's own entries keep their graph
        return stored[:, : plan.total]

    def make_room(self, total: int) -> None:
        """Let entries and index keys that do not lie in pages hold `total` a row."""
        for part in ("entries", "index_keys"):
            stored = getattr(self, part)
            if isinstance(stored, Tensor):
                self._grown(part, stored, total)

    def _grown(self, part: str, stored: Tensor, total: int) -> Tensor:
        if total <= stored.shape[1]:
            return stored
        with torch.inference_mode(False):  # so that a state filled in inference mode works outside it too
            grown = stored.new_zeros(stored.shape[0], max(total, 2 * stored.shape[1], 16), stored.shape[2])
        grown[:, : stored.shape[1]] = stored
        setattr(self, part, grown)
        return grown

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a dotted name; `paged` has the rest."""
        out = {"window": self.window}
        for name in ("entries", "index_keys"):
            if isinstance(getattr(self, name), Tensor):
                out[name] = getattr(self, name)
        for name in ("pending", "index_pending"):
            part = getattr(self, name)
            if part is not None:
                out[f"{name}.kv"], out[f"{name}.score"] = part.kv, part.score
        if self.engram is not None:
            parts = {f"engram.{f.name}": getattr(self.engram, f.name) for f in dataclasses.fields(Recall)}
            out |= {name: value for name, value in parts.items() if value is not None}
        return out

    def contents(self) -> dict[str, Tensor]:
        """Every tensor by a dotted name, what lies in pages put together."""
        rest = self.tensors()
        return {"window": rest.pop("window"), **{name: part.gather() for name, part in self.paged().items()}, **rest}

    def paged(self) -> dict[str, Paged]:
        """The parts that lie in pages, by name."""
        parts = {name: getattr(self, name) for name in ("entries", "index_keys")}
        return {name: part for name, part in parts.items() if isinstance(part, Paged)}

    @classmethod
    def of(cls, t: dict[str, Tensor]) -> "LayerState":
        """The inverse of `tensors`."""

        def pending(name: str) -> Pending | None:
            return Pending(t[f"{name}.kv"], t[f"{name}.score"]) if f"{name}.kv" in t else None

        ids = t.get("engram.ids")
        recall = None if ids is None else Recall(ids, t.get("engram.value"), t.get("engram.gate"))
        return cls(
            t["window"], t.get("entries"), t.get("index_keys"), pending("pending"), pending("index_pending"), recall
        )

    def map(self, function: Any) -> "LayerState":
        """A copy with `function` applied to every tensor."""
        return LayerState.of({name: function(value) for name, value in self.tensors().items()})


def recalls(state: LayerState | Sequence[LayerState] | None) -> Any:
    """The `Recall` of a layer with an Engram memory; of several states (a flat batch) a list of theirs (`Any`: either,
    or None without a state).
    """
    if state is None or isinstance(state, LayerState):
        return None if state is None else state.engram
    return [one.engram for one in state]


def new_layer(cfg: ModelConfig, spec: LayerSpec, batch: int, rewind: int, like: Tensor) -> LayerState:
    """An empty memory, its rings `rewind` tokens longer than the network needs; dtype and device as `like`."""

    def zeros(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=like.device)

    def pending(width: int) -> Pending:
        ratio, channels = spec.compress_ratio, width * (2 if spec.overlap else 1)
        size = ratio - 1 + (ratio if spec.overlap else 0) + rewind
        return Pending(zeros(size, channels, dtype=torch.float32), zeros(size, channels, dtype=torch.float32))

    state = LayerState(window=zeros(max(1, cfg.sliding_window - 1) + rewind, cfg.head_dim))
    if spec.compress_ratio:
        width, dtype = row_of(cfg, "entries", like.dtype)
        state.entries, state.pending = zeros(0, width, dtype=dtype), pending(cfg.head_dim)
    if spec.has_indexer:
        width, dtype = row_of(cfg, "index_keys", like.dtype)
        state.index_keys, state.index_pending = zeros(0, width, dtype=dtype), pending(cfg.index_head_dim)
    if spec.engram and cfg.engram is not None:
        state.engram = Recall(zeros(max(1, cfg.engram.max_order - 1) + rewind, dtype=torch.int64))
        if cfg.engram.reach:
            state.engram.value = zeros(cfg.engram.reach + rewind, cfg.hidden_size)
            state.engram.gate = zeros(cfg.engram.reach + rewind, cfg.hc_mult, dtype=torch.float32)
    return state
