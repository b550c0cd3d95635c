"""Hybrid attention of one layer: sliding window, plus compressed entries (CSA: the indexer's picks, HCA: all).

Low-rank queries with a per-head RMS, one shared key-value head, partial rope and its inverse on the output, a sink per
head, grouped low-rank output. Prefill, chunks, decoding and training all come through `Attention.forward`.
Source: V4 report section 2.3; details from the checkpoint's inference code.

B batch, S tokens, D hidden, H heads, K head width, Q query rank, G output groups, R output rank, W window, C entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.cache_format import kept_entries, pack_entries, packs_entries, unpacked_keys
from rorqual.model.compressor import Compressor
from rorqual.model.guarded import choose
from rorqual.model.indexer import Indexer
from rorqual.model.layer_state import LayerState
from rorqual.model.layout import Layout
from rorqual.model.linear import Linear, RMSNorm
from rorqual.model.trace import Swappable, Trace
from rorqual.ops.cache_codec import PackedEntries, unpacked
from rorqual.ops.rope import apply_rope, norm_rope, rope_frequencies
from rorqual.ops.rounding import round_entry_fp8, round_kv_fp8
from rorqual.ops.sparse_attention import Visible, sparse_attention


@dataclass
class Projected:
    """What attention reads of its input, token by token: the same whatever sequences the tokens belong to.

    `blocks` and `index_blocks` are the compressors' values and slot scores, `index_q` and `index_weights` the indexer's
    queries; None where this call does not need them.
    """

    q: Tensor
    kv: Tensor
    blocks: tuple[Tensor, Tensor] | None = None
    index_blocks: tuple[Tensor, Tensor] | None = None
    index_q: Tensor | None = None
    index_weights: Tensor | None = None

    def split(self, layout: Layout) -> Iterator["Projected"]:
        """One for each of the layout's segments."""
        if not layout.is_flat:
            yield self
            return

        def cut(x: Tensor | None) -> list[Tensor | None]:
            return [None] * len(layout.segments) if x is None else [*layout.split(x)]

        def cut_pair(pair: tuple[Tensor, Tensor] | None) -> list[tuple[Tensor, Tensor] | None]:
            if pair is None:
                return [None] * len(layout.segments)
            return [*zip(layout.split(pair[0]), layout.split(pair[1]), strict=True)]

        q, kv, blocks, index_blocks = self.q, self.kv, self.blocks, self.index_blocks
        yield from map(
            Projected, layout.split(q), layout.split(kv), cut_pair(blocks), cut_pair(index_blocks),
            cut(self.index_q), cut(self.index_weights),
        )  # fmt: skip


