"""Adam for Engram's tables: five times the learning rate of the rest, no weight decay, and for large tables updates of
the rows that were read only.

A dense gradient updates every row as `torch.optim.Adam` would. A sparse one (its rows are what the step looked up)
updates those rows alone: others keep their moments and stand still, where Adam would let them drift on by their
momentum. Source: Engram paper (Adam, LR x 5, no decay); which of the two its authors used is not known.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rorqual.train.adamw import MOMENTS, moments_in
from rorqual.train.groups import Assigned

LR_SCALE = 5.0


class TableAdam:
    """The optimizer of parameters whose role is `table`. `step(lr)` takes the learning rate of everything AdamW trains;
    the factor stays through every schedule because it is applied here.
    """

    def __init__(
        self,
        parameters: Sequence[Assigned],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
        lr_scale: float = LR_SCALE,
    ) -> None:
        self.parameters = list(parameters)
        self.betas, self.eps, self.lr_scale = betas, eps, lr_scale
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update; a table without a gradient stands still."""
        self._steps += 1
        first, second = self.betas
        size = lr * self.lr_scale / (1 - first**self._steps)
        root = math.sqrt(1 - second**self._steps)
        for assigned in self.parameters:
            table, gradient = assigned.parameter, assigned.parameter.grad
            if gradient is None:
                continue
            mean, square = self._moments_of(assigned)
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                rows, values = gradient.indices()[0], gradient.values().float()
                m = mean.index_select(0, rows).lerp_(values, 1 - first)
                v = square.index_select(0, rows).mul_(second).addcmul_(values, values, value=1 - second)
                mean.index_copy_(0, rows, m)
                square.index_copy_(0, rows, v)
                update = m.mul_(-size).div_((v.sqrt_() / root).add_(self.eps))
                table.index_copy_(0, rows, table.index_select(0, rows) + update.to(table.dtype))
                continue
            values = gradient.float()
            mean.lerp_(values, 1 - first)
            square.mul_(second).addcmul_(values, values, value=1 - second)
            table.addcdiv_(mean, (square.sqrt() / root).add_(self.eps), value=-size)

    def gradients(self) -> list[Tensor]:
        """The numbers in the tables' gradients, to be measured and scaled in place."""
        found = [gradient_values(assigned.parameter) for assigned in self.parameters]
        return [values for values in found if values is not None]

    def _moments_of(self, assigned: Assigned) -> tuple[Tensor, Tensor]:
        if assigned.name not in self._moments:
            table = assigned.parameter.detach()
            first, second = (torch.zeros_like(table, dtype=torch.float32) for _ in MOMENTS)
            self._moments[assigned.name] = first, second
        return self._moments[assigned.name]

    def state_ranges(self) -> Iterator[tuple[str, int, Tensor]]:
        """(`NAME#exp_avg` or `NAME#exp_avg_sq`, first element, flat values), as `AdamW.state_ranges`."""
        for assigned in self.parameters:
            if self._steps:
                for key, values in zip(MOMENTS, self._moments_of(assigned), strict=True):
                    yield f"{assigned.name}#{key}", 0, values.view(-1)

    @property
    def num_steps(self) -> Tensor | None:
        """Steps done, float32 [1]; None before the first (and without parameters)."""
        return torch.tensor([float(self._steps)]) if self._steps and self.parameters else None

    def load_ranges(self, read: Callable[[str, int, int], Tensor], num_steps: Tensor) -> None:
        """Take over moments; `read(key, start, stop)` gives elements of `NAME#MOMENT`, flat."""
        self._steps = int(num_steps.item())
        for assigned in self.parameters:
            for key, moment in zip(MOMENTS, self._moments_of(assigned), strict=True):
                values = read(f"{assigned.name}#{key}", 0, moment.numel())
                moment.view(-1).copy_(values)

    def state_dict(self) -> dict[str, Tensor]:
        """Both moments as `NAME#exp_avg` and `NAME#exp_avg_sq`, and `#step`; empty before the first step."""
        if self.num_steps is None:
            return {}
        state = {"#step": self.num_steps}
        for assigned in self.parameters:
            for key, moment in zip(MOMENTS, self._moments_of(assigned), strict=True):
                state[f"{assigned.name}#{key}"] = moment.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over moments saved by `state_dict`.

        Raises: CheckpointError when a table is missing or has another shape.
        """
        self._moments, self._steps = {}, 0
        if state:
            self.load_ranges(moments_in(state, self.parameters), state["#step"])


def gradient_values(parameter: Tensor) -> Tensor | None:
    """The numbers in a parameter's gradient, to be measured and scaled in place: all of it, or a sparse one's rows.

    Different rows of a sparse gradient are different numbers of the dense one, so norms are the same.
    """
    gradient = parameter.grad
    if gradient is None or not gradient.is_sparse:
        return gradient
    if not gradient.is_coalesced():
        parameter.grad = gradient = gradient.coalesce()
    return gradient._values()
