"""Models in the layout of transformers (`DeepseekV4ForCausalLM`, 5.23): its names, experts fused in two
tensors a layer.

transformers has no MTP module and ignores `mtp.*`. Here those tensors are kept under their official names, so
a model saved in this layout comes back whole, while transformers loads the rest of it without complaint.
"""

from pathlib import Path

import torch

from rorqual.checkpoint.build import build_and_fill, read_config
from rorqual.checkpoint.layout import shards_by_size
from rorqual.checkpoint.names import to_official, to_transformers
from rorqual.checkpoint.safetensors_io import CheckpointFiles
from rorqual.checkpoint.store import SHARD_BYTES, Layout, write_model
from rorqual.checkpoint.streaming import MemoryBudget
from rorqual.config import ModelConfig
from rorqual.model import Transformer

LAYOUT = Layout(
    is_fused=lambda stack: not stack.startswith("mtp."),
    split=shards_by_size,
    spell=to_transformers,
    describe=ModelConfig.to_transformers_dict,
)


def load_transformers(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    strict: bool = True,
    weights: str | None = None,
    memory: int | str | MemoryBudget | None = None,
) -> Transformer:
    """Load a model that transformers or `save_transformers` saved; arguments and errors as `load_official`.

    transformers drops MTP weights on saving but keeps `num_nextn_predict_layers` in the config; such a folder
    gives a model without MTP and a note in the report.
    """
    folder = Path(folder)
    config = read_config(folder)
    with CheckpointFiles(folder) as files:
        present = without_absent_mtp(config, files)
    model, report = build_and_fill(
        folder, present, dtype=dtype, device=device, strict=strict, weights=weights, memory=memory
    )
    dropped = config.num_nextn_predict_layers - present.num_nextn_predict_layers
    if dropped:
        report.notes.append(
            f"the config names {dropped} MTP module(s) but the files hold none (transformers drops them): built without"
        )
    return model


def without_absent_mtp(config: ModelConfig, files: CheckpointFiles) -> ModelConfig:
    """`config`, less its MTP modules when the files hold not one `mtp.*` tensor."""
    if config.num_nextn_predict_layers == 0 or any(to_official(name).startswith("mtp.") for name in files.tensors):
        return config
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return config.replace(num_nextn_predict_layers=0, compress_ratios=ratios)


def save_transformers(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write weights and a config.json that `DeepseekV4ForCausalLM.from_pretrained` reads; returns the weight
    files.

    Raises: ConfigError when transformers cannot express the schedule (several HCA ratios); CheckpointError
    when the disk refuses.
    """
    return write_model(model, folder, LAYOUT, dtype=dtype, shard_bytes=shard_bytes)
