"""Hybrid attention of one layer: sliding window, plus compressed entries (CSA: the indexer's picks, HCA: all).

Low-rank queries with a per-head RMS, one shared key-value head, partial rope and its inverse on the output, a sink per
head, grouped low-rank output. Prefill, chunks, decoding and training all come through `Attention.forward`.
Source: V4 report section 2.3; details from the checkpoint's inference code.

B batch, S tokens, D hidden, H heads, K head width, Q query rank, G output groups, R output rank, W window, C entries.
"""

import torch
from torch import Tensor, nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.compressor import Compressor
from rorqual.model.indexer import Indexer
from rorqual.model.layer_state import LayerState
from rorqual.model.layout import Layout
from rorqual.model.linear import Linear, RMSNorm
from rorqual.model.trace import Trace
from rorqual.ops.grouped_linear import grouped_linear
from rorqual.ops.rope import apply_rope, norm_rope, rope_frequencies
from rorqual.ops.rounding import round_kv_fp8
from rorqual.ops.sparse_attention import Visible, sparse_attention


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
        if spec.compress_ratio:  # a compressed layer uses the YaRN table for everything
            frequencies = rope_frequencies(cfg.qk_rope_head_dim, cfg.compress_rope_theta, cfg.rope_scaling)
        else:
            frequencies = rope_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        table: Tensor,
        state: LayerState | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """x [B, S, D] (after attn_norm), rope table complex64 [B or 1, S, r/2] -> [B, S, D].

        With `state`, earlier tokens take part and this call's tokens are remembered.
        """
        latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(latent).unflatten(-1, (self.cfg.num_attention_heads, self.cfg.head_dim))
        q = norm_rope(q, None, self.cfg.rms_norm_eps, table.unsqueeze(-2))
        kv = self._round(norm_rope(self.wkv(x), self.kv_norm.weight, self.kv_norm.eps, table))
        window = self.cfg.sliding_window
        if state is None:
            keys = torch.cat([layout.halo(kv, window - 1), kv], 1)
        else:
            keys = torch.cat([state.past_window(layout, window - 1), kv], 1)
        entries = self._entries(x, layout, state)
        visible = index = None
        if self.compressor is not None:
            visible = layout.entries(self.compressor.ratio).visible
            index, visible = self._index(x, latent, layout, table, state, trace, visible)
        o, lse = sparse_attention(
            q,
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
            every = layout.entries(self.spec.compress_ratio).visible
            loss, recall = self.indexer.loss(*index, visible, every, q, lse, entries, self.scale, layout)
            trace.index_losses.append(loss)
            trace.index_recall.append(recall)
        if state is not None:
            state.write_window(kv, layout)
        if trace is not None and entries is not None:
            trace.keep(f"{self.name}.entries", entries)
        return self._output(apply_rope(o, table.unsqueeze(-2), inverse=True))

    def _round(self, kv: Tensor) -> Tensor:
        if self.cfg.activation_rounding != "none":
            return round_kv_fp8(kv, self.cfg.nope_head_dim)
        return kv

    def _entries(self, x: Tensor, layout: Layout, state: LayerState | None) -> Tensor | None:
        """Compressed entries up to and including this call, [B, C, K]."""
        if self.compressor is None:
            return None
        new = self.compressor(x, layout, self.frequencies, None if state is None else state.pending)
        if new is not None:
            new = self._round(new)
        if state is None:
            return layout.gather(new, self.compressor.ratio)
        return state.append("entries", new, layout.entries(self.compressor.ratio))

    def _index(
        self, x: Tensor, latent: Tensor, layout: Layout, table: Tensor, state: LayerState | None, trace: Trace | None,
        visible: Visible,
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Visible]:  # fmt: skip
        """Run the indexer where needed: its (queries, weights, keys), and what attention may use."""
        if self.indexer is None or self.compressor is None:
            return None, visible
        plan = layout.entries(self.compressor.ratio)
        learns = trace is not None and trace.index_loss
        captures = trace is not None and bool(trace.capture)
        if captures and trace is not None and not plan.total:
            trace.keep(f"{self.name}.index_topk", x.new_empty(*x.shape[:2], 0, dtype=torch.int64))
        choice = plan.total > self.indexer.top_k and not (trace is not None and trace.dense)
        if state is None and not (choice or learns or captures):
            return None, visible
        x, latent = x.detach(), latent.detach()  # only its own loss trains the indexer
        keys = self.indexer.keys(x, layout, self.frequencies, state)
        if keys is None or not (choice or learns or captures):
            return None, visible
        q, weights = self.indexer.queries(x, latent, table)
        if choice or captures:
            picked = self._picked(q, weights, keys, visible, trace)
            visible = picked if choice else visible
            if trace is not None and picked.picks is not None:
                trace.keep(f"{self.name}.index_topk", picked.picks)
        if trace is not None:
            trace.keep(f"{self.name}.index_entries", keys)
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
        z = grouped_linear(o.reshape(b * s, groups, -1), self.wo_a.weight.view(groups, rank, -1))
        return self.wo_b(z.view(b, s, groups * rank))
