"""Loading under a memory budget: dense weights in memory, routed experts on disk, what is left a cache of them.

The model is built on the meta device, so that what stays on disk never has memory; then the dense weights are read past
the page cache. The budget is what the process may hold in all: what it holds already, the dense weights, the cache, and
`WORK_SHARE` of it for activations, sequences' states and buffers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rorqual import log
from rorqual.checkpoint.expert_cache import ExpertCache
from rorqual.checkpoint.expert_files import MATRICES, ExpertFile, ExpertReader
from rorqual.checkpoint.layout import Part
from rorqual.checkpoint.safetensors_io import TensorInfo
from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.model import Transformer, decode
from rorqual.model.attention import Attention
from rorqual.model.moe import Experts
from rorqual.model.packed_weights import WEIGHTS, packed
from rorqual.ops.packed_weight import PackedFormat, packed_nbytes
from rorqual.sizes import parse_bytes

WORK_SHARE = 1 / 8
"""Of a budget, what is left for activations, states and buffers."""
THREADS = 4
"""Readers: a few keep a solid-state disk busy."""
logger = log.get(__name__)


@dataclass(frozen=True)
class MemoryBudget:
    """How much memory a streamed model may take: `total` bytes of the process in all, or `cache` for experts alone."""

    total: int | None = None
    cache: int | None = None

    @classmethod
    def of(cls, memory: int | str | MemoryBudget) -> MemoryBudget:
        """Of bytes or a size such as `6GiB`. Raises: ConfigError for anything else."""
        if isinstance(memory, MemoryBudget):
            return memory
        total = parse_bytes(memory, "memory") if isinstance(memory, str) else memory
        if total <= 0:
            raise ConfigError(f"memory is {memory}, which leaves room for nothing. Give bytes or a size such as 6GiB.")
        return cls(total=total)

    def slots(self, dense_bytes: int, slot_bytes: int, active: int, experts: int, held_bytes: int) -> int:
        """How many experts of `slot_bytes` fit beside the dense weights; at most all `experts`.

        active: experts of a layer that one token needs, the fewest that can be worked with.
        held_bytes: what the process held before. Raises: ConfigError naming the bytes needed.
        """
        if self.cache is not None:
            slots = self.cache // slot_bytes
            if slots < 1:
                raise ConfigError(
                    f"a cache of {self.cache:,} bytes holds no expert of {slot_bytes:,} bytes. Give it at least one."
                )
            return min(slots, experts)
        assert self.total is not None
        left = int(self.total * (1 - WORK_SHARE)) - held_bytes - dense_bytes
        if left < active * slot_bytes:
            needed = int((held_bytes + dense_bytes + active * slot_bytes) / (1 - WORK_SHARE)) + 1
            raise ConfigError(
                f"memory is {self.total:,} bytes, but this model needs at least {needed:,}: {dense_bytes:,} of dense "
                f"weights, {active * slot_bytes:,} for the {active} experts of one layer that a token uses, "
                f"{held_bytes:,} that the process holds already, and {WORK_SHARE:.1%} of the whole to work in. Raise "
                "memory, or choose weights that take less."
            )
        return min(left // slot_bytes, experts)


def stored_choice(experts: set[str]) -> str:
    """The name in `WEIGHTS` that keeps experts as the files have them, by their dtypes.

    Raises: ConfigError for dtypes that no choice keeps.
    """
    for dtypes, choice in (({"I8", "U8"}, "fp4"), ({"F8_E4M3"}, "fp8"), ({"BF16"}, "bf16")):
        if experts and experts <= dtypes:
            return choice
    raise ConfigError(
        f"the experts' dtypes in these files are {', '.join(sorted(experts)) or 'none'}, which no packed format keeps "
        f"as they are. Say which to use with weights: one of {', '.join(WEIGHTS)}."
    )


class Streaming:
    """Collects where the experts of a model lie while its checkpoint is read, and then gives it a cache of them.

    weights: a name in `WEIGHTS`.
    """

    def __init__(self, budget: MemoryBudget, weights: str, threads: int = THREADS) -> None:
        self.budget, self.threads = budget, threads
        self.kind: PackedFormat = WEIGHTS[weights][0]
        self.held_bytes = resident_bytes()
        self._files: dict[tuple[str, int], ExpertFile] = {}

    @staticmethod
    def takes(name: str) -> bool:
        """Whether the parameter called `name` stays on disk."""
        stack, _, leaf = name.rpartition(".")
        return leaf in MATRICES and stack.endswith("ffn.experts")

    def note(self, part: Part, weight: TensorInfo, scale: TensorInfo | None) -> None:
        """A stored tensor that stays where it is. Raises: ConfigError for fused experts."""
        if part.expert is None:
            raise ConfigError(
                f"{weight.name} holds the experts of a layer fused, as transformers saves them, and streaming reads "
                "one expert at a time. Save the model in the official layout (rorqual.checkpoint.save_official), or "
                "load it without memory."
            )
        stack, _, matrix = part.ours.rpartition(".")
        file = self._files.setdefault((stack, part.expert), ExpertFile())
        file.weights[matrix] = weight
        if scale is not None:
            file.scales[matrix] = scale

    def check(self, model: Transformer, config: ModelConfig, formats: Mapping[str, PackedFormat]) -> None:
        """Look, before a weight is read, whether the budget will do for `model` on the meta device, of which `formats`
        will be packed. Raises: ConfigError for a budget that is too small.
        """
        dense = 0
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not self.takes(name):
                shape = tuple(tensor.shape)
                dense += packed_nbytes(shape, formats[name]) if name in formats else tensor.nbytes
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        expert = sum(packed_nbytes(shape, self.kind) for shape in ((inner, hidden), (inner, hidden), (hidden, inner)))
        experts, active = config.n_routed_experts, config.num_experts_per_tok
        self.budget.slots(dense, expert, active, experts, self.held_bytes)

    def install(self, model: Transformer, config: ModelConfig) -> ExpertCache:
        """Let `model`, whose dense weights are there, read its experts through a cache. Raises: ConfigError for a
        budget that is too small.
        """
        shape = (config.n_routed_experts, config.moe_intermediate_size, config.hidden_size)
        reader = ExpertReader(self._files, self.kind, shape)
        count, active = len(self._files), config.num_experts_per_tok
        slots = self.budget.slots(dense_bytes(model), reader.slot_bytes, active, count, self.held_bytes)
        cache = ExpertCache(reader, slots, self.threads)
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                for matrix in MATRICES:
                    del module._parameters[matrix]
                module.streamed = cache.layer(name)
        decode.forget(model)
        model.expert_cache = cache
        logger.info(
            "%d of %d experts of %.1f MB fit in memory (%.2f GB); the others are read when they are used.",
            slots, count, reader.slot_bytes / 1e6, slots * reader.slot_bytes / 1e9,
        )  # fmt: skip
        return cache


def build_without_memory(config: ModelConfig) -> Transformer:
    """The network without memory but for what no checkpoint holds."""
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    for module in model.modules():
        if isinstance(module, Attention):
            module.frequencies = module.make_frequencies()
    return model


def give_memory(model: nn.Module) -> None:
    """Memory, holding anything, for whatever of a model on the meta device does not stay on disk."""
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not Streaming.takes(f"{name}.{leaf}"):
                module._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")


def dense_bytes(model: nn.Module) -> int:
    """Of all weights in memory, packed ones too."""
    tensors = [*model.parameters(), *model.buffers()]
    plain = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
    return plain + sum(weight.nbytes for _, weight in packed(model))


def resident_bytes() -> int:
    """What this process holds in memory now; where the system does not say, the most that it ever held."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
