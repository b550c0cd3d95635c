"""Tokens sorted by the experts they go to, as the C kernels of routed experts want them.

T tokens, A experts a token, E experts; R = T A rows, one for every (token, expert).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.ops.native.library import call


class Assignments(NamedTuple):
    """The rows of one call, in the order of their experts."""

    token: Tensor
    """Of which token a row is, int64 [R]."""
    choice: Tensor
    """Which of the T A choices it is, int64 [R]."""
    bounds: Tensor
    """Where each expert's rows begin, and the end, int64 [E + 1]."""
    slots: Tensor
    """The rows of each token, ascending, int64 [T, A]."""
    gate: Tensor
    """The routing weight of a row, fp32 [R]."""

    def combine(self, rows: Tensor) -> Tensor:
        """The sum of each token's rows in ascending expert id: [R, D] -> fp32 [T, D]."""
        (tokens, active), d = self.slots.shape, rows.shape[1]
        y = rows.new_empty(tokens, d, dtype=torch.float32)
        call("experts_combine", rows, self.slots, tokens, active, d, y)
        return y


def assign(experts: Tensor, weights: Tensor, num_experts: int) -> Assignments:
    """Sort choices int64 [T, A] and their weights [T, A] by expert."""
    tokens, active = experts.shape
    token, choice = (torch.empty(tokens * active, dtype=torch.int64) for _ in range(2))
    slots = torch.empty(tokens, active, dtype=torch.int64)
    bounds = torch.empty(num_experts + 1, dtype=torch.int64)
    call("experts_sort", experts.contiguous(), tokens, active, num_experts, token, choice, bounds, slots)
    return Assignments(token, choice, bounds, slots, weights.flatten()[choice].float())
