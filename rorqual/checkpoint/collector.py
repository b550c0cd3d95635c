"""Reading a checkpoint into a model whose weights stay packed (`model/packed_weights.py`).

Codes that the files hold in the wanted format are kept as they are; anything else is unpacked and packed, one stored
tensor at a time, so the unpacked model never exists.
"""

import torch
from torch import Tensor, nn

from rorqual.checkpoint.layout import Part
from rorqual.checkpoint.packed import unpack
from rorqual.model.packed_weights import formats_of, put
from rorqual.ops.packed_weight import PackedFormat, PackedWeight, from_codes, pack


def pack_stored(value: Tensor, codes: Tensor | None, scale: Tensor | None, kind: PackedFormat) -> PackedWeight:
    """A stored matrix in format `kind`: its numbers, or codes with their scale, kept as they are where they can be."""
    if codes is None or scale is None:
        return pack(value, kind)
    stored = "fp8" if codes.dtype == torch.float8_e4m3fn else "fp4"
    return from_codes(codes, scale) if stored == kind else pack(unpack(codes, scale), kind)


class Collector:
    """Makes the packed weights of `model` out of stored tensors as they are read; its parameters for them lose their
    memory.

    Raises: ConfigError for a choice of `weights` that there is not.
    """

    def __init__(self, model: nn.Module, weights: str) -> None:
        self.formats = formats_of([name for name, _ in model.named_parameters()], weights)
        """Format by parameter name."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._found: dict[str, PackedWeight] = {}
        for name in self.formats:
            module, _, leaf = name.rpartition(".")
            parameter = model.get_parameter(name)
            self._shapes[name] = tuple(parameter.shape)
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            model.get_submodule(module)._parameters[leaf] = empty

    def take(self, part: Part, value: Tensor, codes: Tensor | None, scale: Tensor | None) -> None:
        """A stored tensor's piece for parameter `part.ours`: numbers, or stored codes with their scale."""
        kind = self.formats[part.ours]
        rows = value if codes is not None or part.rows is None else value[:, part.rows[0] : part.rows[1]]
        one = pack_stored(rows, codes, scale, kind)
        if part.expert is None:
            self._found[part.ours] = one
        else:
            self._put_expert(part.ours, part.expert, one, kind)

    def _put_expert(self, name: str, expert: int, one: PackedWeight, kind: PackedFormat) -> None:
        shape = self._shapes[name]
        if name not in self._found:
            codes = one.codes.new_empty(shape[0], *one.codes.shape)
            scale = None if one.scale is None else one.scale.new_empty(shape[0], *one.scale.shape)
            self._found[name] = PackedWeight(kind, codes, scale, shape)
        stack = self._found[name]
        stack.codes[expert] = one.codes
        if stack.scale is not None and one.scale is not None:
            stack.scale[expert] = one.scale

    def install(self, model: nn.Module) -> None:
        """Put what was taken into the model."""
        for name, weight in self._found.items():
            put(model, name, weight)
