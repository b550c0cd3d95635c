"""How a sequence's memory keeps compressed entries and index keys: as they are computed, or packed in FP8 and FP4.

What is packed is rounded where it is made, with a state and without one, so a format decides a model's numbers, and how
a sequence is cut into calls or where its rows lie still does not. Under `activation_rounding` the numbers are such
already, and packing loses nothing. Source: V4 report (cache in FP8 and FP4); rows: `ops/cache_codec.py`.

E new entries, C entries, K width of a row, Y its bytes when packed.
"""

import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.ops import cache_codec
from rorqual.ops.cache_codec import PackedEntries


def packs_keys(cfg: ModelConfig) -> bool:
    """Whether index keys are kept in FP4, and index queries rounded to it."""
    if cfg.cache_format == "auto":
        return cfg.activation_rounding != "none" and cfg.index_head_dim % 2 == 0
    return cfg.cache_format != "exact"


def packs_entries(cfg: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether entries, computed in `dtype`, are kept in FP8 with rope channels in bf16."""
    if cfg.cache_format == "auto":
        return cfg.activation_rounding != "none" and dtype == torch.bfloat16
    return cfg.cache_format == "fp8"


def row_of(cfg: ModelConfig, part: str, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """What one row of a part (`entries`, `index_keys`) is in memory: K numbers of `dtype`, or Y bytes."""
    if part == "entries":
        if packs_entries(cfg, dtype):
            return cache_codec.entry_bytes(cfg.nope_head_dim, cfg.qk_rope_head_dim), torch.uint8
        return cfg.head_dim, dtype
    if packs_keys(cfg):
        return cache_codec.index_key_bytes(cfg.index_head_dim), torch.uint8
    return cfg.index_head_dim, dtype


def pack_entries(cfg: ModelConfig, new: Tensor | None) -> Tensor | None:
    """Entries [B, E, K] as the memory keeps them: the same, or rows uint8 [B, E, Y]."""
    if new is None or not packs_entries(cfg, new.dtype):
        return new
    return cache_codec.encode_entries(new.detach(), cfg.nope_head_dim)


def pack_keys(cfg: ModelConfig, new: Tensor | None) -> Tensor | None:
    """Index keys [B, E, K] as the memory keeps them: the same, or rows uint8 [B, E, Y]."""
    return cache_codec.encode_index_keys(new.detach()) if new is not None and packs_keys(cfg) else new


def kept_entries(cfg: ModelConfig, kept: Tensor | None, dtype: torch.dtype) -> Tensor | PackedEntries | None:
    """What attention reads of the memory's entries [B, C, K or Y]."""
    if kept is None or kept.dtype != torch.uint8:
        return kept
    return PackedEntries(kept, cfg.nope_head_dim, cfg.qk_rope_head_dim, dtype)


def unpacked_keys(cfg: ModelConfig, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Index keys [B, C, K] from the memory's rows."""
    return cache_codec.decode_index_keys(kept, cfg.index_head_dim, dtype) if kept.dtype == torch.uint8 else kept


def is_lossless(cfg: ModelConfig) -> bool:
    """Whether the memory keeps numbers as they are computed, in the model's dtype."""
    return cfg.cache_format == "exact" or (cfg.cache_format == "auto" and cfg.activation_rounding == "none")
