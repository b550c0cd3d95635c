"""What a layer's memory keeps for the grouped index search: the groups of its complete segments of index keys.

They are made from the keys when a step needs them, and follow from nothing else: a state that is copied, restored or
put on pages makes them again, and one that is cut back forgets those of keys it dropped. Snapshots and pages do not
hold them. Where to switch the search on: `ModelConfig.index_search`.

B batch rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.model.page_table import Paged
from rorqual.ops.index_groups import SEGMENT, Groups, make_groups, room_for
from rorqual.ops.index_scan import IndexKeys

if TYPE_CHECKING:
    from rorqual.model.layer_state import LayerState
    from rorqual.model.state import State


class IndexGroups:
    """Groups of one layer's keys. `groups` has the batch in front; it moves only with a new object."""

    def __init__(self, groups: Groups, made: Sequence[int]) -> None:
        self.groups, self.made = groups, list(made)
        """`made`: of each row, how many of its segments are there."""

    @property
    def capacity(self) -> int:
        """Segments of a row that there is room for."""
        return int(self.groups.order.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.groups)

    def row(self, row: int) -> Groups:
        """Those of one row."""
        return Groups(*(part[row] for part in self.groups))

    def cut(self, entries: Sequence[int]) -> None:
        """Forget what was made of keys behind so many entries a row."""
        self.made = [min(made, count // SEGMENT) for made, count in zip(self.made, entries, strict=True)]


def search_index_by(model: nn.Module, index_search: str) -> None:
    """Make `model` compute with `ModelConfig.index_search`. States and prefix caches made before are of no use then.

    Raises: ConfigError for another word.
    """
    from rorqual.model import decode

    decode.forget(model)
    for module in model.modules():
        cfg = getattr(module, "cfg", None)
        if isinstance(cfg, ModelConfig):
            module.__dict__["cfg"] = cfg.replace(index_search=index_search)


def bring_up_to_date(state: "State") -> None:
    """Make the groups of all segments that are complete; called before a step of the fused code."""
    longest = max(state.lengths)
    for layer, spec in zip(state.layers, state.model.cfg.layers, strict=True):
        if not spec.has_indexer or longest // spec.compress_ratio < SEGMENT:
            continue
        counts = [length // spec.compress_ratio // SEGMENT for length in state.lengths]
        groups = _with_room(layer, state, max(counts))
        for row, count in enumerate(counts):
            if groups.made[row] < count:
                make_groups(_keys(layer, row, state.model.cfg), groups.row(row), groups.made[row], count)
                groups.made[row] = count


def _keys(layer: "LayerState", row: int, cfg: ModelConfig) -> IndexKeys:
    keys = layer.index_keys
    if isinstance(keys, Paged):
        return IndexKeys(keys.pool, cfg.index_head_dim, keys.table)
    assert isinstance(keys, Tensor)
    return IndexKeys(keys[row], cfg.index_head_dim)


def _with_room(layer: "LayerState", state: "State", segments: int) -> IndexGroups:
    """The layer's groups, with room for so many segments."""
    old, batch = layer.groups, state.batch_size
    if old is not None and segments <= old.capacity:
        return old
    room = max(segments, 4, 0 if old is None else 2 * old.capacity)
    with torch.inference_mode(False):
        flat = room_for(batch * room, state.model.cfg.index_head_dim, state.tokens.device)
        groups = Groups(*(part.unflatten(0, (batch, room)) for part in flat))
    if old is not None:
        for mine, theirs in zip(groups, old.groups, strict=True):
            mine[:, : old.capacity] = theirs
    layer.groups = IndexGroups(groups, [0] * batch if old is None else old.made)
    return layer.groups
