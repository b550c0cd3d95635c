"""Low-rank adapters in post-training: settings as the field writes them, and what a stage does around its training.

    names = prepare(model, config, seed)       # freeze, attach or load: names for Trainer(trainable=names)
    ...                                        # any algorithm: only adapters have gradients and optimizer state
    finish(model, config, folder)              # save in PEFT's layout; merge unless the weights are packed

The frozen weights may be packed in FP4 or FP8 (`rorqual.load(..., weights="fp4")`): gradients pass through them. What
fits a machine: `planner/adapters.py`. The base model, as a reference policy, is `adapters.disabled(model)`.
"""

import math
from pathlib import Path

from rorqual.checkpoint.adapters import load_adapter, save_adapter
from rorqual.config import ModelConfig
from rorqual.model import Transformer, adapters
from rorqual.model.adapters import AdapterSpec
from rorqual.model.packed_weights import packed
from rorqual.model.quantised import is_quantised, release
from rorqual.posttrain.config import LoraConfig


def adapter_spec(config: LoraConfig, cfg: ModelConfig) -> AdapterSpec:
    """What is attached to a model of `cfg`."""
    layers = chosen_layers(config.layers, cfg)
    return AdapterSpec(config.r, config.alpha, tuple(config.target_modules), config.dropout, layers)


def chosen_layers(layers: str | list[int], cfg: ModelConfig) -> tuple[int, ...] | None:
    """Layer numbers of a setting; None for all of them."""
    if layers == "all":
        return None
    if layers == "upper-third":
        count = cfg.num_hidden_layers
        return tuple(range(count - math.ceil(count / 3), count))
    assert not isinstance(layers, str)
    return tuple(layers)


def prepare(model: Transformer, config: LoraConfig, seed: int = 0) -> list[str]:
    """Freeze `model` and give it the adapter; returns the names of what is trained.

    Raises: ConfigError for targets that the model has not, CheckpointError for an `init_from` that does not fit.
    """
    if config.init_from is not None:
        return load_adapter(model, config.init_from)
    return adapters.attach(model, adapter_spec(config, model.cfg), seed)


def finish(model: Transformer, config: LoraConfig, folder: str | Path, base: str | None = None) -> Path:
    """Save the adapter to `folder`/adapter, then merge it into the weights unless they are packed; where it is.

    Rounding (`quantise`) ends: a merged weight is rounded when it is saved.

    Raises: as `save_adapter`.
    """
    if is_quantised(model):
        release(model)
    saved = save_adapter(model, Path(folder) / "adapter", layout=config.layout, base=base).parent
    if next(packed(model), None) is None:
        adapters.merge(model)
    return saved
