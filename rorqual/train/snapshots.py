"""A good state of the run kept in memory: the copy of everything later steps depend on, to go back to after a spike.

Every rank copies what it holds (its experts, its part of the optimizers), so a state fits the same ranks only; other
ranks read checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.train.checkpoints import Progress

Ranges = dict[tuple[str, int], Tensor]
"""Optimizer state by (key, first element), flat."""


@dataclass(frozen=True)
class Snapshot:
    """One state, in the host's memory."""

    progress: Progress
    feed: dict[str, Any]
    torch_rng: Tensor
    weights: dict[str, Tensor]
    optimizers: dict[str, tuple[Ranges, Any]]
    """By attribute of the executor: its ranges, and its step count where it has one."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        tensors = [*self.weights.values(), *(t for ranges, _ in self.optimizers.values() for t in ranges.values())]
        return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def take(model: nn.Module, optimizers: dict[str, Any], feed: dict[str, Any], progress: Progress) -> Snapshot:
    """Copy a state. `optimizers` have `state_ranges` and `load_ranges` (`muon.py`, `adamw.py`, `table_adam.py`)."""
    return Snapshot(
        progress,
        feed,
        torch.get_rng_state(),
        {name: _copy(tensor) for name, tensor in model.state_dict().items()},
        {
            name: (
                {(key, start): _copy(values) for key, start, values in optimizer.state_ranges()},
                getattr(optimizer, "num_steps", None),
            )
            for name, optimizer in optimizers.items()
        },
    )


@torch.no_grad()
def put_back(snapshot: Snapshot, model: nn.Module, optimizers: dict[str, Any]) -> None:
    """Weights and optimizer state as they were; the caller sets data position and counters."""
    model.load_state_dict(snapshot.weights, strict=True)
    for name, optimizer in optimizers.items():
        ranges, num_steps = snapshot.optimizers[name]
        if not hasattr(optimizer, "num_steps"):
            optimizer.load_ranges(_reader(ranges))
        elif num_steps is None:  # before the first step there is no state
            optimizer.load_state_dict({})
        else:
            optimizer.load_ranges(_reader(ranges), num_steps)
    torch.set_rng_state(snapshot.torch_rng)


def _reader(ranges: Ranges) -> Callable[[str, int, int], Tensor]:
    def read(key: str, start: int, stop: int) -> Tensor:
        values = ranges[key, start]
        assert values.numel() == stop - start
        return values

    return read


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
