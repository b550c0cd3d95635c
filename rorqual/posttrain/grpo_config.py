"""Settings of a GRPO stage: `kind = "grpo"` in a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rorqual.posttrain.config import OptimConfig, Section, StageConfig


class RewardSection(Section):
    """One term of a reward."""

    name: str = Field(description="Name of a reward (facts, arithmetic, code, ...), or dotted path of one's own.")
    weight: float = Field(default=1.0, description="Factor of this term in the sum.")
    options: dict[str, Any] = Field(default={}, description="What the reward is made with.")


class TaskSection(Section):
    """Where prompts come from, and what answers to them earn."""

    source: str = Field(
        description="A task family (arith, facts, needle, tool, code, ...), a JSON Lines file, or a dotted path to a "
        "function that takes a seed and yields items."
    )
    weight: float = Field(default=1.0, gt=0, description="Share of the prompts, relative to the other tasks.")
    rewards: list[RewardSection] = Field(
        default=[RewardSection(name="correct")], min_length=1, description="Terms of the reward, added up."
    )
    where: dict[str, list[Any]] = Field(
        default={}, description="Only items whose stratum has one of these values, e.g. {class = ['K-taught']}."
    )
    where_held_out: dict[str, list[Any]] = Field(
        default={}, description="The same for evaluations, e.g. people that no training asked about; empty: as `where`."
    )
    penalties: list[float] = Field(
        default=[], description="Prices of a wrong answer: one is drawn for each prompt and announced in it."
    )
    confidence: bool = Field(default=False, description="Ask for a stated confidence (the brier reward needs it).")
    budgets: list[int] = Field(default=[], description="Token budgets: one is drawn for each prompt and announced.")


class ModeSection(Section):
    """One effort mode: how prompts are put, and how long answers may be."""

    share: float = Field(default=1.0, ge=0, description="Share of the prompts, relative to the other modes.")
    window: int = Field(default=256, ge=1, description="Most tokens of an answer.")


class JudgingSection(Section):
    """The actor trained as a judge: earlier answers whose worth is known are judged, and agreement is rewarded."""

    share: float = Field(default=0.0, ge=0, lt=1, description="Share of a step's prompts that are judgements.")
    rubric: list[tuple[str, float]] = Field(
        default=[("Is the answer right?", 1.0)], description="Criteria and their weights."
    )


class SamplingSection(Section):
    """How answers are drawn."""

    temperature: float = Field(default=1.0, gt=0, le=2, description="Temperature; training scores with the same.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus; 1 keeps all tokens.")
    top_k: int | None = Field(default=None, ge=1, description="Most likely tokens kept; unset keeps all.")
    parallel: int = Field(default=32, ge=1, description="Answers that the engine draws at a time.")


class GRPOConfig(StageConfig):
    """Group relative policy optimisation, see `grpo.py` for the equations that beta, epsilon and delta stand in."""

    kind: Literal["grpo"] = Field(default="grpo", description="Algorithm: GRPO.")
    optim: OptimConfig = Field(
        default=OptimConfig(lr=3e-6, warmup_steps=0, decay="constant"), description="How weights move."
    )
    steps: int = Field(default=200, ge=1, description="Rollout phases.")
    max_staleness: int | None = Field(
        default=None,
        ge=0,
        description="Draw ahead while the trainer works: most phases between the weights that draw a token and those "
        "trained with it; unset: phases take turns. Keeps a second copy of the weights.",
    )
    group_size: int = Field(default=16, ge=2, description="Answers to each prompt.")
    prompts_per_step: int = Field(default=32, ge=1, description="Prompts of each rollout phase.")
    minibatches: int = Field(default=1, ge=1, description="Updates that a phase's answers are spread over.")
    epochs: int = Field(default=1, ge=1, description="Times that each answer is trained on.")
    beta: float = Field(default=0.001, ge=0, description="Weight of the KL to the reference; 0 keeps no reference.")
    epsilon: float = Field(default=0.2, gt=0, description="Distance from 1 at which ratios are clipped.")
    delta: float | None = Field(
        default=0.1, gt=0, description="Mean log(pi_old/pi_theta) above which punished answers are left out."
    )
    scale: bool = Field(default=False, description="Divide advantages by the group's standard deviation (R1's way).")
    kappa: float = Field(default=0.0, ge=0, description="Shift of abstentions' advantages, kappa(1-2p) (recipe R5).")
    keep_routing: bool = Field(default=True, description="Train with the experts that the engine used.")
    keep_sampling_mask: bool = Field(
        default=True, description="Renormalise over the tokens that the sampler's filters had left."
    )
    keep_rollouts: bool = Field(
        default=True, description="Write every token to a journal in the run folder, so that a kill loses none."
    )
    refresh_reference_every: int = Field(
        default=400, ge=0, description="Phases after which the reference becomes the policy; 0 for never."
    )
    micro_batch_tokens: int = Field(default=4096, gt=0, description="Tokens forwarded at once in training.")
    trainable: list[str] = Field(default=[], description="Parameters that move, by name or pattern; empty for all.")
    sampling: SamplingSection = Field(default=SamplingSection(), description="How answers are drawn.")
    modes: dict[str, ModeSection] = Field(
        default={"off": ModeSection()}, description="Effort modes: off (non-think), high, max; each with its window."
    )
    tasks: list[TaskSection] = Field(default=[], description="Where prompts come from.")
    judging: JudgingSection = Field(default=JudgingSection(), description="The actor's training as a judge.")
    eval_every: int = Field(default=20, ge=0, description="Phases between evaluations on held-out items; 0 for none.")
    eval_items: int = Field(default=64, ge=1, description="Held-out items of each task, answered greedily.")
    stop_at_retention_drop: float = Field(
        default=0.02, ge=0, description="Stop when this share of known facts is lost since the start; 0 never stops."
    )
    world: str = Field(default="", description="Id of the synthetic world; empty: that of the model's world.json.")

    @model_validator(mode="after")
    def _is_whole(self) -> GRPOConfig:
        if not self.tasks:
            raise ValueError("a GRPO stage needs at least one task: add [[...tasks]] with a source")
        unknown = set(self.modes) - {"off", "high", "max"}
        if unknown or not self.modes or not any(mode.share for mode in self.modes.values()):
            raise ValueError(f"modes are off, high and max with some share above 0, got {', '.join(self.modes)}")
        if self.max_staleness and self.judging.share:
            raise ValueError(
                "judging needs the answers of the phase before, which are not known yet when phases are drawn ahead: "
                "set max_staleness to 0 or leave it out, or judging.share to 0"
            )
        if self.minibatches > self.prompts_per_step:
            raise ValueError(f"minibatches ({self.minibatches}) exceed prompts_per_step ({self.prompts_per_step})")
        return self

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.steps * self.minibatches * self.epochs
