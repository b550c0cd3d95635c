"""Inference on weights as they are stored: experts and projections in FP4, FP8, INT8 or bf16, never unpacked.

Source: DeepSeek-V4's published formats. What is packed is what its checkpoints pack (`quantised.stored_format`): the
routed experts, and the projections of attention, indexer, shared experts and MTP. `fp4` is the released combination.

    fp4        experts FP4 (1 x 32), the others FP8 (128 x 128)
    fp4-int8   experts FP4, the others INT8, one scale a row; INT8 is ours
    fp4-bf16   experts FP4, the others bf16
    fp8        all FP8
    int8       all INT8
    bf16       all bf16, whatever the activations are

A packed module holds a `PackedWeight` where its parameter was, so it cannot be trained, cast, moved or saved; the ops
take either (`ops/linear.py`, `ops/experts.py`). Activations keep the model's dtype.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from rorqual.errors import ConfigError
from rorqual.model import decode
from rorqual.model.moe import Experts
from rorqual.model.quantised import StoredFormat, stored_format
from rorqual.ops.packed_weight import PackedFormat, PackedWeight, pack

WEIGHTS: dict[str, tuple[PackedFormat, PackedFormat]] = {
    "fp4": ("fp4", "fp8"), "fp4-int8": ("fp4", "int8"), "fp4-bf16": ("fp4", "bf16"),
    "fp8": ("fp8", "fp8"), "int8": ("int8", "int8"), "bf16": ("bf16", "bf16"),
}  # fmt: skip
"""Formats of routed experts and of the other matrices, by name of the choice."""


def formats_of(names: Iterable[str], weights: str) -> dict[str, PackedFormat]:
    """Format by parameter name, of those among `names` that the choice `weights` packs.

    Raises: ConfigError for a choice that there is not.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights is {weights!r}, which names no way to keep them. Use one of {', '.join(WEIGHTS)}.")
    experts, others = WEIGHTS[weights]
    stored: dict[StoredFormat, PackedFormat] = {"fp4": experts, "fp8": others}
    kinds = {name: stored_format(name, "fp4") for name in names}
    return {name: stored[kind] for name, kind in kinds.items() if kind in stored}


def pack_weights(model: nn.Module, weights: str) -> None:
    """Replace the matrices of a model by packed ones, rounded by their formats' rules.

    Raises: ConfigError for a choice that there is not, FP4 rows of odd length, or a model that is packed already.
    """
    refuse_packed(model, "packed again")
    for name, kind in formats_of([name for name, _ in model.named_parameters()], weights).items():
        put(model, name, pack(model.get_parameter(name).detach(), kind))


def put(model: nn.Module, name: str, weight: PackedWeight) -> None:
    """Let the module that has the parameter `name` hold `weight` in its place."""
    decode.forget(model)
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    owner._parameters.pop(leaf, None)
    owner.__dict__[leaf] = weight


def packed(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """The packed weights of a model, by the names of the parameters that they stand for."""
    for prefix, module in model.named_modules():
        for leaf, value in module.__dict__.items():
            if isinstance(value, PackedWeight):
                yield f"{prefix}.{leaf}", value


def refuse_packed(model: nn.Module, what: str) -> None:
    """Raises: ConfigError where a model's weights are packed, which `what` says cannot be done with them."""
    is_streamed = any(isinstance(module, Experts) and module.streamed is not None for module in model.modules())
    if is_streamed or next(packed(model), None) is not None:
        raise ConfigError(
            f"This model's weights are packed for inference, so it cannot be {what}: what they were rounded from is "
            "gone. Load it without `weights` for that."
        )
