"""Pooling of a block of tokens into one compressed entry.

Source: V4 report section 2.3; checkpoint behaviour.
B batch, C entries, M tokens a slot group, K entry width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.native import inference, infers


def pool(kv: Tensor, score: Tensor) -> Tensor:
    """Softmax over the slots, separately for every channel, then the weighted sum, in fp32.

    Shapes: kv and score [B, C, slots, K] -> fp32 [B, C, K]. A slot with score -inf has weight 0; at least one slot of
    every entry must be finite.
    """
    return (torch.softmax(score, dim=-2) * kv).sum(-2)


def pool_rows_reference(kv: Tensor, score: Tensor, index: Tensor, skip: Tensor) -> Tensor:
    """`pool` of slots that lie among other rows: fp32 kv and score [rows, K], index int64 [B, C, slots] -> [B, C, K].

    The first skip[b][c] slots of an entry do not count, int64 [B, C].
    """
    absent = torch.arange(index.shape[-1], device=index.device) < skip.unsqueeze(-1)
    scores = F.embedding(index, score).masked_fill(absent.unsqueeze(-1), float("-inf"))
    return pool(F.embedding(index, kv), scores)


def pool_rows(kv: Tensor, score: Tensor, index: Tensor, skip: Tensor) -> Tensor:
    """`pool_rows_reference`, by the fastest implementation at hand."""
    return registry.pick("pool_rows", kv)(kv, score, index, skip)


registry.register("pool_rows", "reference", pool_rows_reference)
registry.register("pool_rows", "native", inference.compress_pool, infers)
