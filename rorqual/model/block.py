"""One layer: attention and MoE, each wrapped in a hyper-connection. Source: V4 report section 2."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.attention import Attention
from rorqual.model.engram import Engram
from rorqual.model.health import watch_mix
from rorqual.model.hyper_connections import HyperConnection, hc_parameters
from rorqual.model.layer_state import LayerState, recalls
from rorqual.model.layout import Layout
from rorqual.model.linear import RMSNorm
from rorqual.model.moe import MoE
from rorqual.model.trace import Trace


class Block(nn.Module):
    """Streams in, streams out. There is no plain residual addition; the mHC mix replaces it."""

    def __init__(self, cfg: ModelConfig, spec: LayerSpec, name: str) -> None:
        super().__init__()
        self.spec, self.name = spec, name
        self.engram = Engram(cfg, spec, f"{name}.engram") if spec.engram else None
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attn = Attention(cfg, spec, f"{name}.attn")
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.ffn = MoE(cfg, spec, f"{name}.ffn")
        self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale = hc_parameters(cfg)
        self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale = hc_parameters(cfg)
        self.hc = HyperConnection(cfg)

    def forward(
        self,
        streams: Tensor,
        tokens: Tensor,
        layout: Layout,
        table: Tensor,
        state: LayerState | Sequence[LayerState] | None,
        trace: Trace | None,
    ) -> Tensor:
        """Streams [B, S, N, D], input token ids [B, S], rope table of this kind of layer -> streams [B, S, N, D].

        `state`: in a flat batch one for each segment.
        """
        if self.engram is not None:
            streams = self.engram(streams, tokens, layout, recalls(state), trace)
        x, post, comb = self.hc.pre(streams, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)
        self._watch("attn", post, comb, layout, trace)
        y = self.attn(self.attn_norm(x), layout, table, state, trace)
        streams = self.hc.post(streams, y, post, comb)
        x, post, comb = self.hc.pre(streams, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale)
        self._watch("ffn", post, comb, layout, trace)
        z = self.ffn(self.ffn_norm(x), tokens, layout, trace)
        streams = self.hc.post(streams, z, post, comb)
        if trace is not None and trace.capture:
            for name, value in (("attn", y), ("ffn", z), ("streams", streams)):
                trace.keep(f"{self.name}.{name}", value)
        return streams

    def _watch(
        self, sublayer: str, post: Tensor | None, comb: Tensor | None, layout: Layout, trace: Trace | None
    ) -> None:
        """Health figures of the mix around a sublayer, where they are asked for and there is a mix."""
        if trace is not None and trace.health and post is not None and comb is not None:
            name = f"{self.name}.{sublayer}"
            watch_mix(trace, name, post, comb, trace.probe(layout), is_trunk=not self.spec.is_mtp)


RunBlock = Callable[[Block, Tensor, Trace | None], Tensor]
"""Streams before a block -> streams after it, with all else of the call filled in."""


class Runner(Protocol):
    """A way to run consecutive blocks that keeps less for the backward pass than running one after the other."""

    def __call__(self, blocks: Sequence[Block], streams: Tensor, run: RunBlock, trace: Trace | None) -> Tensor:
        """Streams [B, S, N, D] before the first block -> streams after the last."""
