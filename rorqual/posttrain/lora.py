"""Low-rank adapters in post-training: settings as the field writes them, and what a stage does around its training.

    names = prepare(model, config, seed)       # freeze, attach or load: names for Trainer(trainable=names)
    ...                                        # any algorithm: only adapters have gradients and optimizer state
    finish(model, config, folder)              # save in PEFT's layout; merge unless the weights are packed

The frozen weights may be packed in FP4 or FP8 (`rorqual.load(..., weights="fp4")`): gradients pass through them. What
fits a machine: `planner/adapters.py`. The base model, as a reference policy, is `adapters.disabled(model)`.
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from rorqual.checkpoint.adapters import load_adapter, save_adapter
from rorqual.config import ModelConfig
from rorqual.model import Transformer, adapters
from rorqual.model.adapters import AdapterSpec
from rorqual.model.packed_weights import packed
from rorqual.posttrain.config import Section

ATTENTION = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b")
"""The projections of attention: in every layer, whatever its kind."""


class LoraConfig(Section):
    """Train an adapter in place of the model's weights."""

    r: int = Field(default=16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(default=32.0, gt=0, description="The adapters' product is scaled by alpha / r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of an adapter's inputs dropped in training.")
    target_modules: list[str] = Field(
        default=list(ATTENTION),
        description="Modules by name, as globs: attn.*, shared_experts.*, experts.w? (one adapter an expert), wq_b.",
    )
    layers: Literal["all", "upper-third"] | list[int] = Field(
        default="all", description="Which layers: all, upper-third (keeps knowledge in place), or their numbers."
    )
    init_from: str | None = Field(default=None, description="Folder of an adapter to go on from.")
    layout: Literal["official", "transformers"] = Field(
        default="official", description="Whose module names the saved adapter has; transformers for use with PEFT."
    )

    def spec(self, cfg: ModelConfig) -> AdapterSpec:
        """What is attached to a model of `cfg`."""
        return AdapterSpec(
            self.r, self.alpha, tuple(self.target_modules), self.dropout, chosen_layers(self.layers, cfg)
        )


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
    return adapters.attach(model, config.spec(model.cfg), seed)


def finish(model: Transformer, config: LoraConfig, folder: str | Path, base: str | None = None) -> Path:
    """Save the adapter to `folder`/adapter, then merge it into the weights unless they are packed; where it is.

    Raises: as `save_adapter`.
    """
    saved = save_adapter(model, Path(folder) / "adapter", layout=config.layout, base=base).parent
    if next(packed(model), None) is None:
        adapters.merge(model)
    return saved
