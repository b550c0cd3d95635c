"""Multi-token prediction: one more layer that predicts the token after next.

Row i combines the trunk's streams at position i with the embedding of token i + 1 and predicts token i + 2. Embedding
and head are the trunk's. Source: V4 report section 2 (as in V3), form of the checkpoint's code.
"""

import torch
from torch import Tensor

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.block import Block
from rorqual.model.hyper_connections import hc_head, hc_head_parameters
from rorqual.model.linear import Linear, RMSNorm


class MTPModule(Block):
    """A window-only layer with learned routing, plus projections of embedding and streams, own HC head and norm."""

    def __init__(self, cfg: ModelConfig, spec: LayerSpec, name: str) -> None:
        super().__init__(cfg, spec, name)
        self.cfg = cfg
        self.e_proj = Linear(cfg.hidden_size, cfg.hidden_size)
        self.h_proj = Linear(cfg.hidden_size, cfg.hidden_size)
        self.enorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = hc_head_parameters(cfg)

    def join(self, streams: Tensor, embedding: Tensor) -> Tensor:
        """What the layer reads, from trunk streams [B, S, N, D] and next tokens' embeddings [B, S, D]: [B, S, N, D]."""
        return self.e_proj(self.enorm(embedding)).unsqueeze(-2) + self.h_proj(self.hnorm(streams))

    def hidden(self, streams: Tensor) -> Tensor:
        """Collapse and norm, ready for the shared head: [B, S, N, D] -> [B, S, D]."""
        return self.norm(hc_head(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.cfg))


def next_tokens(tokens: Tensor) -> Tensor:
    """Token i + 1 for row i (the last row repeats its own token; mask it in losses): [B, S] -> [B, S]."""
    return torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)
