"""The indexers' warm-up: for a while everything else stands still.

The compressed entries are read by all queries, as before, and only the indexers' own loss teaches. Source: V4 report
(the stage exists), V3.2 report (what it consists of).
"""

from torch import nn

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError


def is_indexer(name: str) -> bool:
    """Whether a parameter belongs to an indexer."""
    return ".indexer." in name


def freeze_all_but_indexers(model: nn.Module, is_frozen: bool) -> None:
    """Whether everything but the indexers goes without gradients (their graph is then not even built)."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == is_frozen and not is_indexer(name):
            parameter.requires_grad_(not is_frozen)


def check_warmup(index_warmup: float, index_weight: float, cfg: ModelConfig) -> None:
    """Refuse a warm-up in which nothing would learn. Raises: ConfigError."""
    if index_warmup <= 0:
        return
    if not any(spec.has_indexer for spec in (*cfg.layers, *cfg.mtp_layers)):
        raise ConfigError(
            f"schedule.index_warmup is {index_warmup}, but no layer of this model has an indexer, so nothing would "
            "learn in that stage. Set it to 0."
        )
    if index_weight == 0:
        raise ConfigError(
            f"schedule.index_warmup is {index_warmup}, but loss.index is 0, so nothing would learn in that stage. Give "
            "loss.index a weight, or set schedule.index_warmup to 0."
        )
