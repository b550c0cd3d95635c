"""From a checkpoint folder to a model: read the config, build the network, fill it, check its tables."""

from pathlib import Path

import torch

from rorqual import log
from rorqual.checkpoint.collector import Collector
from rorqual.checkpoint.drafter import without_drafter
from rorqual.checkpoint.names import split_expert, to_official
from rorqual.checkpoint.report import LoadReport, cast_model, fill
from rorqual.checkpoint.safetensors_io import CheckpointFiles
from rorqual.checkpoint.streaming import MemoryBudget, Streaming, build_without_memory, give_memory, stored_choice
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Transformer
from rorqual.model.ngram_hash import NgramHash
from rorqual.model.packed_weights import pack_weights

logger = log.get(__name__)

STORABLE = (torch.float32, torch.bfloat16)
"""Dtypes of matrices in the files written here."""


def read_config(folder: str | Path) -> ModelConfig:
    """`config.json` of a folder. Raises: CheckpointError without one, ConfigError when impossible."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{folder} {what}, so the network's shape is unknown. Point at a folder with config.json and the weights."
        )
    return ModelConfig.from_file(folder / "config.json")


def build_and_fill(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    strict: bool,
    weights: str | None = None,
    memory: int | str | MemoryBudget | None = None,
) -> tuple[Transformer, LoadReport]:
    """Build `config` on `device`, cast it, and load the folder's weights (either layout) into it.

    The report is also kept as `model.load_report`. Without `strict`, tensors that the files lack keep their initial
    values. With `weights` matrices are kept packed for inference (`model/packed_weights.py`). With `memory` routed
    experts stay on disk (`streaming.py`).
    """
    device = torch.device(device)
    if dtype is None:
        named = getattr(torch, config.torch_dtype, torch.float32)
        wants_fp32 = (device.type == "cpu" and memory is None) or named not in STORABLE
        dtype = torch.float32 if wants_fp32 else named
    if memory is not None:
        return _build_streamed(folder, config, MemoryBudget.of(memory), dtype, device, strict, weights)
    with CheckpointFiles(folder) as files:
        config, note = without_drafter(config, files)
        model = Transformer(config, seed=None if strict else 0)  # strict: every tensor comes from the files
        collector = Collector(model, weights) if weights is not None and strict else None
        cast_model(model, dtype)
        report = fill(model.state_dict(), files, strict=strict, collector=collector)
        if collector is not None:
            collector.install(model)
        elif weights is not None:
            pack_weights(model, weights)
    return _checked(model, folder, report, note).to(device), report


def _build_streamed(
    folder: Path, config: ModelConfig, budget: MemoryBudget, dtype: torch.dtype, device: torch.device, strict: bool,
    weights: str | None,
) -> tuple[Transformer, LoadReport]:  # fmt: skip
    """As `build_and_fill`, with routed experts on disk."""
    if device.type != "cpu" or not strict:
        raise ConfigError(
            f"memory was given with device {device} and strict={strict}, but experts are streamed for inference on a "
            "CPU from files that hold all of them. Leave memory out, or load strictly on the CPU."
        )
    with CheckpointFiles(folder, is_direct=True) as files:
        config, note = without_drafter(config, files)
        if weights is None:
            names = {info.name: info.dtype for info in files.tensors.values()}
            weights = stored_choice(
                {kind for name, kind in names.items() if name.endswith(".weight") and split_expert(to_official(name))}
            )
        model, streaming = build_without_memory(config), Streaming(budget, weights)
        collector = Collector(model, weights)
        cast_model(model, dtype)
        streaming.check(model, config, collector.formats)
        give_memory(model)
        report = fill(model.state_dict(), files, strict=True, collector=collector, streaming=streaming)
        collector.install(model)
        streaming.install(model, config)
    return _checked(model, folder, report, note), report


def _checked(model: Transformer, folder: Path, report: LoadReport, note: str | None) -> Transformer:
    _check_tables(model, model.cfg, folder)
    report.notes += [] if note is None else [note]
    logger.info("%s", report.summary())
    object.__setattr__(model, "load_report", report)  # a plain attribute: neither parameter nor buffer
    return model


def _check_tables(model: Transformer, config: ModelConfig, folder: Path) -> None:
    """Expert tables must name experts that exist, and hashes lead to rows that do, or some token would crash far from
    the cause.
    """
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid") and not tensor.is_meta and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= config.n_routed_experts:
                raise CheckpointError(
                    f"{name} in {folder} names experts {low} to {high}, but the model has "
                    f"{config.n_routed_experts} (0 to {config.n_routed_experts - 1}), so some tokens could "
                    "not be routed. The table is damaged or belongs to another model: copy the checkpoint "
                    "again."
                )
    for name, module in model.named_modules():
        if isinstance(module, NgramHash) and not module.sizes.is_meta:
            module.check(f"{name} in {folder}")
