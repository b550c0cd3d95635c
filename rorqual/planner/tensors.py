"""Every tensor that a configuration's checkpoint holds: name, shape, dtype and bytes, without the weights.

The list comes from the network built on torch's meta device and from the rules that `save_official` writes by, so it
says what would be written. For V4-Flash and V4-Pro it is the list of the published files. What a file adds around its
tensors (headers, the index) is not counted. Layout: `checkpoint/layout.py`; formats: `checkpoint/packed.py`.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, get_args

import torch

from rorqual.checkpoint.layout import FileTensor, file_tensors, official_shards
from rorqual.checkpoint.names import stays_fp32
from rorqual.checkpoint.packed import stored_tensors
from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.planner.parameters import build_on_meta, component

WeightFormat = Literal["official", "base", "bf16", "fp32"]
"""`official`: experts in FP4, projections in FP8, the rest in bf16 and fp32; `base`: experts in FP8 with fp32 scales,
as in the base models' files; `bf16` and `fp32`: unpacked, with what is always fp32 in fp32."""

WORDS = {
    torch.int8: "I8",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
"""How safetensors spells a dtype."""


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor. A byte that holds two FP4 values is one element."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    component: str
    """The row of `count_parameters` that it belongs to; a scale belongs to its weight's."""
    nbytes: int

    @property
    def elements(self) -> int:
        """Stored numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inventory:
    """All tensors of one checkpoint, in the order of the files."""

    weights: WeightFormat
    shards: tuple[tuple[TensorEntry, ...], ...]
    """As the published checkpoints are cut: the embedding; each layer; norm and heads; each MTP module."""

    @cached_property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """Every tensor."""
        return tuple(tensor for shard in self.shards for tensor in shard)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def elements(self) -> int:
        """Stored numbers of all tensors, scales included."""
        return sum(tensor.elements for tensor in self.tensors)

    def total(self, key: Callable[[TensorEntry], str]) -> dict[str, tuple[int, int]]:
        """Tensors and bytes by what `key` says of a tensor, most bytes first."""
        tensors: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        for tensor in self.tensors:
            tensors[key(tensor)] += 1
            nbytes[key(tensor)] += tensor.nbytes
        return {name: (tensors[name], size) for name, size in nbytes.most_common()}

    @cached_property
    def by_component(self) -> dict[str, tuple[int, int]]:
        """Tensors and bytes of each part of the network."""
        return self.total(lambda tensor: tensor.component)

    @cached_property
    def by_dtype(self) -> dict[str, tuple[int, int]]:
        """Tensors and bytes in each dtype, in safetensors' words."""
        return self.total(lambda tensor: tensor.dtype)


def official_inventory(config: ModelConfig) -> Inventory:
    """The tensors of `config` in the released format; v4-pro's 145,116 take about two seconds, and no memory.

    Raises: ConfigError from an impossible configuration.
    """
    return inventory(config, "official")


@lru_cache(maxsize=4)
def inventory(config: ModelConfig, weights: WeightFormat) -> Inventory:
    """The tensors of `config` when stored as `weights`; the last four are remembered.

    Raises: ConfigError for another format.
    """
    if weights not in get_args(WeightFormat):
        raise ConfigError(f"weights is {weights!r}; use one of {', '.join(get_args(WeightFormat))}.")
    state = build_on_meta(config).state_dict()
    plain = file_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, lambda _: False)
    if weights in ("official", "base"):
        stored = stored_tensors(plain, state, "fp4" if weights == "official" else "fp8")
        dtypes = {item.tensor.name: item.dtype for item in stored}
        plain = [item.tensor for item in stored]
    else:
        floating = torch.bfloat16 if weights == "bf16" else torch.float32
        dtypes = {tensor.name: _unpacked(tensor, state[tensor.parts[0].ours], floating) for tensor in plain}
    shards = tuple(tuple(_entry(tensor, dtypes[tensor.name]) for tensor in shard) for shard in official_shards(plain))
    return Inventory(weights, shards)


def _unpacked(tensor: FileTensor, ours: torch.Tensor, floating: torch.dtype) -> torch.dtype:
    if not ours.is_floating_point():
        return torch.int64
    return torch.float32 if stays_fp32(tensor.name) else floating


def _entry(tensor: FileTensor, dtype: torch.dtype) -> TensorEntry:
    nbytes = math.prod(tensor.shape) * dtype.itemsize
    return TensorEntry(tensor.name, tensor.shape, WORDS[dtype], component(tensor.parts[0].ours), nbytes)
