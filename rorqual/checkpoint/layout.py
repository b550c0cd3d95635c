"""How our tensors lie in a file: which file tensor holds which part of which parameter.

Loading and saving both follow the same list of `FileTensor`s, so a layout that can be written can be read.
Names here are official ones (or the fused-expert form of `names.to_official`); shapes are the stored shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.checkpoint.names import DOWN, GATE_UP, expert_name, split_stacked

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Where a piece of a file tensor belongs: in parameter `ours`, in one `expert` of it or in all of it.

    `rows`: the piece is this range of the file tensor's second axis (fused experts); None: all of it.
    """

    ours: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class FileTensor:
    """One tensor as stored: name, shape, and the parts of our parameters that it holds, in order."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]


def file_tensors(shapes: Mapping[str, Shape], is_fused: Callable[[str], bool]) -> list[FileTensor]:
    """The stored tensors of a model whose own have these `shapes` (our name -> shape), in model order.

    `is_fused` says of a stack such as `layers.3.ffn.experts` whether the file holds two fused tensors,
    [E, 2I, D] and [E, D, I] (transformers), or one tensor per expert and matrix (official).
    """
    out: list[FileTensor] = []
    for ours, shape in shapes.items():
        stacked = split_stacked(ours)
        if stacked is None:
            out.append(FileTensor(ours, shape, (Part(ours),)))
            continue
        stack, matrix = stacked
        if not is_fused(stack):
            for e in range(shape[0]):
                out.append(FileTensor(expert_name(stack, e, matrix), shape[1:], (Part(ours, expert=e),)))
        elif matrix == "w2":
            out.append(FileTensor(f"{stack}.{DOWN}", shape, (Part(ours),)))
        elif matrix == "w1":
            experts, width, hidden = shape
            parts = (Part(ours, rows=(0, width)), Part(f"{stack}.w3", rows=(width, 2 * width)))
            out.append(FileTensor(f"{stack}.{GATE_UP}", (experts, 2 * width, hidden), parts))
    return out


def gather(state: Mapping[str, Tensor], tensor: FileTensor) -> Tensor:
    """The value to store for `tensor`, taken from our `state`; a view where possible."""
    pieces = [_view(state, part) for part in tensor.parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def scatter(state: Mapping[str, Tensor], tensor: FileTensor, value: Tensor) -> None:
    """Copy a stored `value` to the parts of our `state` it belongs to, casting to their dtype and device."""
    for part in tensor.parts:
        piece = value if part.rows is None else value[:, part.rows[0] : part.rows[1]]
        _view(state, part).copy_(piece)


def official_shards(tensors: list[FileTensor]) -> list[list[FileTensor]]:
    """Cut as the published checkpoints are: embedding; each layer; norm and heads; each MTP module."""
    groups: dict[tuple[int, int], list[FileTensor]] = {}
    for tensor in tensors:
        room, _, rest = tensor.name.partition(".")
        number = int(rest.split(".", 1)[0]) if room in ("layers", "mtp") else 0
        order = {"embed": 0, "layers": 1, "mtp": 3}.get(room, 2)
        groups.setdefault((order, number), []).append(tensor)
    return [groups[key] for key in sorted(groups)]


def shards_by_size(
    tensors: list[FileTensor], nbytes: Callable[[FileTensor], int], limit: int
) -> list[list[FileTensor]]:
    """Fill shards in order up to `limit` bytes each; a tensor larger than that gets a shard of its own."""
    shards: list[list[FileTensor]] = []
    room_left = 0
    for tensor in tensors:
        size = nbytes(tensor)
        if not shards or size > room_left:
            shards.append([])
            room_left = limit
        shards[-1].append(tensor)
        room_left -= size
    return shards


def _view(state: Mapping[str, Tensor], part: Part) -> Tensor:
    tensor = state[part.ours]
    return tensor if part.expert is None else tensor[part.expert]
