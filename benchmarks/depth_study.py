"""What a deep stack does to signals and gradients: measured on one network, before and after training.

For every layer of the trunk, on held-out text:

    signal     root mean square of the residual streams after the layer, over that of the embeddings
    gradient   norm of the loss's gradient at those streams, over that at the last layer's
    weights    norm of the loss's gradient at the layer's own weights
    forward    amplification of the composed residual mix up to here: the largest absolute row sum of the product of all
               B = comb^T so far, per token (1 for a plain residual path); mean and largest over tokens
    backward   the same with column sums

Source of the composed mix and its two gains: the mHC paper. The sublayers' own contribution is in `signal` and
`gradient` only.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.model import Transformer
from rorqual.model.block import Block
from rorqual.model.hyper_connections import HyperConnection
from rorqual.train import losses
from rorqual.train.feed import Rows


class _Watched(HyperConnection):
    """A residual mix that tells the coefficients it mixes with."""

    def __init__(self, inner: HyperConnection, tell: Callable[[Tensor | None], None]) -> None:
        self.__dict__.update(inner.__dict__)
        self._inner, self._tell = inner, tell

    def pre(
        self, streams: Tensor, fn: Tensor | None, base: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, post, comb = self._inner.pre(streams, fn, base, scale)
        self._tell(comb)
        return x, post, comb


class Mixes:
    """Composes a model's residual mixes during one forward pass, without gradients."""

    def __init__(self, model: Transformer) -> None:
        self.by_layer: list[tuple[Tensor, Tensor]] = []
        """Forward and backward gain per token after each layer."""
        self._composed: Tensor | None = None
        for layer in model.layers:
            assert isinstance(layer, Block)
            layer.hc = _Watched(layer.hc, self._after_mix)
            layer.register_forward_hook(self._after_layer)

    def _after_mix(self, comb: Tensor | None) -> None:
        if comb is not None:
            mix = comb.detach().flatten(0, 1).transpose(1, 2).double()
            self._composed = mix if self._composed is None else mix @ self._composed

    def _after_layer(self, *_: Any) -> None:
        size = torch.ones(1, 1, 1) if self._composed is None else self._composed.abs()
        self.by_layer.append((size.sum(2).amax(1), size.sum(1).amax(1)))


def probe(model: Transformer, rows: Rows) -> dict[str, Any]:
    """The figures of the module's text for `model` on `rows`, and the loss; the model is used up (hooks stay)."""
    model.train()
    model.zero_grad(set_to_none=True)
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, streams: Tensor) -> None:
        streams.retain_grad()
        kept.append(streams)

    for layer in model.layers:
        layer.register_forward_hook(keep)
    mixes = Mixes(model)
    streams = model.forward_streams(rows.tokens, segment_ids=rows.segment_ids, lengths=rows.lengths)
    logits = model.logits(model.final_hidden(streams))
    loss = F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten(), ignore_index=losses.IGNORE)
    loss.backward()
    start = model.embed.weight.detach()[rows.tokens].square().mean().sqrt()
    gradients = [float(s.grad.norm()) for s in kept if s.grad is not None]
    weights = [
        sum(float(p.grad.square().sum()) for p in layer.parameters() if p.grad is not None) ** 0.5
        for layer in model.layers
    ]
    return {
        "loss": loss.item(),
        "signal": [float(s.detach().square().mean().sqrt() / start) for s in kept],
        "gradient": [g / gradients[-1] for g in gradients],
        "weights": weights,
        "forward": [float(f.mean()) for f, _ in mixes.by_layer],
        "forward_largest": [float(f.max()) for f, _ in mixes.by_layer],
        "backward": [float(b.mean()) for _, b in mixes.by_layer],
        "backward_largest": [float(b.max()) for _, b in mixes.by_layer],
    }
