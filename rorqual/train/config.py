"""What a training run is, as data: the sections of a recipe.

Every field has a sentence, which `rorqual train --show-config` prints. Unknown keys are refused, so a misspelt setting
never passes silently. Read from TOML by `recipe_file.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rorqual.config import ModelConfig
from rorqual.data.tasks import WorldSize


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Which network."""

    preset: str = Field(
        default="minke",
        description="Named architecture: minke, minke-engram, bryde, sei, fin, blue, v4-flash, v4-pro.",
    )
    config: str | None = Field(default=None, description="Path of a config.json to use instead of the preset.")
    overrides: dict[str, Any] = Field(default={}, description="Settings of the architecture to change.")
    init_from: str | None = Field(
        default=None,
        description="Folder of weights to start from instead of random ones; its tokenizer.json comes along.",
    )

    def build(self) -> ModelConfig:
        """The architecture. Raises ConfigError when it cannot be read or is impossible."""
        base = ModelConfig.from_file(self.config) if self.config else ModelConfig.preset(self.preset)
        return base.replace(**self.overrides) if self.overrides else base


class SourceSection(_Section):
    """One corpus of the mixture."""

    kind: Literal["python", "path", "jsonl"] = Field(
        description="python (the interpreter's sources), path (text file or folder), jsonl (a record a line)."
    )
    path: str | None = Field(default=None, description="File or folder of a path or jsonl corpus.")
    weight: float = Field(default=1.0, gt=0, description="Share of the training tokens, relative to the other parts.")
    fim_rate: float = Field(default=0.0, ge=0, le=1, description="Share of documents rearranged as fill-in-the-middle.")
    include_tests: bool = Field(default=False, description="Read the interpreter's test folders too (python only).")

    @model_validator(mode="after")
    def _path_fits(self) -> "SourceSection":
        if (self.path is None) != (self.kind == "python"):
            need = "takes no path" if self.kind == "python" else "needs a path"
            raise ValueError(f"a source of kind {self.kind!r} {need}")
        return self


class TasksSection(_Section):
    """Synthetic tasks in chat format."""

    weight: float = Field(default=0.0, ge=0, description="Share of the training tokens, relative to the sources.")
    families: dict[str, float] = Field(
        default={},
        description="Task families and their relative weights; empty means the usual ones, with their own shares.",
    )
    model_name: str = Field(default="Minke", description="What the model is taught to call itself.")
    world: str = Field(
        default="rorqual-world-1",
        description="Id of the synthetic world whose facts are taught; it travels with the model.",
    )
    world_size: WorldSize = Field(default="tiny", description="How many people that world has.")


class DataSection(_Section):
    """What the model reads."""

    sources: list[SourceSection] = Field(default=[SourceSection(kind="python")], description="Corpora of the mixture.")
    tasks: TasksSection = Field(default=TasksSection(), description="Synthetic task families.")
    tokenizer: str | None = Field(
        default=None,
        description="Folder or file of a tokenizer.json; without one, that of model.init_from, or a new BPE.",
    )
    tokenizer_sample_bytes: int = Field(
        default=20_000_000,
        gt=0,
        description="How much text a new tokenizer is trained on, and token counts are taken from.",
    )
    tokenizer_digits: int = Field(
        default=1,
        ge=1,
        description="Longest run of digits one new token may hold (V4: 3; small models add better with 1).",
    )
    held_out: float = Field(
        default=0.02, gt=0, lt=1, description="Share of the files kept away from training, for evaluation."
    )
    cache: str | None = Field(
        default=None, description="Folder for tokenized corpora; without one they go to the run folder."
    )


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimSection(_Section):
    """How weights move."""

    lr: float = Field(default=2e-3, gt=0, description="Peak learning rate of Muon and AdamW alike.")
    end_lr: float = Field(default=2e-4, ge=0, description="Learning rate at the end of the cosine.")
    matrix_optimizer: Literal["muon", "adamw"] = Field(
        default="muon", description="What trains the matrices: muon (V4), or adamw like all the rest (ablation)."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled decay of matrices, embedding, head and norms."
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="Momentum of Muon (Nesterov).")
    muon_update_rms: float = Field(
        default=0.18, gt=0, description="Root-mean-square of a Muon update at learning rate 1."
    )
    muon_steps: Literal["hybrid", "five"] = Field(
        default="hybrid",
        description="Newton-Schulz schedule: hybrid 8+2 (V4), or five plain steps (ablation).",
    )
    muon_dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Precision of Newton-Schulz: bf16 as in V4, fp32, or auto (fp32 on a CPU, bf16 elsewhere).",
    )
    adam_betas: tuple[_Decay, _Decay] = Field(default=(0.9, 0.95), description="Decay of AdamW's two moments.")
    adam_eps: float = Field(default=1e-20, gt=0, description="AdamW's epsilon for embedding, head and norms.")
    adam_bias_eps: float = Field(
        default=1e-8,
        gt=0,
        description="AdamW's epsilon for gates, sinks and biases (V4: 1e-20; small models drift with that).",
    )
    adam_lr_scale: float = Field(
        default=1.0, gt=0, description="Factor on the learning rate of everything AdamW trains."
    )
    engram_lr_scale: float = Field(
        default=5.0, gt=0, description="Factor on AdamW's learning rate for Engram tables, which are not decayed."
    )
    engram_sparse_above: int = Field(
        default=10_000_000, ge=0, description="Rows of an Engram table above which only those read are updated."
    )
    grad_clip: float = Field(
        default=1.0, gt=0, description="Global gradient norm above which gradients are scaled down."
    )


