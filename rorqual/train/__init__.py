"""Training: recipes, Muon and AdamW, losses, router balance, schedules, a loop that resumes bit for bit."""

from rorqual.train.config import TrainConfig
from rorqual.train.loop import Result, train
from rorqual.train.recipe_file import load_config, to_toml

__all__ = ["Result", "TrainConfig", "load_config", "to_toml", "train"]
