"""Settings that every algorithm of post-training shares, as sections of a recipe.

An algorithm's own section stands in its own file and derives from `StageConfig`; `recipe.py` reads whole recipes.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, numbers are numbers, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """How weights move."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw", description="What trains matrices: adamw, or muon as in pre-training; the rest is AdamW's."
    )
    lr: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    end_lr_share: float = Field(default=0.1, ge=0, le=1, description="Share of lr that a decay ends at.")
    warmup_steps: int = Field(default=10, ge=0, description="Steps of linear warm-up.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate after the warm-up: constant, linear or cosine to the last step."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled decay of matrices, embedding and norms.")
    clip: float = Field(default=1.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    adam_betas: tuple[_Decay, _Decay] = Field(default=(0.9, 0.95), description="Decay of AdamW's two moments.")
    adam_eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    muon_update_rms: float = Field(default=0.18, gt=0, description="Root mean square of a Muon update at rate 1.")

    def lr_at(self, step: int, total_steps: int | None) -> float:
        """Learning rate of step `step` (from 0) of `total_steps`; of an open end (None) it stays after the warm-up."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.decay == "constant" or total_steps is None:
            return self.lr
        share = min((step - self.warmup_steps) / max(total_steps - 1 - self.warmup_steps, 1), 1.0)
        left = 1 - share if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return self.lr * (self.end_lr_share + (1 - self.end_lr_share) * left)


class RunConfig(Section):
    """The run itself."""

    folder: str = Field(default="runs/posttrain", description="Folder that receives everything the run writes.")
    seed: int = Field(default=0, ge=0, description="Seed of data order and sampling.")
    threads: int = Field(default=0, ge=0, description="Threads to compute with; 0 means the machine's cores.")
    device: str = Field(default="cpu", description="Where to train: cpu, or the accelerator by torch's name.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Precision of activations and matrix products; trained weights stay fp32."
    )
    qat: Literal["none", "fp8", "fp4"] = Field(
        default="none",
        description="Compute with weights rounded as the released files hold them, experts in fp8 or fp4.",
    )
    loss_chunk: int = Field(default=1024, gt=0, description="Tokens whose logits exist at once.")
    checkpoint_minutes: float = Field(default=10.0, gt=0, description="Minutes between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="How many of the newest checkpoints stay.")
    log_every: int = Field(default=1, ge=1, description="Steps between lines of metrics.jsonl.")
    export_dtype: Literal["fp32", "bf16", "fp8", "fp4"] = Field(
        default="bf16", description="Precision of the model folder at the end; fp8 and fp4 as V4's files."
    )


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


class StageConfig(Section):
    """What all stages of a recipe have; each algorithm derives its own with `kind` as a literal."""

    kind: str = Field(description="Algorithm: sft, grpo or distill.")
    name: str = Field(default="", description="Name of the stage and of its folder; empty means number and kind.")
    optim: OptimConfig = Field(default=OptimConfig(), description="How weights move.")
    lora: LoraConfig | None = Field(default=None, description="Train an adapter in place of the weights.")
