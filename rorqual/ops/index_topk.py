"""Lightning indexer: scores of compressed entries and the choice of the best.

Source: V4 report section 2.3.1; checkpoint behaviour.
B batch, T query tokens, J index heads, K index width, C entries.
"""

import torch
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.native import functions, usable_typed


def reduce_heads_reference(dots: Tensor, weights: Tensor) -> Tensor:
    """sum_j w_j relu(dots_j): dots fp32 [B, T, J, C], weights fp32 [B, T, J] -> [B, T, C]."""
    return (weights.unsqueeze(-2) @ dots.float().relu()).squeeze(-2)


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """I(t, i) = sum_j w_j relu(q_j . k_i): q [B, T, J, K], weights [B, T, J], keys [B, C, K] -> fp32 [B, T, C].

    The scale constants are already in `weights`.
    """
    b, t, j, k = q.shape
    dots = (q.reshape(b, t * j, k) @ keys.transpose(-1, -2)).view(b, t, j, -1)
    return registry.pick("index_reduce", dots)(dots, weights.float())


registry.register("index_reduce", "reference", reduce_heads_reference)
registry.register("index_reduce", "native", functions.index_reduce, usable_typed)


def select_entries(scores: Tensor, top_k: int) -> Tensor:
    """The `top_k` best entries per query, lowest index first among equals; -inf marks an invisible entry.

    Shapes: scores [B, T, C] -> int64 [B, T, min(top_k, C)] in ascending order of index, -1 for an empty place.
    The tie rule matters: relu makes many scores exactly zero, and a plain top-k resolves ties by tensor layout, so
    cached and uncached runs would attend to different entries.
    """
    num_entries = scores.shape[-1]
    k = min(top_k, num_entries)
    index = torch.arange(num_entries, device=scores.device)
    visible = scores > float("-inf")
    if k == num_entries:
        return torch.where(visible, index, -1)
    threshold = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = scores > threshold
    equal = (scores == threshold) & visible
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    place = torch.where(chosen, chosen.cumsum(-1) - 1, k)  # k is a spare place for what was not chosen
    picks = torch.full((*scores.shape[:-1], k + 1), -1, dtype=torch.int64, device=scores.device)
    picks.scatter_(-1, place, index.expand(scores.shape))
    return picks[..., :k]
