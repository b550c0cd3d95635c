"""Pooling of a block of tokens into one compressed entry.

Source: V4 report section 2.3; checkpoint behaviour.
B batch, C entries, M tokens a slot group, K entry width.
"""

import torch
from torch import Tensor


def pool(kv: Tensor, score: Tensor) -> Tensor:
    """Softmax over the slots, separately for every channel, then the weighted sum, in fp32.

    Shapes: kv and score [B, C, slots, K] -> fp32 [B, C, K]. A slot with score -inf has weight 0; at least one slot of
    every entry must be finite.
    """
    return (torch.softmax(score, dim=-2) * kv).sum(-2)
