"""What a forward pass writes down on request (training statistics, intermediates), and the routing it is told to use.

Pass a `Trace` to the model to train its indexers and routers, or to look inside. Without one nothing is recorded.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.errors import RequestError
from rorqual.model.layout import Layout
from rorqual.ops.sparse_attention import Visible

PROBE_TOKENS = 256
"""Tokens of a call that health figures are taken from."""


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
    experts: Tensor | None = None
    """Ids of the experts used, int64 [B, S, A], with `Trace.router_ids`."""


class Swappable(NamedTuple):
    """What a swap is told of a CSA layer's call: attention queries [1, T, H, K], entries [1, C, K], what is visible,
    what would be used int64 [T, k], the scale of the scores, and the place of the first query.
    """

    q: Tensor
    entries: Tensor
    visible: Visible
    used: Tensor
    scale: float
    first: int


Swap = Callable[[Swappable], Visible]
"""What the queries attend to instead."""


@dataclass
class Trace:
    """A record of one forward call.

    `dense`: CSA attends to all visible entries instead of the indexer's picks (the dense training stage).
    `index_loss`: compute the indexer's KL loss, one scalar per CSA layer. `router`: keep router statistics, and with
    `router_ids` the experts used. `forced`: the experts that learned routers must use instead of selecting them (see
    `forced_experts`). `health`: keep the figures of `model/health.py`, taken from a sample of the call's tokens.
    `capture`: names of intermediates to keep, e.g. `layers.1.attn` (attention output), `layers.1.ffn` (MoE output),
    `layers.1.streams`, `layers.1.attn.q`, `layers.1.attn.keys` (of the window), `layers.1.attn.entries`,
    `layers.1.attn.index_q`, `layers.1.attn.index_weights`, `layers.1.attn.index_entries`, `layers.1.attn.index_topk`
    (the indexer's own choice), `layers.1.attn.index_used` (with what a guard adds); `"*"` keeps all.
    """

    dense: bool = False
    index_loss: bool = False
    router: bool = False
    router_ids: bool = False
    forced: Mapping[str, Tensor] | None = None
    """Integer ids [B, S, A] by the router's module path, for every learned router of the call."""
    health: bool = False
    capture: Collection[str] = ()
    index_losses: list[Tensor] = field(default_factory=list)
    index_recall: list[Tensor] = field(default_factory=list)
    """Share of the attention mass on entries that the indexer's top-k catches, mean over queries with a real choice."""
    routers: list[RouterRecord] = field(default_factory=list)
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Health figures by name (`mix_diagonal/layers.3.attn`), each [sum, count, largest]."""
    composite: Tensor | None = None
    """Product of the residual mixes so far at the probed tokens, [P, N, N]."""
    captured: dict[str, Tensor] = field(default_factory=dict)
    picks: dict[str, Tensor] | None = None
    """Entries that indexers picked, int64 [B, S, k] by the attention's module path: what stands here is used, what does
    not is added (a block that is computed again must pick the same). None: neither."""
    swaps: Mapping[str, Swap] | None = None
    """By the attention's module path, what takes the place of the entries it would use where there is a choice; for
    calls of one row."""
    _probe: Tensor | None = None

    def keep(self, name: str, value: Tensor) -> None:
        """Store an intermediate if it was asked for."""
        if name in self.capture or "*" in self.capture:
            self.captured[name] = value.detach()

    def probe(self, layout: Layout) -> Tensor:
        """Indices into the flattened [B * S] tokens, int64 [P]: evenly spread, padding left out, the same in all
        layers.
        """
        if self._probe is None:
            count = layout.batch_size * layout.num_tokens
            tokens = torch.arange(count, device=layout.device)
            if layout.valid is not None:
                tokens = tokens[layout.valid.flatten()]
            self._probe = tokens[:: max(1, -(-len(tokens) // PROBE_TOKENS))]
        return self._probe

    def forced_experts(self, name: str, shape: tuple[int, int, int], num_experts: int) -> Tensor | None:
        """The ids that router `name` must use, int64 [B * S, A] on the CPU or where they were given; None where it
        selects.

        `shape` is [B, S, A] of this call. Stale and live layers are never mixed: with `forced` every learned router
        needs an entry (hash layers read the token's table and are not asked).
        Raises: RequestError for an absent entry, another shape, or ids that are no experts.
        """
        if self.forced is None:
            return None
        ids = self.forced.get(name)
        if ids is None:
            raise RequestError(
                f"Trace.forced has no experts for the router {name}, only for {', '.join(self.forced) or 'none'}. "
                "Forced and live routing cannot be mixed in one pass. Give ids for every learned router (MTP's too), "
                "as a pass with Trace(router=True, router_ids=True) records them."
            )
        if tuple(ids.shape) != shape or ids.is_floating_point():
            raise RequestError(
                f"Trace.forced[{name!r}] has shape {tuple(ids.shape)} and dtype {ids.dtype}, but this call needs whole "
                f"numbers {shape}: rows, tokens, experts per token. Record the ids with the same rows and model."
            )
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
            raise RequestError(
                f"Trace.forced[{name!r}] holds ids from {int(ids.min())} to {int(ids.max())}, but the layer has "
                f"{num_experts} experts from 0. The ids belong to another model; record them with this one."
            )
        return ids.flatten(0, 1).long()
