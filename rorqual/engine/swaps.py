"""The same text with another choice of entries in chosen layers: what causes a wrong answer, not what goes with it.

A swap stands in a `Trace` and takes the place of what a CSA layer's queries would attend to, for all queries of the
call that have a choice. Source: evaluation specification, section 5.4.

B = 1 row, T query tokens, H heads, K head width, C entries, k picks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.errors import RequestError
from rorqual.model import State, Trace, Transformer
from rorqual.model.trace import Swap, Swappable
from rorqual.ops.forced_entries import Grams, Policy
from rorqual.ops.sparse_attention import Visible

Kind = Literal["DENSE", "ORACLE", "PLUS", "MINUS", "RANDOM", "RECENT", "LEX"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def swaps_of(
    model: Transformer, kind: Kind, ids: Sequence[int], needle: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None, seed: int = 0,
) -> Mapping[str, Swap]:  # fmt: skip
    """A `Trace`'s swaps for `layers` (all with an indexer).

    ids: the tokens of the whole text so far, which the list may grow by later. needle: tokens [begin, end) that PLUS
    adds and MINUS takes away. Raises: RequestError for another kind, or a needle that is wanting.
    """
    if kind not in KINDS or (kind in ("PLUS", "MINUS") and needle is None):
        raise RequestError(
            f"No swap {kind!r}"
            + (" without a needle, which it adds or takes away." if kind in KINDS else ".")
            + f" There are {', '.join(KINDS)}."
        )
    out = {}
    for spec in model.cfg.layers:
        if spec.has_indexer and (layers is None or spec.index in layers):
            cover = None if needle is None else model.cover(spec.index, *needle, 1 << 40)
            out[f"layers.{spec.index}.attn"] = _Swap(model.cfg, kind, spec.index, cover, seed, ids)
    return out


class _Swap:
    def __init__(
        self, cfg: ModelConfig, kind: Kind, layer: int, cover: tuple[int, int] | None, seed: int, ids: Sequence[int]
    ) -> None:
        self.cfg, self.kind, self.layer, self.cover, self.seed, self.ids = cfg, kind, layer, cover, seed, ids

    def __call__(self, at: Swappable) -> Visible:
        if self.kind == "DENSE":
            return at.visible
        k, every = self.cfg.index_topk, at.visible
        allowed = every.mask(0, at.q.shape[1], at.entries.shape[1])
        seen_TC = torch.ones(at.q.shape[1], at.entries.shape[1], dtype=torch.bool) if allowed is None else allowed[0]
        chosen_TC = self._chosen(at, seen_TC, k)
        few = seen_TC.sum(-1, keepdim=True) <= k  # these have no choice
        return Visible(every.end, every.start, as_picks(torch.where(few, seen_TC, chosen_TC & seen_TC))[None])

    def _chosen(self, at: Swappable, seen_TC: Tensor, k: int) -> Tensor:
        num_entries = seen_TC.shape[1]
        index = torch.arange(num_entries)
        if self.kind in ("PLUS", "MINUS"):
            assert self.cover is not None
            held = (index >= self.cover[0]) & (index < self.cover[1])
            own = as_mask(at.used, num_entries)
            return own | held if self.kind == "PLUS" else own & ~held
        if self.kind == "ORACLE":
            logits = torch.einsum("thk,ck->thc", at.q[0].float(), at.entries[0].float()) * at.scale
            return _best(logits.masked_fill(~seen_TC[:, None], -torch.inf).softmax(-1).mean(1), seen_TC, k)
        if self.kind == "RANDOM":  # of each query its own, whatever call it comes in
            rows = []
            for t in range(seen_TC.shape[0]):
                draw = torch.Generator().manual_seed(self.seed * 1_000_003 + (at.first + t) * 64 + self.layer)
                rows.append(torch.rand(num_entries, generator=draw))
            return _best(torch.stack(rows), seen_TC, k)
        if self.kind == "RECENT":
            return _best(index.float().expand(seen_TC.shape), seen_TC, k)
        grams = Grams(self.cfg.layers[self.layer].compress_ratio, np.zeros(1, np.uint8))
        grams.add(list(self.ids[: at.first + seen_TC.shape[0]]))
        policy = Policy(grams.ratio, self.cfg.sliding_window, lexical_most=k, hits=min(16, k))
        return as_mask(torch.from_numpy(grams.force(policy, at.first).entries.copy()), num_entries)


def _best(values_TC: Tensor, seen_TC: Tensor, k: int) -> Tensor:
    """The k largest of what is seen, lowest index first among equals."""
    order = values_TC.masked_fill(~seen_TC, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(seen_TC).scatter_(-1, order, True)


def as_mask(picks_Tk: Tensor, num_entries: int) -> Tensor:
    """[T, k] with -1 for none -> bool [T, C]."""
    wide = torch.zeros(picks_Tk.shape[0], num_entries + 1, dtype=torch.bool)
    return wide.scatter_(-1, torch.where(picks_Tk < 0, num_entries, picks_Tk), True)[:, :num_entries]


def as_picks(mask_TC: Tensor) -> Tensor:
    """bool [T, C] -> [T, k] ascending, -1 behind."""
    index = torch.where(mask_TC, torch.arange(mask_TC.shape[1]), mask_TC.shape[1])
    picks = index.sort(-1).values[:, : max(1, int(mask_TC.sum(-1).max()))]
    return torch.where(picks == mask_TC.shape[1], -1, picks)


@torch.inference_mode()
def continue_with(
    model: Transformer, prompt: Sequence[int], swap: Kind | None, most: int, stop: int,
    needle: tuple[int, int] | None = None, layers: Sequence[int] | None = None, num_choices: int | None = None,
) -> list[int]:  # fmt: skip
    """Greedy tokens after a prompt with a swap (None: as the model chooses), by the layer code, up to `stop`."""
    ids = list(prompt)
    swaps = None if swap is None else swaps_of(model, swap, ids, needle, layers)
    state: State = model.new_state(1)
    streams = model.forward_streams(torch.tensor([ids]), state=state, trace=Trace(swaps=swaps))
    while True:
        logits = model.logits(model.final_hidden(streams[:, -1:]))[0, 0, :num_choices]
        ids.append(int(logits.argmax()))
        if ids[-1] == stop or len(ids) - len(prompt) >= most:
            return ids[len(prompt) :]
        streams = model.forward_streams(torch.tensor([ids[-1:]]), state=state, trace=Trace(swaps=swaps))
