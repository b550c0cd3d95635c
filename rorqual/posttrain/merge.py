"""Merging specialists by their weights: the baseline that a distilled student is compared with.

    average           sum_i w_i theta_i, with w normalised to sum 1
    task arithmetic   theta_0 + scale sum_i w_i (theta_i - theta_0)

Source: model soups (Wortsman et al., 2022) and task arithmetic (Ilharco et al., 2023). All models must come from one
base, whose tensors they name and shape alike. Whole checkpoints are merged tensor by tensor, so memory holds one tensor
of each at a time.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from rorqual.checkpoint.safetensors_io import CheckpointFiles, TensorInfo, write_checkpoint
from rorqual.checkpoint.store import COMPANIONS
from rorqual.errors import CheckpointError, ConfigError

__all__ = ["average", "merge_checkpoints", "task_arithmetic"]

State = Mapping[str, Tensor]


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of states, summed in fp32. Raises: ConfigError for states or weights that do not fit."""
    mean = _averaging(len(states), weights)
    _check_alike(states)
    return {name: mean(name, [state[name] for state in states]) for name in states[0]}


def task_arithmetic(
    base: State, states: Sequence[State], scale: float = 1.0, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Base plus scaled sum of changes. Raises: ConfigError for states or weights that do not fit."""
    add = _adding(len(states), scale, weights)
    _check_alike([base, *states])
    return {name: add(name, [base[name], *(state[name] for state in states)]) for name in base}


def merge_checkpoints(
    folders: Sequence[str | Path], out: str | Path, *, weights: Sequence[float] | None = None,
    base: str | Path | None = None, scale: float = 1.0,
) -> Path:  # fmt: skip
    """Merge checkpoint folders of one layout into `out`: averaged, or with `base` by task arithmetic.

    Raises: CheckpointError for damaged folders or ones of different tensors; ConfigError for packed weights or weights
    that do not fit.
    """
    every = [Path(folder) for folder in ([base] if base is not None else []) + list(folders)]
    merge = _averaging(len(folders), weights) if base is None else _adding(len(folders), scale, weights)
    out = Path(out)
    if any(out.resolve() == folder.resolve() for folder in every):
        raise ConfigError(f"{out} is one of the models that are merged, which would be written over. Choose another.")
    with ExitStack() as stack:
        files = [stack.enter_context(CheckpointFiles(folder)) for folder in every]
        first = files[0].tensors
        for other in files[1:]:
            wrong = [name for name in {**first, **other.tensors} if not _fits(first, other.tensors, name)]
            if wrong:
                raise CheckpointError(
                    f"{other.folder} and {files[0].folder} differ at {len(wrong)} tensors ({wrong[0]}, ...), so their "
                    "weights cannot be added. Merge models that were trained from one base and saved in one layout."
                )
        packed = [info.name for info in first.values() if info.dtype not in ("F32", "BF16", "F16", "I64")]
        if packed:
            raise ConfigError(
                f"{files[0].folder} is packed ({packed[0]} is {first[packed[0]].dtype}), and sums of rounded weights "
                "would be rounded again. Convert the models with `rorqual convert --dtype bf16` first."
            )
        shards: dict[str, list[str]] = {}
        for info in first.values():
            shards.setdefault(info.path.name, []).append(info.name)
        write_checkpoint(out, list(shards.values()), lambda name: merge(name, [one.read(name) for one in files]))
    for name in ("config.json", *COMPANIONS):
        if (every[-1] / name).is_file():
            shutil.copyfile(every[-1] / name, out / name)
    return out


def _fits(first: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo], name: str) -> bool:
    return name in first and name in other and first[name].shape == other[name].shape


def _check_alike(states: Sequence[State]) -> None:
    names = set(states[0])
    for state in states[1:]:
        if set(state) != names or any(state[name].shape != states[0][name].shape for name in names):
            raise ConfigError(
                "The models' tensors differ in names or shapes, so their weights cannot be added. Merge models that "
                "were trained from one base."
            )


def _averaging(count: int, weights: Sequence[float] | None) -> Callable[[str, Sequence[Tensor]], Tensor]:
    given = _weights(count, weights)
    total = sum(given)
    if total <= 0:
        raise ConfigError(f"the weights {given} sum to {total}, so there is no mean. Give positive ones.")

    def mean(name: str, tensors: Sequence[Tensor]) -> Tensor:
        return _sum(name, tensors, [weight / total for weight in given])

    return mean


def _adding(count: int, scale: float, weights: Sequence[float] | None) -> Callable[[str, Sequence[Tensor]], Tensor]:
    given = [scale * weight for weight in _weights(count, weights)]

    def add(name: str, tensors: Sequence[Tensor]) -> Tensor:
        return _sum(name, tensors, [1 - sum(given), *given])

    return add


def _weights(count: int, weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * count if weights is None else list(weights)
    if not count or len(given) != count:
        raise ConfigError(f"{count} models came with {len(given)} weights. Give one weight for each of one or more.")
    return given


def _sum(name: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        if any(not torch.equal(first, tensor) for tensor in tensors[1:]):
            raise ConfigError(
                f"{name} holds whole numbers (a table of experts) that differ between the models, so there is no mean "
                "of them. Merge models that were trained from one base."
            )
        return first
    total = sum(tensor.float() * weight for tensor, weight in zip(tensors, weights, strict=True))
    assert isinstance(total, Tensor)
    return total.to(first.dtype)
