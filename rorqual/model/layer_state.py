"""What one layer remembers of a sequence, in four named parts.

* window: the last keys, a ring (token t in slot t mod R);
* entries: compressed entries of CSA and HCA layers, growing by one per m tokens;
* index keys: the indexer's compressed keys of CSA layers;
* pending: projections of tokens whose block is not complete (and, for CSA, of the previous block), a ring.

Blocks with an Engram memory (V4 has none) keep a fifth, `engram`: what its hashes and its convolution look back at.
Source: V4 report, the heterogeneous cache; update rules from the checkpoint's inference code.

B batch rows, R ring slots, K head width, C entries.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.layout import EntryPlan, Layout
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
    """One layer's memory. `entries` [B, capacity, K] and `index_keys` are present only where the layer has them."""

    window: Tensor
    entries: Tensor | None = None
    index_keys: Tensor | None = None
    pending: Pending | None = None
    index_pending: Pending | None = None
    engram: Recall | None = None

    def past_window(self, layout: Layout, count: int) -> Tensor:
        """The `count` keys before this call, oldest first: [B, count, K]; places before position 0 hold anything."""
        return ring_read(self.window, layout, count)

    def write_window(self, kv: Tensor, layout: Layout) -> None:
        """Put this call's keys into the ring."""
        ring_write(self.window, kv, layout)

    def append(self, part: str, new: Tensor | None, plan: EntryPlan) -> Tensor | None:
        """Store entries completed in this call; returns all of them, [B, plan.total, K], None while there is none."""
        stored: Tensor = getattr(self, part)
        if plan.total > stored.shape[1]:
            with torch.inference_mode(False):  # so that a state filled in inference mode works outside it too
                grown = stored.new_zeros(stored.shape[0], max(plan.total, 2 * stored.shape[1], 16), stored.shape[2])
            grown[:, : stored.shape[1]] = stored
            setattr(self, part, grown)
            stored = grown
        if new is not None:
            _put_entries(stored, new.detach(), plan)
        if not plan.total:
            return None
        if new is not None and new.requires_grad and torch.is_grad_enabled():
            return _put_entries(stored[:, : plan.total].clone(), new, plan)  # this call's own entries keep their graph
        return stored[:, : plan.total]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a dotted name."""
        out = {"window": self.window}
        for name in ("entries", "index_keys"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        for name in ("pending", "index_pending"):
            part = getattr(self, name)
            if part is not None:
                out[f"{name}.kv"], out[f"{name}.score"] = part.kv, part.score
        if self.engram is not None:
            parts = {f"engram.{f.name}": getattr(self.engram, f.name) for f in dataclasses.fields(Recall)}
            out |= {name: value for name, value in parts.items() if value is not None}
        return out

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


def new_layer(cfg: ModelConfig, spec: LayerSpec, batch: int, rewind: int, like: Tensor) -> LayerState:
    """The memory of a layer that has seen nothing, in the precision and on the device of `like`."""

    def zeros(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=like.device)

    def pending(width: int) -> Pending:
        ratio, channels = spec.compress_ratio, width * (2 if spec.overlap else 1)
        size = ratio - 1 + (ratio if spec.overlap else 0) + rewind
        return Pending(zeros(size, channels, dtype=torch.float32), zeros(size, channels, dtype=torch.float32))

    state = LayerState(window=zeros(max(1, cfg.sliding_window - 1) + rewind, cfg.head_dim))
    if spec.compress_ratio:
        state.entries, state.pending = zeros(0, cfg.head_dim), pending(cfg.head_dim)
    if spec.has_indexer:
        state.index_keys, state.index_pending = zeros(0, cfg.index_head_dim), pending(cfg.index_head_dim)
    if spec.engram and cfg.engram is not None:
        state.engram = Recall(zeros(max(1, cfg.engram.max_order - 1) + rewind, dtype=torch.int64))
        if cfg.engram.reach:
            state.engram.value = zeros(cfg.engram.reach + rewind, cfg.hidden_size)
            state.engram.gate = zeros(cfg.engram.reach + rewind, cfg.hc_mult, dtype=torch.float32)
    return state
