"""What a forward pass writes down on request: training statistics and intermediates.

Pass a `Trace` to the model to train its indexers and routers, or to look inside. Without one nothing is recorded.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class RouterRecord:
    """How one MoE layer spread this call's tokens."""

    layer: int
    name: str
    """Module path of the router, e.g. `layers.3.ffn.gate`."""
    counts: Tensor
    """Tokens sent to each expert, float [E], no gradient."""
    balance_loss: Tensor | None
    """Sequence-wise balance loss, None for hash layers."""
    is_hash: bool


@dataclass
class Trace:
    """A record of one forward call.

    `dense`: CSA attends to all visible entries instead of the indexer's picks (the dense training stage).
    `index_loss`: compute the indexer's KL loss, one scalar per CSA layer. `router`: keep router statistics.
    `capture`: names of intermediates to keep, e.g. `layers.1.attn` (attention output), `layers.1.ffn` (MoE output),
    `layers.1.streams`, `layers.1.attn.entries`, `layers.1.attn.index_entries`, `layers.1.attn.index_topk`;
    `"*"` keeps all.
    """

    dense: bool = False
    index_loss: bool = False
    router: bool = False
    capture: Collection[str] = ()
    index_losses: list[Tensor] = field(default_factory=list)
    index_recall: list[Tensor] = field(default_factory=list)
    """Share of the attention mass on entries that the indexer's top-k catches, mean over queries with a real choice."""
    routers: list[RouterRecord] = field(default_factory=list)
    captured: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, value: Tensor) -> None:
        """Store an intermediate if it was asked for."""
        if name in self.capture or "*" in self.capture:
            self.captured[name] = value.detach()
