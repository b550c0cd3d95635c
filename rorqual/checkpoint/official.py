"""Models in DeepSeek's own layout: official tensor names, one tensor per expert, `config.json` beside the weights.

Weights may be fp32, bf16, or packed in FP8 and FP4 as the released checkpoints are (`packed.py`).
"""

from pathlib import Path

import torch

from rorqual.checkpoint.build import build_and_fill, read_config
from rorqual.checkpoint.layout import official_shards
from rorqual.checkpoint.store import SHARD_BYTES, Layout, write_model
from rorqual.checkpoint.streaming import MemoryBudget
from rorqual.config import ModelConfig
from rorqual.model import Transformer
from rorqual.model.quantised import ExpertFormat

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
    weights: str | None = None,
    memory: int | str | MemoryBudget | None = None,
) -> Transformer:
    """Build the model that `folder` describes and load its weights.

    `dtype` is that of the parameters in memory (those that V4 keeps in fp32 stay so); None means fp32 on a
    CPU and the config's `torch_dtype` elsewhere. FP8 and FP4 weights become their exact values in it,
    or with `weights` (a name of `model.packed_weights.WEIGHTS`) matrices stay packed, for inference on a CPU.

    With `memory`, bytes or a size such as "6GiB" that the process may hold in all, routed experts stay on disk and are
    read as they are used, for inference on a CPU of models that are larger than memory; what they do is seen by
    `model.expert_cache.stats()`. `weights` is then what the files hold unless given, and `dtype` that of the config.

    The model carries a `LoadReport` as `model.load_report`. Raises: ConfigError for an impossible config.json, or a
    budget of memory that is too small; CheckpointError for damaged files and, when `strict`, for any tensor that is
    missing, misshapen or unexpected (otherwise those are reported, and what the files lack keeps its initial values).
    """
    config = read_config(folder)
    return build_and_fill(
        Path(folder), config, dtype=dtype, device=device, strict=strict, weights=weights, memory=memory
    )[0]


def save_official(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    experts: ExpertFormat | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write weights and config.json in the official layout; returns the weight files.

    `dtype` is fp32 or bf16, None for the parameters' own. `experts` "fp4" or "fp8" instead writes what the released
    (or the base) checkpoints hold: packed experts, FP8 projections, the rest in bf16 and fp32. A model under
    `model.quantised.quantise` is written as it computes: the files' model gives the same logits. Above `shard_bytes`
    the weights are split as DeepSeek does: embedding, one shard a layer, norm and heads, MTP. Raises: ConfigError for
    another dtype, or for `dtype` and `experts` at once; CheckpointError when the disk refuses.
    """
    return write_model(model, folder, LAYOUT, dtype=dtype, experts=experts, shard_bytes=shard_bytes)
