"""Lightning indexer of a CSA layer: scores the compressed entries and picks the top k for each query.

Scores only select, so the language-model loss gives the indexer no gradient; its own loss pulls the softmax of its
scores towards the attention mass that the layer's heads put on the entries. Source: V4 report section 2.3.1; the
loss is V3.2's.

B batch, S tokens, D hidden, Q query rank, J index heads, K index width, C entries.
"""

import torch
from torch import Tensor, nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.cache_format import pack_keys, packs_keys, unpacked_keys
from rorqual.model.compressor import Compressor
from rorqual.model.layer_state import LayerState
from rorqual.model.layout import Layout
from rorqual.model.linear import Linear
from rorqual.ops import triton
from rorqual.ops.hadamard import hadamard
from rorqual.ops.index_groups import BUDGET, SEGMENT, index_search, make_groups, room_for
from rorqual.ops.index_loss import index_loss, query_blocks
from rorqual.ops.index_scan import IndexKeys, index_scan
from rorqual.ops.index_topk import index_scores, select_entries
from rorqual.ops.native import infers
from rorqual.ops.rope import apply_rope
from rorqual.ops.rounding import round_index_fp4
from rorqual.ops.sparse_attention import Visible


class Indexer(nn.Module):
    """Index queries from the shared query latent, index keys from an own compressor of width `index_head_dim`."""

    def __init__(self, cfg: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.heads, self.width, self.top_k = cfg.index_n_heads, cfg.index_head_dim, cfg.index_topk
        self.cfg = cfg
        self.scale = self.width**-0.5 * self.heads**-0.5
        self.wq_b = Linear(cfg.q_lora_rank, self.heads * self.width)
        self.weights_proj = Linear(cfg.hidden_size, self.heads)
        self.compressor = Compressor(cfg, spec, self.width)

    @property
    def rounding(self) -> bool:
        """Whether queries and keys are FP4 numbers."""
        return self.cfg.activation_rounding != "none" or packs_keys(self.cfg)

    def keys(
        self,
        projected: tuple[Tensor, Tensor] | None,
        layout: Layout,
        frequencies: Tensor,
        dtype: torch.dtype,
        state: LayerState | None,
    ) -> Tensor | None:
        """All index keys up to this call, rotated: [B, C, K], or packed rows of the state; None when there is none yet.

        `projected` comes from the compressor's `project`, None where no block can be completed.
        """
        new = None
        if projected is not None:
            pending = None if state is None else state.index_pending
            new = self.compressor(projected, layout, frequencies, dtype, pending)
        if new is not None:
            new = hadamard(new)
        if state is None or not packs_keys(self.cfg):
            new = round_index_fp4(new) if self.rounding and new is not None else new
        if state is None:
            return layout.gather(new, self.compressor.ratio)
        return state.append("index_keys", pack_keys(self.cfg, new), layout.entries(self.compressor.ratio))

    def queries(self, x: Tensor, latent: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D], latent [B, S, Q] (after q_norm) -> queries [B, S, J, K] and head weights [B, S, J]."""
        q = self.wq_b(latent).unflatten(-1, (self.heads, self.width))
        return self._rotate(apply_rope(q, table.unsqueeze(-2))), self.weights_proj(x) * self.scale

    def _rotate(self, x: Tensor) -> Tensor:
        x = hadamard(x)
        return round_index_fp4(x) if self.rounding else x

    @torch.no_grad()
    def select(self, q: Tensor, weights: Tensor, keys: Tensor, visible: Visible, top_k: int | None = None) -> Visible:
        """Narrow `visible` to the top k entries per query (the model's k unless told otherwise); scores are computed in
        blocks of queries.

        keys: [B, C, K], or packed rows uint8 [B, C, Y].
        """
        if infers(q) or triton.usable(q):
            top_k, weights = min(top_k or self.top_k, keys.shape[1]), weights.float()
            picks = [
                self._search(q[b], weights[b], IndexKeys(keys[b], self.width), start, end, top_k)
                for b, (start, end) in enumerate(zip(*visible.by_row(q.shape[0]), strict=True))
            ]
            return Visible(visible.end, visible.start, torch.stack(picks))
        keys, parts = unpacked_keys(self.cfg, keys, q.dtype), []
        for lo, hi in query_blocks(q.shape[0], q.shape[1], self.heads * max(1, keys.shape[1])):
            scores = index_scores(q[:, lo:hi], weights[:, lo:hi], keys)
            mask = visible.mask(lo, hi, keys.shape[1])
            if mask is not None:
                scores.masked_fill_(~mask, float("-inf"))
            parts.append(select_entries(scores, top_k or self.top_k))
        return Visible(visible.end, visible.start, torch.cat(parts, 1))

    def _search(
        self, q: Tensor, weights: Tensor, keys: IndexKeys, start: Tensor | None, end: Tensor, top_k: int
    ) -> Tensor:
        """By all keys or by groups; the fused step keeps the latter, here they are made anew for every call."""
        segments = keys.rows.shape[0] // SEGMENT
        if self.cfg.index_search == "exact" or not segments or (start is not None and bool(start.any())):
            return index_scan(q, weights, keys, start, end, top_k)
        groups = room_for(segments, keys.width, q.device)
        make_groups(keys, groups, 0, segments)
        return index_search(q, weights, keys, groups, end, top_k, BUDGET)

    def loss(
        self, index_q: Tensor, weights: Tensor, keys: Tensor, visible: Visible, all_visible: Visible,
        q: Tensor, lse: Tensor, entries: Tensor, scale: float, layout: Layout,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """KL(attention mass on the used entries ‖ softmax of their index scores), mean over queries that see any.

        `visible` is what attention used (all entries in the dense stage, the picks afterwards); q [B, S, H, K], lse
        [B, S, H] and entries are the layer's attention, taken as constants; the padding that `layout` marks does not
        count. Where rows are cut into parts, the mean is over the whole rows and this is one part's share in it.
        Also returns the recall of the top k among `all_visible`: the share of mass they catch, over queries that see
        more than k entries (nan when none does).
        """
        total = index_loss(
            index_q, weights, keys, visible, all_visible, q, lse, entries, scale, layout.valid, self.top_k
        )
        seen, caught, choices = layout.total(total[1:])
        return total[0] / seen.clamp_min(1), caught / choices
