"""Settings of an on-policy distillation stage: `kind = "distill"` in a recipe.

[[stages]]
kind = "distill"
steps = 300
prompts = [{domain = "math", source = "arith"}, {domain = "chat", source = "prompts.jsonl"}]
teachers = [
    {name = "math", model = "runs/math/model", domains = ["math"]},
    {name = "chat", model = "runs/chat/model", domains = ["chat"]},
]
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from rorqual.posttrain.config import OptimConfig, Section, StageConfig


class TeacherSection(Section):
    """One teacher."""

    name: str = Field(min_length=1, description="What it is called in figures.")
    model: str = Field(description="A bundled model, a folder of any layout, or a Hub id.")
    adapter: str | None = Field(default=None, description="Folder of a LoRA adapter on that model.")
    weight: float = Field(default=1.0, gt=0, description="Its importance: factor of its divergence.")
    domains: list[str] = Field(default=[], description="Domains of prompts it has a say on; empty for all.")
    weights: Literal["fp4", "fp4-int8", "fp4-bf16", "fp8", "int8", "bf16"] | None = Field(
        default=None, description="Packed format to run it in, which takes less memory."
    )
    qat: Literal["none", "fp8", "fp4", "run"] = Field(
        default="run", description="Rounding of its weights: none, fp8, fp4, or run: as the student's (run.qat)."
    )
    decisions: str | None = Field(
        default=None,
        description="JSON Lines file of a gate's decisions, {prompt, probability}: how likely the text below stands in "
        "for the teacher's own answer to the prompt of that id.",
    )
    decision_text: str = Field(default="I don't know.", description="What the gate answers in the teacher's place.")
    decision_slack: float = Field(
        default=1e-3, gt=0, lt=1, description="Share that the gate's answer leaves to the teacher at each id."
    )


class PromptSection(Section):
    """Where prompts come from."""

    domain: str = Field(default="", description="Domain of these prompts, by which teachers are chosen.")
    source: str = Field(
        description="A task family (arith, facts, tool, ...), or a JSON Lines file with messages (tools, thinking_mode "
        "and id beside them) or a prompt a line."
    )
    weight: float = Field(default=1.0, gt=0, description="Share of the prompts, relative to the other sources.")
    where: dict[str, list[Any]] = Field(
        default={}, description="Only a family's items whose stratum has one of these values, e.g. {kind = ['add']}."
    )
    mode: Literal["chat", "thinking", "any"] = Field(default="any", description="Only a family's items of this mode.")


class DistillConfig(StageConfig):
    """On-policy distillation, see `distill.py` for the equation."""

    kind: Literal["distill"] = Field(default="distill", description="Algorithm: on-policy distillation.")
    optim: OptimConfig = Field(default=OptimConfig(lr=1e-5, warmup_steps=10), description="How weights move.")
    teachers: list[TeacherSection] = Field(description="The teachers, in the order in which they are loaded.")
    prompts: list[PromptSection] = Field(description="Where prompts come from.")
    steps: int = Field(default=200, ge=1, description="Phases: sample, score, update.")
    prompts_per_step: int = Field(default=32, ge=1, description="Prompts of each phase.")
    answers: int = Field(default=1, ge=1, description="Answers that the student samples to each prompt.")
    minibatches: int = Field(default=1, ge=1, description="Updates that a phase's answers are spread over.")
    max_tokens: int = Field(default=256, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(default=1.0, gt=0, le=2, description="Temperature of sampling.")
    parallel: int = Field(default=32, ge=1, description="Answers that the engine draws at a time.")
    micro_batch_tokens: int = Field(default=4096, gt=0, description="Tokens forwarded at once, student and teachers.")
    cache_dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Precision of teachers' cached states; fp32 where teachers compute in it."
    )
    keep_rollouts: bool = Field(
        default=True, description="Write every token to a journal in the run folder, so that a kill loses none."
    )
    trainable: list[str] = Field(default=[], description="Parameters that move, by name or pattern; empty for all.")
    world: str = Field(default="", description="Id of the synthetic world; empty: that of the model's world.json.")

    @model_validator(mode="after")
    def _is_whole(self) -> "DistillConfig":
        if not self.teachers or not self.prompts:
            raise ValueError("a distill stage needs at least one teacher and one source of prompts")
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"two teachers share a name: {', '.join(names)}")
        taught = {domain for teacher in self.teachers for domain in teacher.domains}
        is_general = any(not teacher.domains for teacher in self.teachers)
        alone = sorted({prompt.domain for prompt in self.prompts} - taught)
        if alone and not is_general:
            raise ValueError(f"no teacher has a say on prompts of the domain {', '.join(map(repr, alone))}")
        idle = sorted(taught - {prompt.domain for prompt in self.prompts})
        if idle:
            raise ValueError(f"teachers name the domain {', '.join(map(repr, idle))}, of which there are no prompts")
        if self.minibatches > self.prompts_per_step:
            raise ValueError(f"minibatches ({self.minibatches}) exceed prompts_per_step ({self.prompts_per_step})")
        return self

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.steps * self.minibatches