class Attention(nn.Module):
    """One layer's attention; what it holds besides the window follows from its `LayerSpec`."""

    frequencies: Tensor

    def __init__(self, cfg: ModelConfig, spec: LayerSpec, name: str) -> None:
        super().__init__()
        self.cfg, self.spec, self.name = cfg, spec, name
        heads, width = cfg.num_attention_heads, cfg.head_dim
        self.scale = width**-0.5
        self.wq_a = Linear(cfg.hidden_size, cfg.q_lora_rank)
        self.q_norm = RMSNorm(cfg.q_lora_rank, cfg.rms_norm_eps)
        self.wq_b = Linear(cfg.q_lora_rank, heads * width)
        self.wkv = Linear(cfg.hidden_size, width)
        self.kv_norm = RMSNorm(width, cfg.rms_norm_eps)
        self.attn_sink = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.wo_a = Linear(heads * width // cfg.o_groups, cfg.o_groups * cfg.o_lora_rank)
        self.wo_b = Linear(cfg.o_groups * cfg.o_lora_rank, cfg.hidden_size)
        self.compressor = Compressor(cfg, spec, width) if spec.compress_ratio else None
        self.indexer = Indexer(cfg, spec) if spec.has_indexer else None
        self.register_buffer("frequencies", self.make_frequencies(), persistent=False)

    def make_frequencies(self) -> Tensor:
        """The layer's rope frequencies: no part of a checkpoint."""
        cfg = self.cfg
        if self.spec.compress_ratio:  # a compressed layer uses the YaRN table for everything
            return rope_frequencies(cfg.qk_rope_head_dim, cfg.compress_rope_theta, cfg.rope_scaling)
        return rope_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        table: Tensor,
        state: LayerState | Sequence[LayerState] | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """x [B, S, D] (after attn_norm), rope table complex64 [B or 1, S, r/2] -> [B, S, D].

        With `state`, earlier tokens take part and this call's tokens are remembered. In a flat batch every segment
        has its own; weights are read once for the tokens of all.
        """
        projected = self._project(x, layout, table, state is not None, trace)
        out = [
            self._attend(part, segment, mine, trace)
            for part, (segment, mine) in zip(projected.split(layout), layout.each(state), strict=True)
        ]
        o = out[0] if len(out) == 1 else torch.cat(out, 1)
        return self._output(apply_rope(o, table.unsqueeze(-2), inverse=True))

    def _project(self, x: Tensor, layout: Layout, table: Tensor, has_state: bool, trace: Trace | None) -> Projected:
        """Everything that reads one token alone."""
        latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(latent).unflatten(-1, (self.cfg.num_attention_heads, self.cfg.head_dim))
        q = norm_rope(q, None, self.cfg.rms_norm_eps, table.unsqueeze(-2))
        kv = self._round(norm_rope(self.wkv(x), self.kv_norm.weight, self.kv_norm.eps, table))
        out = Projected(q, kv)
        if self.compressor is None:
            return out
        completes = has_state or any(one.entries(self.compressor.ratio).count for one in layout.segments)
        if completes:
            out.blocks = self.compressor.project(x, layout)
        if self.indexer is not None:
            scores = any(self._scores_entries(one, trace) for one in layout.segments)
            x, latent = x.detach(), latent.detach()  # only its own loss trains the indexer
            if completes and (has_state or scores):
                out.index_blocks = self.indexer.compressor.project(x, layout)
            if scores:
                out.index_q, out.index_weights = self.indexer.queries(x, latent, table)
        return out

    def _attend(self, p: Projected, layout: Layout, state: LayerState | None, trace: Trace | None) -> Tensor:
        """Attention within the layout's sequences, before the inverse rope: [B, S, H, K]."""
        window = self.cfg.sliding_window
        past = layout.halo(p.kv, window - 1) if state is None else state.past_window(layout, window - 1)
        keys = torch.cat([past, p.kv], 1)
        entries = self._entries(p, layout, state)
        visible = index = None
        if self.compressor is not None:
            visible = layout.entries(self.compressor.ratio).visible
            every = visible
            index, visible = self._index(p, layout, state, trace, every)
            swap = None if trace is None or trace.swaps is None else trace.swaps.get(self.name)
            if swap is not None and visible.picks is not None and entries is not None:
                mine = Swappable(p.q, unpacked(entries), every, visible.picks[0], self.scale, layout.start[0])
                visible = swap(mine)
        o, lse = sparse_attention(
            p.q,
            keys,
            self.attn_sink,
            layout.positions,
            window,
            self.scale,
            entries,
            visible if entries is not None else None,
        )
        if index is not None and trace is not None and trace.index_loss and self.indexer and entries is not None:
            assert visible is not None
            entries = unpacked(entries)
            every = layout.entries(self.spec.compress_ratio).visible
            loss, recall = self.indexer.loss(*index, visible, every, p.q, lse, entries, self.scale, layout)
            trace.index_losses.append(loss)
            trace.index_recall.append(recall)
        if state is not None:
            state.write_window(p.kv, layout)
        if trace is not None:
            trace.keep(f"{self.name}.q", p.q)
            trace.keep(f"{self.name}.keys", keys)
            if entries is not None:
                trace.keep(f"{self.name}.entries", unpacked(entries))
        return o

    def _round(self, kv: Tensor) -> Tensor:
        if self.cfg.activation_rounding != "none":
            return round_kv_fp8(kv, self.cfg.nope_head_dim)
        return kv

    def _entries(self, p: Projected, layout: Layout, state: LayerState | None) -> Tensor | PackedEntries | None:
        """Compressed entries up to and including this call, [B, C, K]."""
        if self.compressor is None:
            return None
        new = None
        if p.blocks is not None:
            pending = None if state is None else state.pending
            new = self.compressor(p.blocks, layout, self.frequencies, p.kv.dtype, pending)
        plan, dtype = layout.entries(self.compressor.ratio), p.kv.dtype
        if state is not None and packs_entries(self.cfg, dtype):
            kept = state.append("entries", pack_entries(self.cfg, new), plan)
            return kept_entries(self.cfg, kept, dtype)
        if new is not None:
            is_packed = packs_entries(self.cfg, dtype)
            new = round_entry_fp8(new, self.cfg.nope_head_dim) if is_packed else self._round(new)
        return layout.gather(new, self.compressor.ratio) if state is None else state.append("entries", new, plan)

    def _scores_entries(self, layout: Layout, trace: Trace | None) -> bool:
        """Whether the indexer has to score: some query may see more entries than it picks, or somebody asks."""
        if trace is not None and (trace.index_loss or trace.capture):
            return True
        return self._chooses(layout, trace)

    def _chooses(self, layout: Layout, trace: Trace | None) -> bool:
        assert self.indexer is not None
        has_choice = layout.entries(self.spec.compress_ratio).total > self.indexer.top_k
        return has_choice and not (trace is not None and trace.dense)

    def _index(
        self, p: Projected, layout: Layout, state: LayerState | None, trace: Trace | None, visible: Visible
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Visible]:
        """Run the indexer where needed: its (queries, weights, keys), and what attention may use."""
        if self.indexer is None:
            return None, visible
        captures = trace is not None and bool(trace.capture)
        if captures and trace is not None and not layout.entries(self.spec.compress_ratio).total:
            for name in ("index_topk", "index_used"):
                trace.keep(f"{self.name}.{name}", p.kv.new_empty(*p.kv.shape[:2], 0, dtype=torch.int64))
        scores = self._scores_entries(layout, trace)
        if state is None and not scores:
            return None, visible
        keys = self.indexer.keys(p.index_blocks, layout, self.frequencies, p.kv.dtype, state)
        if keys is None or not scores:
            return None, visible
        assert p.index_q is not None and p.index_weights is not None
        q, weights = p.index_q, p.index_weights
        choice = self._chooses(layout, trace)
        if choice or captures:
            if layout.shown is not None and choice:
                visible, own = choose(self.indexer, self.name, q, weights, keys, visible, layout.shown, layout.start[0])
                picked = Visible(visible.end, visible.start, own)
            else:
                picked = self._picked(q, weights, keys, visible, trace)
                visible = picked if choice else visible
            if trace is not None and picked.picks is not None:
                trace.keep(f"{self.name}.index_topk", picked.picks)
                trace.keep(f"{self.name}.index_used", picked.picks if visible.picks is None else visible.picks)
        if trace is not None:
            keys = unpacked_keys(self.cfg, keys, q.dtype)
            for what, value in (("index_entries", keys), ("index_q", q), ("index_weights", weights)):
                trace.keep(f"{self.name}.{what}", value)
        return (q, weights, keys), visible

    def _picked(self, q: Tensor, weights: Tensor, keys: Tensor, visible: Visible, trace: Trace | None) -> Visible:
        """The indexer's choice, or the one that `trace` remembers."""
        assert self.indexer is not None
        memory = None if trace is None else trace.picks
        if memory is not None and self.name in memory:
            return Visible(visible.end, visible.start, memory[self.name])
        picked = self.indexer.select(q, weights, keys, visible)
        if memory is not None and picked.picks is not None:
            memory[self.name] = picked.picks
        return picked

    def _output(self, o: Tensor) -> Tensor:
        """Grouped low-rank output: z_g = A_g o_g for each group of heads, then wo_b: [B, S, H, K] -> [B, S, D]."""
        groups, rank = self.cfg.o_groups, self.cfg.o_lora_rank
        b, s = o.shape[:2]
        z = self.wo_a.grouped(o.reshape(b, s, groups, -1), groups)
        return self.wo_b(z.reshape(b, s, groups * rank))
