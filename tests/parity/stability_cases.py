"""Runs with anticipatory routing, and runs that are hurt; a module of its own so that spawned ranks can import it."""

import math
from pathlib import Path
from typing import Any

import torch
from parallel_cases import CountingFeed, Layout, config

from rorqual.config import ModelConfig
from rorqual.train import TrainConfig, build, train
from rorqual.train.feed import Rows

HURT_AT = 5
"""Number of the batch at which the weights are broken, once."""


class HurtingFeed(CountingFeed):
    """Breaks the weights of this rank's model when batch `HURT_AT` is fetched for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.is_done = False
        self.model: torch.nn.Module | None = None

    def next_rows(self, num_rows: int, seq_len: int) -> Rows:
        if self.position == HURT_AT and not self.is_done and self.model is not None:
            self.is_done = True
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.view(-1)[:1] = math.nan
        return super().next_rows(num_rows, seq_len)


def run_hurt(folder: Path, layouts: list[Layout], steps: int) -> None:
    """One run after the other in these processes, each hurt once."""
    real = build.build_model
    try:
        for layout in layouts:
            feed = HurtingFeed()

            def remembering(*args: Any, feed: HurtingFeed = feed, **kwargs: Any) -> Any:
                result = real(*args, **kwargs)
                feed.model = result[0]
                return result

            def build_feed(
                config: TrainConfig, cfg: ModelConfig, folder: Path, feed: HurtingFeed = feed
            ) -> CountingFeed:
                return feed

            build.build_model = remembering
            train(config(folder / layout.name, steps, *layout.settings), build_feed=build_feed)
    finally:
        build.build_model = real
