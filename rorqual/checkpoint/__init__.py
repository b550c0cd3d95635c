"""Checkpoints in and out: official and transformers layouts, strict loads with a report, `rorqual.load`."""

from rorqual.checkpoint.adapters import load_adapter, merge_adapter, save_adapter
from rorqual.checkpoint.convert import Conversion, convert
from rorqual.checkpoint.expert_cache import CacheStats, ExpertCache
from rorqual.checkpoint.hub import Pulled, pull
from rorqual.checkpoint.load import ASSETS, bundled_names, describe, load, load_model, locate
from rorqual.checkpoint.names import to_official, to_transformers
from rorqual.checkpoint.official import load_official, save_official
from rorqual.checkpoint.report import LoadReport, Match, match
from rorqual.checkpoint.safetensors_io import CheckpointFiles
from rorqual.checkpoint.streaming import MemoryBudget
from rorqual.checkpoint.summary import CheckpointSummary, summarise
from rorqual.checkpoint.transformers_layout import load_transformers, save_transformers

__all__ = [
    "ASSETS",
    "CacheStats",
    "CheckpointFiles",
    "CheckpointSummary",
    "Conversion",
    "ExpertCache",
    "LoadReport",
    "Match",
    "MemoryBudget",
    "Pulled",
    "bundled_names",
    "convert",
    "describe",
    "load",
    "load_adapter",
    "load_model",
    "load_official",
    "load_transformers",
    "locate",
    "match",
    "merge_adapter",
    "pull",
    "save_adapter",
    "save_official",
    "save_transformers",
    "summarise",
    "to_official",
    "to_transformers",
]
