"""From a model to a checkpoint folder: cut it into shards, cast, write, describe.

Stored in fp32 or bf16. As in the published checkpoints the mHC tensors, sinks, position biases and router
biases are always fp32 and the hash layers' expert table is int64.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint.build import STORABLE
from rorqual.checkpoint.layout import FileTensor, file_tensors, gather
from rorqual.checkpoint.names import stays_fp32
from rorqual.checkpoint.report import LoadReport
from rorqual.checkpoint.safetensors_io import write_checkpoint, write_text
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Transformer

SHARD_BYTES = 5_000_000_000
"""Larger checkpoints are split into several files."""

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "world.json")
"""Files that travel with a model: copied from the folder it was loaded from. Those it has not are left alone."""

Shards = list[list[FileTensor]]


@dataclass(frozen=True)
class Layout:
    """One way to lay a model out in files."""

    is_fused: Callable[[str], bool]
    """Whether a stack of experts (`layers.3.ffn.experts`) is stored fused."""
    split: Callable[[list[FileTensor], Callable[[FileTensor], int], int], Shards]
    """Cuts tensors into shards, given their sizes in bytes and the shard limit."""
    spell: Callable[[str], str]
    """Official (or fused) name -> name in the file."""
    describe: Callable[[ModelConfig], dict[str, Any]]
    """The config.json."""


def write_model(
    model: Transformer, folder: str | Path, layout: Layout, *, dtype: torch.dtype | None, shard_bytes: int
) -> list[Path]:
    """Save `model` to `folder` in `layout`; `dtype` None keeps the parameters' own. Returns the weight files.

    Raises: ConfigError for another dtype than fp32 or bf16, or when the layout cannot express the config;
    CheckpointError when the disk refuses.
    """
    if dtype is not None and dtype not in STORABLE:
        raise ConfigError(
            f"checkpoints are written in float32 or bfloat16, but {dtype} was asked for, which no loader of "
            "these layouts expects. Choose one of the two."
        )
    folder = Path(folder)
    state: dict[str, Tensor] = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tensors = {layout.spell(tensor.name): tensor for tensor in file_tensors(shapes, layout.is_fused)}
    config = _stored_config(model.cfg, dtype or state["embed.weight"].dtype)
    description = layout.describe(config)  # first: it may refuse

    def stored_dtype(tensor: FileTensor) -> torch.dtype:
        own = state[tensor.parts[0].ours].dtype
        if not own.is_floating_point:
            return torch.int64
        return torch.float32 if stays_fp32(tensor.name) else dtype or own

    def nbytes(tensor: FileTensor) -> int:
        return torch.Size(tensor.shape).numel() * stored_dtype(tensor).itemsize

    def make(name: str) -> Tensor:
        tensor = tensors[name]
        value = gather(state, tensor).detach().to("cpu", stored_dtype(tensor))
        # one expert is a view of its stack; the safetensors library wants storages that are not shared
        return value.clone() if value.untyped_storage().nbytes() != value.nbytes else value

    everything = list(tensors.values())
    is_small = sum(map(nbytes, everything)) <= shard_bytes
    groups = [everything] if is_small else layout.split(everything, nbytes, shard_bytes)
    written = write_checkpoint(folder, [[layout.spell(tensor.name) for tensor in group] for group in groups], make)
    write_text(folder / "config.json", json.dumps(description, indent=2) + "\n")
    _copy_companions(model, folder)
    return written


def _stored_config(config: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    """The config as it is true of the files: their dtype, and no word of FP8 or FP4."""
    extra = {k: v for k, v in config.extra.items() if k not in ("quantization_config", "expert_dtype", "dtype")}
    return config.replace(torch_dtype=str(dtype).removeprefix("torch."), extra=extra)


def _copy_companions(model: Transformer, folder: Path) -> None:
    report = getattr(model, "load_report", None)
    if not isinstance(report, LoadReport):
        return
    for name in COMPANIONS:
        source, target = report.folder / name, folder / name
        if source.is_file() and not (target.exists() and target.samefile(source)):
            try:
                shutil.copyfile(source, target)
            except OSError as error:
                raise CheckpointError(
                    f"cannot copy {source} to {folder}: {error}. The weights are saved; copy the file by hand."
                ) from error
