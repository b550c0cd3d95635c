"""The residual path as modules: the mix around a sublayer, and the head that collapses the streams.

Three kinds, by `ModelConfig.residual`: `mhc` is V4's (V4 report section 2.2, manifold-constrained hyper-connections);
`hc` has the same coefficients without their bounds and `plain` is one stream and x + f(x), both for comparison.
Numerics in `ops/hyper_connections.py`.

B batch, S tokens, N streams, D hidden, M = 2N + N^2 coefficients.
"""

import torch
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.ops import hyper_connections as ops

Parameters = tuple[nn.Parameter | None, nn.Parameter | None, nn.Parameter | None]
"""`fn`, `base` and `scale` of one mix; none of them where the residual path has no parameters."""

NO_PARAMETERS: Parameters = (None, None, None)


class HyperConnection:
    """The mix around one sublayer, over parameters `fn`, `base` [M], `scale` [3] (all fp32).

    `fn` is [M, N*D] for mhc and [N + 2, D] for hc. With a plain residual path the parameters and coefficients are None.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        self.residual = cfg.residual
        self.iters, self.hc_eps, self.norm_eps = cfg.hc_sinkhorn_iters, cfg.hc_eps, cfg.rms_norm_eps

    def pre(
        self, streams: Tensor, fn: Tensor | None, base: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Streams [B, S, N, D] -> the sublayer's input [B, S, D], post [B, S, N] and comb [B, S, N, N]."""
        if fn is None or base is None or scale is None:
            return streams.squeeze(-2), None, None
        if self.residual == "hc":
            return ops.free_pre(streams, fn, base, scale, self.norm_eps)
        return ops.hc_pre(streams, fn, base, scale, self.iters, self.norm_eps, self.hc_eps)

    def post(self, streams: Tensor, y: Tensor, post: Tensor | None, comb: Tensor | None) -> Tensor:
        """Mix the streams and add the sublayer's output: [B, S, N, D]."""
        if post is None or comb is None:
            return streams + y.unsqueeze(-2)
        return ops.hc_post(streams, y, post, comb)


def hc_parameters(cfg: ModelConfig) -> Parameters:
    """Empty `fn`, `base`, `scale` of one sublayer, fp32; none with a plain residual path."""
    if cfg.residual == "plain":
        return NO_PARAMETERS
    n = cfg.hc_mult
    rows = 2 * n + n**2
    fn = (n + 2, cfg.hidden_size) if cfg.residual == "hc" else (rows, n * cfg.hidden_size)
    return _empty(fn), _empty((rows,)), _empty((3,))


def hc_head_parameters(cfg: ModelConfig) -> Parameters:
    """Empty `hc_head_fn` [N, N*D], `hc_head_base` [N], `hc_head_scale` [1], fp32; none unless the residual is mhc."""
    if cfg.residual != "mhc":
        return NO_PARAMETERS
    return _empty((cfg.hc_mult, cfg.hc_mult * cfg.hidden_size)), _empty((cfg.hc_mult,)), _empty((1,))


def hc_head(streams: Tensor, fn: Tensor | None, base: Tensor | None, scale: Tensor | None, cfg: ModelConfig) -> Tensor:
    """Collapse the streams before the final norm: [B, S, N, D] -> [B, S, D].

    mhc weighs them without Sinkhorn (weights need not sum to 1). hc takes their mean: its paper sums, which the norm
    that follows makes the same.
    """
    if fn is None or base is None or scale is None:
        return streams.squeeze(-2) if streams.shape[-2] == 1 else streams.float().mean(-2).to(streams.dtype)
    return ops.hc_head(streams, fn, base, scale, cfg.rms_norm_eps, cfg.hc_eps)


def _empty(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))
