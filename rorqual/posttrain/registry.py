"""The algorithms that a recipe can name, by the `kind` of a stage: its section, and what runs it."""

from rorqual.posttrain.distill_config import DistillConfig
from rorqual.posttrain.distill_run import run_distill
from rorqual.posttrain.grpo_config import GRPOConfig
from rorqual.posttrain.grpo_run import run_grpo
from rorqual.posttrain.sft import SFTConfig, run_sft
from rorqual.posttrain.stages import Stage

STAGES: dict[str, Stage] = {
    "sft": Stage(SFTConfig, run_sft),
    "grpo": Stage(GRPOConfig, run_grpo),
    "distill": Stage(DistillConfig, run_distill),
}
