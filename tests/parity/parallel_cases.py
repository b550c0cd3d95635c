"""Small training runs for the parallel checks; a module of its own so that spawned ranks can import it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numbered_feed import NumberedFeed
from tiny_run import MODEL, records

from rorqual.config import ModelConfig
from rorqual.train import TrainConfig, load_config, train
from rorqual.train.feed import Rows

NETWORK = [
    MODEL,
    "model.overrides.num_hidden_layers=4",
    "model.overrides.compress_ratios=[0, 4, 8, 4, 0]",
    "model.overrides.n_routed_experts=8",
]


@dataclass(frozen=True)
class Layout:
    """How many processes share a run, and how."""

    name: str
    processes: int
    settings: tuple[str, ...]
    is_quick: bool = True
    """Whether the quick checks run it; the slow ones run all."""


LAYOUTS = [
    Layout("dp2", 2, ("parallel.zero=false",)),
    Layout("dp2-zero", 2, ()),
    Layout("ep2", 2, ("parallel.ep=2", "parallel.zero=false")),
    Layout("ep2-waves", 2, ("parallel.ep=2", "parallel.waves=2")),
    Layout("dp4-zero", 4, (), is_quick=False),
    Layout("ep4", 4, ("parallel.ep=4", "parallel.zero=false"), is_quick=False),
    Layout("ep2-dp2", 4, ("parallel.ep=2", "parallel.zero=false")),
    Layout("ep2-zero", 4, ("parallel.ep=2",)),
    Layout("cp2", 2, ("parallel.cp=2",)),
    Layout("pp2", 2, ("parallel.pp=2",)),
    Layout("cp2-ep2", 2, ("parallel.cp=2", "parallel.ep=2"), is_quick=False),
    Layout("cp4", 4, ("parallel.cp=4", "parallel.zero=false"), is_quick=False),
    Layout("pp4", 4, ("parallel.pp=4",), is_quick=False),
    Layout("cp2-pp2", 4, ("parallel.cp=2", "parallel.pp=2", 'parallel.recompute="block"')),
    Layout("pp2-ep2", 4, ("parallel.pp=2", "parallel.ep=2"), is_quick=False),
    Layout("dp2-cp2", 4, ("parallel.dp=2", "parallel.cp=2", 'parallel.recompute="mhc"'), is_quick=False),
]
"""Every way to share a run out; the checks of `test_parallel_training.py` run them all."""


class CountingFeed(NumberedFeed):
    """Rows of two documents, where the second begins after a third of them."""

    DISTINCT = 12

    def next_rows(self, num_rows: int, seq_len: int) -> Rows:
        tokens = self.draw(num_rows, seq_len)
        segments = (torch.arange(seq_len) >= seq_len // 3).long().expand(num_rows, -1).clone()
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = torch.where(segments[:, 1:] == segments[:, :-1], tokens[:, 1:], -100)
        return Rows(tokens, labels, segments)

    def held_out(self, num_tokens: int, seq_len: int) -> Iterator[tuple[str, Rows]]:
        for name, position in (("one", 1000), ("two", 2000)):
            feed = CountingFeed()
            feed.position = position
            yield name, feed.next_rows(3, seq_len)


def build_feed(config: TrainConfig, cfg: ModelConfig, folder: Path) -> CountingFeed:
    return CountingFeed()


def config(folder: Path, steps: int, *settings: str) -> TrainConfig:
    """Rows of 24 tokens (then 32), seven a step (odd on purpose), two forwarded at once."""
    return load_config(
        settings=[
            *NETWORK,
            f"schedule={{total_tokens={168 * steps}, tokens_per_step=168, seq_lens=[[0.0, 24]], warmup_steps=3}}",
            "schedule.dense_until=0.3",
            "loss.balance=0.01",
            "loss.bias_speed=0.01",
            "run.threads=1",
            "run.micro_batch_tokens=48",
            "run.log_every=1",
            f"run.eval_every={max(steps // 2, 1)}",
            "run.eval_tokens=64",
            "run.report=false",
            'run.sample_prompts=["a"]',
            "run.sample_tokens=3",
            'run.export_dtype="fp32"',
            f'run.folder="{folder}"',
            *settings,
        ]
    )


def run_all(folder: Path, layouts: list[Layout], steps: int) -> None:
    """One run after the other in these processes, each in the folder of its layout's name.

    A folder that holds a run already is continued.
    """
    for layout in layouts:
        settled = config(folder / layout.name, steps, *layout.settings)
        train(settled, resume=(folder / layout.name).exists(), build_feed=build_feed)


def curve(folder: Path) -> dict[int, dict[str, Any]]:
    """The steps of `metrics.jsonl`."""
    return {r["step"]: r for r in records(folder) if "lm" in r}


def held_out(folder: Path) -> dict[str, float]:
    """Nats per token of the last evaluation."""
    last = next(r for r in reversed(records(folder)) if "held_out" in r)
    return {name: group["nats_per_token"] for name, group in last["held_out"].items()}
