"""Compressor: turns the hidden states of a block of m tokens into one cache entry.

CSA (m = 4) pools two blocks, the previous one through the first half of its channels and the current one through the
second half; HCA pools its own block only. Source: V4 report section 2.3.

B batch, S tokens, D hidden, E entries completed in this call, K entry width.
"""

import torch
from torch import Tensor, nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.errors import RequestError
from rorqual.model.layer_state import Pending
from rorqual.model.layout import EntryPlan, Layout
from rorqual.model.linear import Linear, RMSNorm
from rorqual.ops.compress import pool_rows
from rorqual.ops.rope import norm_rope, rope_table


def cover(spec: LayerSpec, begin: int, end: int, length: int) -> tuple[int, int]:
    """Entries [first, last) of a layer whose pooling window holds one of tokens [begin, end), of those at `length`.

    With overlap an entry pools its own block and the one before, so a token has two entries. Raises: RequestError for a
    layer without entries, or an empty span.
    """
    ratio = spec.compress_ratio
    if not ratio or not 0 <= begin < end:
        raise RequestError(
            f"Asked which entries of layer {spec.index} cover tokens {begin} to {end}: "
            + ("it has none. Ask about a compressed layer." if not ratio else "the span is empty or negative.")
        )
    last = (end - 1) // ratio + (2 if spec.overlap else 1)
    return min(begin // ratio, length // ratio), min(last, length // ratio)


class Compressor(nn.Module):
    """Pools blocks of `ratio` tokens into entries of width `width`; fp32 throughout, as in the checkpoint."""

    def __init__(self, cfg: ModelConfig, spec: LayerSpec, width: int) -> None:
        super().__init__()
        self.ratio, self.overlap, self.width = spec.compress_ratio, spec.overlap, width
        channels = width * (2 if self.overlap else 1)
        self.wkv = Linear(cfg.hidden_size, channels)
        self.wgate = Linear(cfg.hidden_size, channels)
        self.ape = nn.Parameter(torch.empty(self.ratio, channels, dtype=torch.float32))
        self.norm = RMSNorm(width, cfg.rms_norm_eps)

    def project(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Values and slot scores of every token, whatever sequence it is of: x [B, S, D] -> fp32 [B, S, channels]."""
        one = layout.num_tokens == 1 and layout.same_start
        at = layout.start[0] % self.ratio if one else layout.positions % self.ratio
        return self.wkv.exact(x), self.wgate.exact(x) + self.ape[at]

    def forward(
        self,
        projected: tuple[Tensor, Tensor],
        layout: Layout,
        frequencies: Tensor,
        dtype: torch.dtype,
        pending: Pending | None = None,
    ) -> Tensor | None:
        """Entries that this call completes, after norm and rope: from `project` -> [B, E, K], None when E is 0.

        With `pending` the open block of earlier calls takes part, and this call's tokens are remembered there.
        """
        kv, score = projected
        plan = layout.entries(self.ratio)
        entries = None
        if plan.count:
            past = self._past(kv, score, layout, pending)
            index = self._slots(plan, layout, past, pending is not None)
            rows = self._rows(kv, past and past[0]), self._rows(score, past and past[1])
            pooled = pool_rows(*rows, index, self._skip(plan).expand(index.shape[:2]))
            entries = norm_rope(pooled.to(dtype), self.norm.weight, self.norm.eps, rope_table(plan.first, frequencies))
        if pending is not None:
            pending.write(kv, score, layout)
        return entries

    def _past(self, kv: Tensor, score: Tensor, layout: Layout, pending: Pending | None) -> tuple[Tensor, Tensor] | None:
        """Projections from before this call: the ring of earlier calls, or what other parts of the row hold."""
        if pending is not None:
            return pending.kv, pending.score
        if layout.is_part:
            count = self.ratio * (2 if self.overlap else 1) - 1
            before = layout.halo(torch.cat([kv, score], -1), count)
            return before[..., : kv.shape[-1]], before[..., kv.shape[-1] :]
        return None

    def _slots(self, plan: EntryPlan, layout: Layout, past: tuple[Tensor, Tensor] | None, ring: bool) -> Tensor:
        """Where each entry's slots lie, as rows of [past ; this call] (halves apart for CSA): int64 [B, E, slots]."""
        offset = torch.arange(self.ratio, device=layout.device) - (self.ratio - 1)
        token = plan.ends.unsqueeze(-1) + offset  # index within this call; negative: before it
        if self.overlap:
            token = torch.cat([token - self.ratio, token], -1)
        size = 0 if past is None else past[0].shape[1]
        if ring:
            start = torch.tensor(layout.start, device=layout.device)[:, None, None]
            index = torch.where(token >= 0, token + size, (token + start) % size)
        else:
            index = (token + size).clamp_min(0)
        rows = torch.arange(layout.batch_size, device=layout.device)[:, None, None]
        index = index + rows * (size + layout.num_tokens)
        if self.overlap:  # view a token's two halves as rows 2i and 2i + 1
            half = torch.arange(2 * self.ratio, device=layout.device) // self.ratio
            index = index * 2 + half
        return index

    def _rows(self, values: Tensor, past: Tensor | None) -> Tensor:
        """[B, S, channels] (and what was before) as rows of the width that `_slots` counts: [any, K]."""
        source = values if past is None else torch.cat([past, values], 1)
        return source.reshape(-1, self.width)

    def _skip(self, plan: EntryPlan) -> Tensor:
        """Slots of each entry that do not count, those of the previous block where there is none: int64 [B or 1, E]."""
        if not self.overlap:
            return torch.zeros_like(plan.first)
        return torch.where(plan.has_previous, 0, self.ratio)
