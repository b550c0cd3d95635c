"""The algorithms that a recipe can name, by the `kind` of a stage: its section, and what runs it."""

from rorqual.posttrain.sft import SFTConfig, run_sft
from rorqual.posttrain.stages import Stage

STAGES: dict[str, Stage] = {
    "sft": Stage(SFTConfig, run_sft),
}