class ScheduleSection(_Section):
    """What changes on the way; fractions are of total_tokens."""

    total_tokens: int = Field(default=50_000_000, gt=0, description="Tokens to train on.")
    tokens_per_step: int = Field(default=16_384, gt=0, description="Tokens per optimizer step.")
    seq_lens: list[tuple[float, int]] = Field(
        default=[(0.0, 512)], description="Row length by fraction: [[0.0, 512], [0.9, 1024]]."
    )
    ramp_until: float = Field(
        default=0.0, ge=0, lt=1, description="Fraction over which the batch grows to its full size."
    )
    ramp_from: float = Field(default=0.2, gt=0, le=1, description="Share of the full batch that the ramp starts from.")
    warmup_steps: int = Field(default=100, ge=0, description="Steps of linear warm-up.")
    decay_from: float = Field(default=0.7, ge=0, le=1, description="Fraction where the cosine begins.")
    dense_until: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Fraction during which sparse attention reads every visible entry.",
    )
    index_warmup: float = Field(
        default=0.0,
        ge=0,
        description="Stage after dense_until in which only indexers learn: a fraction, or from 1 on a number of steps.",
    )
    index_warmup_lr: float = Field(default=1e-3, gt=0, description="Learning rate of that stage.")
    bias_off_from: float = Field(
        default=0.95, ge=0, le=1, description="Fraction after which router biases stand still."
    )

    @model_validator(mode="after")
    def _lengths_rise(self) -> "ScheduleSection":
        starts = [start for start, _ in self.seq_lens]
        if not starts or starts[0] != 0.0 or starts != sorted(set(starts)):
            raise ValueError(f"seq_lens must begin at 0.0 and rise, got {self.seq_lens}")
        if any(length < 4 for _, length in self.seq_lens):
            raise ValueError(f"seq_lens holds a row shorter than 4 tokens: {self.seq_lens}")
        return self


class LossSection(_Section):
    """Weights of the parts of the loss, and routing."""

    mtp: float = Field(default=0.3, ge=0, description="Weight of the multi-token-prediction loss.")
    mtp_end: float = Field(default=0.1, ge=0, description="Its weight once the learning rate decays.")
    balance: float = Field(
        default=1e-4, ge=0, description="Weight of the sequence-wise balance loss of each routed layer."
    )
    index: float = Field(default=1.0, ge=0, description="Weight of the indexers' own loss; at 0 they never learn.")
    bias_speed: float = Field(
        default=0.001, ge=0, description="Step of the router biases (0.003 to 0.01 for short runs)."
    )
    z: float = Field(
        default=0.0, ge=0, description="Weight of the output head's squared log-normaliser (z-loss; V4 has none)."
    )


class StabilitySection(_Section):
    """Loss spikes: noticing them, going back, and anticipatory routing afterwards."""

    detect: bool = Field(
        default=True, description="Go back to a good state by itself after a loss spike or a loss that is no number."
    )
    trigger: float = Field(
        default=6.0, gt=0, description="Standard deviations above the predicted loss from which a step is a spike."
    )
    onset: float = Field(
        default=2.0, gt=0, description="Standard deviations above which steps before a spike belong to it."
    )
    min_rise: float = Field(default=0.2, ge=0, description="Nats that a spike rises at least.")
    level_decay: _Decay = Field(default=0.97, description="Memory per step of the loss's level and variance.")
    trend_decay: _Decay = Field(default=0.9, description="Memory per step of the loss's trend.")
    warmup_steps: int = Field(default=100, ge=2, description="Steps that only feed the statistics.")
    lookback: int = Field(default=64, ge=1, description="Most steps that the begin of a spike is searched back.")
    cooldown_steps: int | None = Field(
        default=None,
        ge=0,
        description="Steps after a roll-back without another; unset: 500, at most a tenth of the run.",
    )
    max_rollbacks: int = Field(default=3, ge=0, description="Most roll-backs of a run.")
    lag: int | None = Field(
        default=None,
        ge=0,
        description="Steps that anticipatory routing chooses experts ahead; unset: 16, at most a hundredth of the run.",
    )
    active_steps: int | None = Field(
        default=None,
        ge=0,
        description="Steps of anticipatory routing after a roll-back; unset: 500, at most a tenth of the run; 0: none.",
    )
    active_from: int | None = Field(
        default=None, ge=0, description="Step at which anticipatory routing begins without any spike."
    )
    snapshot_every: int = Field(
        default=100, ge=0, description="Steps between good states kept in memory; 0 for checkpoints on disk only."
    )
    snapshot_gib: float = Field(
        default=4.0, ge=0, description="Memory per process for such states; a larger model uses checkpoints on disk."
    )


