"""The indexer's own loss: how far its scores are from the attention that the entries receive.

Source: V3.2 report (the objective of the lightning indexer); V4 report section 2.3.1 keeps the indexer.
B batch, T queries, J index heads, K index width, C entries, H attention heads, A attention width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rorqual.ops import registry
from rorqual.ops.index_topk import index_scores, select_entries
from rorqual.ops.native import fused, usable_typed
from rorqual.ops.sparse_attention import BLOCK_BUDGET, Visible, entry_mass


def query_blocks(batch_size: int, num_tokens: int, per_token: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose scores (`per_token` elements a query and row) fit the budget."""
    step = max(1, BLOCK_BUDGET // max(1, batch_size * per_token))
    for lo in range(0, num_tokens, step):
        yield lo, min(num_tokens, lo + step)


def index_loss_reference(
    index_q: Tensor, weights: Tensor, keys: Tensor, visible: Visible, every: Visible, q: Tensor, lse: Tensor,
    entries: Tensor, scale: float, valid: Tensor | None, top_k: int,
) -> Tensor:  # fmt: skip
    """Sums over all queries, fp32 [4]: KL(attention mass on the used entries ‖ softmax of their index scores); queries
    that see any; recall of the top k among `every`, as a share of mass; queries that recall was taken over.

    Shapes: index_q [B, T, J, K], weights [B, T, J], keys [B, C, K]; the attention's q [B, T, H, A], lse [B, T, H] and
    entries [B, C, A], taken as constants; `valid` bool [B, T] (None: all) leaves queries out. `visible` is what the
    attention used, `every` what it could have used. Only the first sum has a gradient: of index_q, weights and keys.
    """
    q, lse, entries = q.detach(), lse.detach(), entries.detach()
    blocks = list(query_blocks(q.shape[0], q.shape[1], index_q.shape[2] * max(1, keys.shape[1])))

    def block(index_q: Tensor, weights: Tensor, keys: Tensor, lo: int, hi: int) -> Tensor:
        mask = visible.mask(lo, hi, keys.shape[1])
        possible = every.mask(lo, hi, keys.shape[1])
        scores = index_scores(index_q[:, lo:hi], weights[:, lo:hi], keys)
        with torch.no_grad():
            mass = entry_mass(q[:, lo:hi], lse[:, lo:hi], entries, possible, scale)
            if valid is not None:
                mass = mass.masked_fill(~valid[:, lo:hi, None], 0)
            recall = _recall(scores, mass, possible, top_k)
            mass = mass if mask is None else mass.masked_fill(~mask, 0)
            target = mass / mass.sum(-1, keepdim=True).clamp_min(1e-20)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e30)
        log_ratio = target.clamp_min(1e-20).log() - scores.log_softmax(-1)
        seen = mass.sum(-1) > 0
        return torch.stack([(target * log_ratio).sum(), seen.sum().float(), *recall])

    parts = []
    for lo, hi in blocks:
        if len(blocks) > 1 and torch.is_grad_enabled():
            parts.append(checkpoint(block, index_q, weights, keys, lo, hi, use_reentrant=False))
        else:
            parts.append(block(index_q, weights, keys, lo, hi))
    return torch.stack(parts).sum(0)


def _recall(scores: Tensor, mass: Tensor, possible: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """Summed recall of the top k and the number of queries it was taken over."""
    if scores.shape[-1] <= top_k:
        return scores.new_zeros(()), scores.new_zeros(())
    if possible is not None:
        scores = scores.masked_fill(~possible, float("-inf"))
    picks = select_entries(scores, top_k)
    caught = mass.gather(-1, picks.clamp_min(0)).masked_fill(picks < 0, 0).sum(-1) / mass.sum(-1).clamp_min(1e-20)
    if possible is None:
        return caught.sum(), torch.tensor(float(caught.numel()), device=caught.device)
    choice = (possible.sum(-1) > top_k) & (mass.sum(-1) > 0)
    return caught.masked_fill(~choice, 0).sum(), choice.sum().float()


def index_loss(
    index_q: Tensor, weights: Tensor, keys: Tensor, visible: Visible, every: Visible, q: Tensor, lse: Tensor,
    entries: Tensor, scale: float, valid: Tensor | None, top_k: int,
) -> Tensor:  # fmt: skip
    """`index_loss_reference`, by the fastest implementation at hand."""
    fits = index_q.dtype is keys.dtype is q.dtype is entries.dtype and index_q.shape[-1] % 16 == 0 == q.shape[-1] % 2
    run = registry.pick("index_loss", index_q) if fits else index_loss_reference
    return run(index_q, weights, keys, visible, every, q, lse, entries, scale, valid, top_k)


def _native(
    index_q: Tensor, weights: Tensor, keys: Tensor, visible: Visible, every: Visible, q: Tensor, lse: Tensor,
    entries: Tensor, scale: float, valid: Tensor | None, top_k: int,
) -> Tensor:  # fmt: skip
    return fused.IndexLoss.apply(
        index_q, weights.float(), keys, q.detach(), lse.detach(), entries.detach(), every.start, every.end,
        visible.picks, valid, top_k, scale,
    )  # fmt: skip


registry.register("index_loss", "reference", index_loss_reference)
registry.register("index_loss", "native", _native, usable_typed)
