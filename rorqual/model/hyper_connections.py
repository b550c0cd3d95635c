"""mHC as modules: the mix around a sublayer, and the head that collapses the streams.

Source: V4 report section 2.2 (manifold-constrained hyper-connections); numerics in `ops/hyper_connections.py`.
"""

import torch
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.ops import hyper_connections as ops


class HyperConnection:
    """The mix around one sublayer, over parameters `fn` [2N+N^2, N*D], `base` [2N+N^2], `scale` [3] (all fp32)."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.iters, self.hc_eps, self.norm_eps = cfg.hc_sinkhorn_iters, cfg.hc_eps, cfg.rms_norm_eps

    def pre(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Streams [B, S, N, D] -> the sublayer's input [B, S, D], post [B, S, N] and comb [B, S, N, N]."""
        return ops.hc_pre(streams, fn, base, scale, self.iters, self.norm_eps, self.hc_eps)

    @staticmethod
    def post(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """Mix the streams and add the sublayer's output: [B, S, N, D]."""
        return ops.hc_post(streams, y, post, comb)


def hc_parameters(cfg: ModelConfig) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Empty `fn`, `base`, `scale` of one sublayer, fp32."""
    rows = 2 * cfg.hc_mult + cfg.hc_mult**2
    return (
        nn.Parameter(torch.empty(rows, cfg.hc_mult * cfg.hidden_size, dtype=torch.float32)),
        nn.Parameter(torch.empty(rows, dtype=torch.float32)),
        nn.Parameter(torch.empty(3, dtype=torch.float32)),
    )


def hc_head_parameters(cfg: ModelConfig) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Empty `hc_head_fn` [N, N*D], `hc_head_base` [N], `hc_head_scale` [1], fp32."""
    return (
        nn.Parameter(torch.empty(cfg.hc_mult, cfg.hc_mult * cfg.hidden_size, dtype=torch.float32)),
        nn.Parameter(torch.empty(cfg.hc_mult, dtype=torch.float32)),
        nn.Parameter(torch.empty(1, dtype=torch.float32)),
    )


def hc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, cfg: ModelConfig) -> Tensor:
    """Collapse the streams before the final norm: [B, S, N, D] -> [B, S, D]. No Sinkhorn; weights need not sum to 1."""
    pre = torch.sigmoid(ops.mix_logits(streams, fn, cfg.rms_norm_eps) * scale.float() + base.float()) + cfg.hc_eps
    return ops.collapse(streams, pre)