class QatSection(_Section):
    """Quantisation-aware training: computing with the weights that the exported model will have."""

    mode: Literal["none", "fp8", "fp4"] = Field(
        default="none",
        description="Format of the routed experts; with fp8 or fp4 other weights are rounded as in V4's files too.",
    )
    start: float = Field(default=0.0, ge=0, lt=1, description="Fraction of the tokens after which rounding begins.")
    activations: bool = Field(
        default=False,
        description="Round the inputs of FP8 and FP4 matrices too, not only KV entries, index queries and keys.",
    )


class RunSection(_Section):
    """The run itself."""

    folder: str = Field(default="runs/minke", description="Folder that receives everything the run writes.")
    seed: int = Field(default=0, ge=0, description="Seed of initial weights, data order and tasks.")
    threads: int = Field(
        default=0, ge=0, description="Threads per process; 0 means the machine's cores over the processes."
    )
    processes: int = Field(
        default=1, ge=1, description="Processes that `rorqual train` starts and shares the work among (--nproc)."
    )
    device: str = Field(default="cpu", description="Where to train: cpu, or the accelerator by torch's name.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Precision of activations and matrix products (weights, sums and mHC's coefficients stay fp32).",
    )
    micro_batch_tokens: int = Field(default=4096, gt=0, description="Tokens forwarded at once; a step adds up several.")
    loss_chunk: int = Field(default=1024, gt=0, description="Tokens whose logits exist at once in the cross-entropy.")
    checkpoint_every_s: float = Field(default=600.0, gt=0, description="Seconds between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="How many of the newest checkpoints stay.")
    log_every: int = Field(default=10, ge=1, description="Steps between lines of metrics.jsonl.")
    eval_every: int = Field(default=500, ge=0, description="Steps between held-out evaluations; 0 for the end only.")
    eval_tokens: int = Field(default=65_536, gt=0, description="Held-out tokens per evaluation.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Stop (and save) after this step although tokens remain; --resume forgets it."
    )
    sample_prompts: list[str] = Field(
        default=[], description="Texts continued greedily at every evaluation, into samples.txt."
    )
    sample_tokens: int = Field(default=64, ge=1, description="Length of each continuation.")
    report: bool = Field(default=True, description="Write report.html at evaluations and at the end.")
    export_dtype: Literal["fp32", "bf16", "fp8", "fp4"] = Field(
        default="bf16",
        description="Precision of the exported model folder; fp8 and fp4 as V4's base and released files.",
    )


class ParallelSection(_Section):
    """How the processes share the work; dp x cp x pp is their number."""

    dp: int = Field(default=0, ge=0, description="Replicas, each with its own rows; 0 is what cp and pp leave.")
    cp: int = Field(default=1, ge=1, description="Processes that one sequence is cut among (context parallelism).")
    pp: int = Field(default=1, ge=1, description="Stages that the layers are cut into (pipeline parallelism).")
    ep: int = Field(
        default=1, ge=1, description="Processes that the experts are spread over; divides dp x cp (expert parallelism)."
    )
    zero: bool = Field(
        default=True, description="Each replica keeps and updates its share of the optimizer state (ZeRO)."
    )
    waves: int = Field(
        default=1, ge=1, description="Groups of experts whose exchange overlaps their computation; 1 does not overlap."
    )
    recompute: Literal["none", "mhc", "block"] = Field(
        default="none", description="What the backward pass computes again to save memory: none, mhc, block."
    )


class TrainConfig(_Section):
    """A whole recipe."""

    model: ModelSection = Field(default=ModelSection(), description="Which network.")
    data: DataSection = Field(default=DataSection(), description="What it reads.")
    optim: OptimSection = Field(default=OptimSection(), description="How weights move.")
    schedule: ScheduleSection = Field(default=ScheduleSection(), description="What changes on the way.")
    loss: LossSection = Field(default=LossSection(), description="Parts of the loss, routing.")
    stability: StabilitySection = Field(default=StabilitySection(), description="What happens when the loss spikes.")
    qat: QatSection = Field(default=QatSection(), description="Quantisation-aware training.")
    run: RunSection = Field(default=RunSection(), description="The run itself.")
    parallel: ParallelSection = Field(default=ParallelSection(), description="How processes share the work.")

    @model_validator(mode="after")
    def _export_is_what_was_trained(self) -> "TrainConfig":
        if self.qat.mode != "none" and self.run.export_dtype not in ("fp32", "bf16", self.qat.mode):
            raise ValueError(
                f"run.export_dtype {self.run.export_dtype} is not what qat.mode {self.qat.mode} trains for; "
                f"use {self.qat.mode}, bf16 or fp32"
            )
        return self
