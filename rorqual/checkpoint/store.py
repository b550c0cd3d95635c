"""From a model to a checkpoint folder: cut it into shards, cast, write, describe.

Stored in fp32 or bf16, or packed in FP8 and FP4 (`packed.py`). As in the published checkpoints the mHC tensors, sinks,
position biases and router biases are always fp32 and the hash layers' expert table is int64.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint.build import STORABLE
from rorqual.checkpoint.layout import FileTensor, file_tensors, gather
from rorqual.checkpoint.names import stays_fp32
from rorqual.checkpoint.packed import Stored, describe, pack, stored_tensors
from rorqual.checkpoint.report import LoadReport
from rorqual.checkpoint.safetensors_io import write_checkpoint, write_text
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Transformer
from rorqual.model.adapters import adapted
from rorqual.model.packed_weights import refuse_packed
from rorqual.model.quantised import ExpertFormat, used_values
from rorqual.ops.quant import decode_e8m0

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
    model: Transformer,
    folder: str | Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None,
    experts: ExpertFormat | None = None,
    shard_bytes: int,
) -> list[Path]:
    """Save `model` to `folder` in `layout`; `dtype` None keeps the parameters' own. Returns the weight files.

    `experts` writes an FP8 and FP4 file (official names only). Raises: ConfigError for another dtype than fp32 or
    bf16, weights packed for inference, or a config that the layout cannot express; CheckpointError when the disk
    refuses.
    """
    if experts is not None and dtype is not None:
        raise ConfigError(
            f"dtype {dtype} and experts in {experts} were both asked for, but a packed file has the released "
            "checkpoints' dtypes. Leave one of them out."
        )
    if dtype is not None and dtype not in STORABLE:
        raise ConfigError(
            f"checkpoints are written in float32 or bfloat16, but {dtype} was asked for, which no loader of "
            "these layouts expects. Choose one of the two."
        )
    refuse_packed(model, "saved")
    if next(adapted(model), None) is not None:
        raise ConfigError(
            "This model has adapters beside its weights, which a checkpoint has no place for. Save them with "
            "save_adapter, or merge them into the weights first (rorqual.model.adapters.merge)."
        )
    folder = Path(folder)
    state: dict[str, Tensor] = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    plain = file_tensors(shapes, layout.is_fused)
    config = stored_config(model.cfg, torch.bfloat16 if experts else dtype or state["embed.weight"].dtype)
    description = layout.describe(config)  # first: it may refuse
    if experts:
        stored, description = stored_tensors(plain, state, experts), describe(description, experts)
    else:
        state |= used_values(model)  # exact in bf16 too
        stored = [Stored(tensor, _dtype(tensor, state, dtype), "fp32") for tensor in plain]
    tensors = {layout.spell(item.tensor.name): item for item in stored}
    report = getattr(model, "load_report", None)
    packer = _Packer(state, report.scales if isinstance(report, LoadReport) else {})

    def nbytes(tensor: FileTensor) -> int:
        return torch.Size(tensor.shape).numel() * tensors[layout.spell(tensor.name)].dtype.itemsize

    def make(name: str) -> Tensor:
        item = tensors[name]
        if item.kind in ("fp4", "fp8"):
            return packer.make(item)
        value = gather(state, item.tensor).detach().to("cpu", item.dtype)
        # one expert is a view of its stack; the safetensors library wants storages that are not shared
        return value.clone() if value.untyped_storage().nbytes() != value.nbytes else value

    everything = [item.tensor for item in stored]
    is_small = sum(map(nbytes, everything)) <= shard_bytes
    groups = [everything] if is_small else layout.split(everything, nbytes, shard_bytes)
    written = write_checkpoint(folder, [[layout.spell(tensor.name) for tensor in group] for group in groups], make)
    write_text(folder / "config.json", json.dumps(description, indent=2) + "\n")
    _copy_companions(model, folder)
    return written


def _dtype(tensor: FileTensor, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    own = state[tensor.parts[0].ours].dtype
    if not own.is_floating_point:
        return torch.int64
    return torch.float32 if stays_fp32(tensor.name) else dtype or own


class _Packer:
    """Codes and scales of a model's weights; the two are asked for one after the other and computed together."""

    def __init__(self, state: Mapping[str, Tensor], known_scales: Mapping[str, Tensor]) -> None:
        self.state, self.known_scales = state, known_scales
        self._last: tuple[Any, tuple[Tensor, Tensor]] = (None, (torch.empty(0), torch.empty(0)))

    def make(self, item: Stored) -> Tensor:
        if self._last[0] != item.tensor.parts:
            name = item.tensor.name.removesuffix("scale") + "weight" if item.is_scale else item.tensor.name
            weight = gather(self.state, item.tensor).detach()
            known = self.known_scales.get(name)
            packed = pack(weight, item.kind, None if known is None else known.to(weight.device))
            self._last = (item.tensor.parts, packed)
        codes, scale = self._last[1]
        if not item.is_scale:
            return codes.cpu()
        return (decode_e8m0(scale) if item.dtype == torch.float32 else scale).cpu()


def stored_config(config: ModelConfig, dtype: torch.dtype) -> ModelConfig:
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
