"""Models in DeepSeek's own layout: official tensor names, one tensor per expert, `config.json` beside the
weights.

Left out: FP8 and FP4 files, which are recognised and refused.
"""

from pathlib import Path

import torch

from rorqual.checkpoint.build import build_and_fill, read_config
from rorqual.checkpoint.layout import official_shards
from rorqual.checkpoint.store import SHARD_BYTES, Layout, write_model
from rorqual.config import ModelConfig
from rorqual.model import Transformer

LAYOUT = Layout(
    is_fused=lambda _stack: False,
    split=lambda tensors, _nbytes, _limit: official_shards(tensors),
    spell=lambda name: name,
    describe=ModelConfig.to_dict,
)


def load_official(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    strict: bool = True,
) -> Transformer:
    """Build the model that `folder` describes and load its weights.

    `dtype` is that of the parameters in memory (those that V4 keeps in fp32 stay so); None means fp32 on a
    CPU and the config's `torch_dtype` elsewhere. The model carries a `LoadReport` as `model.load_report`.
    Raises: ConfigError for an impossible config.json; CheckpointError for damaged files, FP8/FP4 weights and,
    when `strict`, for any tensor that is missing, misshapen or unexpected (otherwise those are reported, and
    what the files lack keeps its initial values).
    """
    config = read_config(folder)
    return build_and_fill(Path(folder), config, dtype=dtype, device=device, strict=strict)[0]


def save_official(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write weights and config.json in the official layout; returns the weight files.

    `dtype` is fp32 or bf16, None for the parameters' own. Above `shard_bytes` the weights are split as
    DeepSeek does: embedding, one shard a layer, norm and heads, MTP. Raises: CheckpointError
    when the disk refuses.
    """
    return write_model(model, folder, LAYOUT, dtype=dtype, shard_bytes=shard_bytes)
