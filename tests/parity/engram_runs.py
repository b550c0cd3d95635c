"""Training runs of a network with Engram memories; a module of its own so that spawned ranks can import it."""

from pathlib import Path

import torch
from parallel_cases import CountingFeed, Layout, config
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.train import TrainConfig, train

STEPS = 5
DENSE = (
    "model.overrides.engram={layers=[1, 3], rows=61, orders=[2, 3], heads=2, head_dim=4, pad_token_id=40}",
    "optim.adam_eps=1e-8",  # rows that were hardly read move a full step otherwise, whatever their gradient's last bits
)
SPARSE = (DENSE[0].replace("pad_token_id", 'placement="host", pad_token_id'), DENSE[1], "optim.engram_sparse_above=10")

LAYOUTS = [
    Layout("dp2", 2, DENSE),
    Layout("cp2-sparse", 2, (*SPARSE, "parallel.cp=2")),
    Layout("pp2", 2, (*DENSE, "parallel.pp=2")),
    Layout("ep2-sparse", 2, (*SPARSE, "parallel.ep=2", 'parallel.recompute="block"')),
]


class CompressedFeed(CountingFeed):
    """Two ids each share a compressed one."""

    def token_compression(self) -> Tensor:
        return torch.arange(self.VOCAB) // 2


def build_feed(settings: TrainConfig, cfg: ModelConfig, folder: Path) -> CompressedFeed:
    return CompressedFeed()


def run_one(folder: Path, *settings: str) -> None:
    """A run; a folder that holds one already is continued."""
    train(config(folder, STEPS, *settings), resume=folder.exists(), build_feed=build_feed)


def run_all(folder: Path, layouts: list[Layout]) -> None:
    """One run after the other in these processes, each in the folder of its layout's name."""
    for layout in layouts:
        run_one(folder / layout.name, *layout.settings)
