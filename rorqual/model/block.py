"""One layer: attention and MoE, each wrapped in a hyper-connection. Source: V4 report section 2."""

from torch import Tensor, nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.attention import Attention
from rorqual.model.hyper_connections import HyperConnection, hc_parameters
from rorqual.model.layout import Layout
from rorqual.model.linear import RMSNorm
from rorqual.model.moe import MoE
from rorqual.model.state import LayerState
from rorqual.model.trace import Trace


class Block(nn.Module):
    """Streams in, streams out. There is no plain residual addition; the mHC mix replaces it."""

    def __init__(self, cfg: ModelConfig, spec: LayerSpec, name: str) -> None:
        super().__init__()
        self.spec, self.name = spec, name
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
        state: LayerState | None,
        trace: Trace | None,
    ) -> Tensor:
        """Streams [B, S, N, D], input token ids [B, S], rope table of this kind of layer -> streams [B, S, N, D]."""
        x, post, comb = self.hc.pre(streams, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)
        y = self.attn(self.attn_norm(x), layout, table, state, trace)
        streams = self.hc.post(streams, y, post, comb)
        x, post, comb = self.hc.pre(streams, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale)
        z = self.ffn(self.ffn_norm(x), tokens, layout, trace)
        streams = self.hc.post(streams, z, post, comb)
        if trace is not None and trace.capture:
            for name, value in (("attn", y), ("ffn", z), ("streams", streams)):
                trace.keep(f"{self.name}.{name}", value)
        return streams
