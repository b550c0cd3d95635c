"""Where the fused decode step finds what a sequence remembers: tables of addresses (`ops/native/decode_step.c`).

B batch rows, L layers.
"""

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rorqual.model.layer_state import LayerState
from rorqual.model.page_table import Paged
from rorqual.ops.native.decode_step import columns

if TYPE_CHECKING:
    from rorqual.model.state import State


class Addresses:
    """Tables of addresses: a copy would point at the original's tensors, so copies and pickles hold None."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Memory(Addresses):
    """The tables of one state, int64 [B, L, columns of `Memory`], and what they point at. `plan`: the model's."""

    def __init__(self, state: "State", plan: Any) -> None:
        self.plan = plan
        self._parts = [*_parts(state)]
        base = torch.tensor([[address for address, _ in memory_columns(layer)] for layer in state.layers])
        step = torch.tensor([[step for _, step in memory_columns(layer)] for layer in state.layers])
        self._rows = base + torch.arange(state.batch_size)[:, None, None] * step
        self.addresses = [row.data_ptr() for row in self._rows]
        """Of each row's table."""
        self.paged = [part for part in self._parts if isinstance(part, Paged)]

    def holds_for(self, state: "State", plan: Any) -> bool:
        """Whether the state's tensors are still those that this was made from."""
        return self.plan is plan and all(map(is_, self._parts, _parts(state)))


_parts_of_layer = attrgetter("window", "entries", "index_keys", "pending", "index_pending", "groups")


def _parts(state: "State") -> Iterator[Any]:
    """What a state's addresses depend on: tensors move only by being replaced, here or with the part that has them."""
    return chain.from_iterable(map(_parts_of_layer, state.layers))


def memory_columns(layer: LayerState) -> list[tuple[int, int]]:
    """A layer's columns for its first row, and how much each grows by with the row."""
    values: dict[str, tuple[int, int]] = {}

    def put(name: str, tensor: Tensor | Paged | None, size: str | None = None) -> None:
        if tensor is None:
            return
        tensor = tensor.pool if isinstance(tensor, Paged) else tensor
        values[name] = (tensor.data_ptr(), tensor.stride(0) * tensor.element_size() if tensor.shape[0] else 0)
        if size is not None:
            values[size] = (tensor.shape[1], 0)

    put("ring", layer.window, "ring_size")
    put("entries", layer.entries, "entry_rows")
    put("index_keys", layer.index_keys, "key_rows")
    for name, pending in (("blocks", layer.pending), ("index_blocks", layer.index_pending)):
        if pending is not None:
            put(f"{name}_kv", pending.kv, f"{name}_size")
            put(f"{name}_score", pending.score)
    if layer.groups is not None:
        put("group_order", layer.groups.groups.order)
        put("group_means", layer.groups.groups.means)
        put("group_fine", layer.groups.groups.fine)
    return [values.get(name, (0, 0)) for name in columns("Memory")]
