"""Training: recipes, Muon and AdamW, losses, router balance, schedules, a loop that resumes bit for bit."""

from rorqual.train.config import TrainConfig, load_config, to_toml
from rorqual.train.loop import Result, train

__all__ = ["Result", "TrainConfig", "load_config", "to_toml", "train"]
