"""A training run small enough for a test: a model of two layers, and rows that are a function of their number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numbered_feed import NumberedFeed, one_document

from rorqual.config import ModelConfig
from rorqual.train import Result, TrainConfig, load_config, train
from rorqual.train.feed import Rows

MODEL = (
    "model.overrides={vocab_size=48, hidden_size=32, num_hidden_layers=2, compress_ratios=[0, 4, 0], "
    "num_attention_heads=2, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_lora_rank=16, "
    "n_routed_experts=4, moe_intermediate_size=32, sliding_window=8, index_topk=2, index_n_heads=2, "
    "index_head_dim=16, num_hash_layers=1}"
)
"""The network of two layers; later settings may change it key by key."""

SETTINGS = [
    MODEL,
    "schedule={total_tokens=640, tokens_per_step=64, seq_lens=[[0.0, 32]], warmup_steps=2, dense_until=0.3}",
    "run.threads=1",
    "run.micro_batch_tokens=32",
    "run.log_every=1",
    "run.eval_every=0",
    "run.eval_tokens=64",
    "run.report=false",
]


class TinyFeed(NumberedFeed):
    """`served` lists the numbers of the batches handed out, `before` is called with each."""

    def __init__(self) -> None:
        super().__init__()
        self.served: list[int] = []
        self.before: Callable[[int], None] = lambda number: None

    def next_rows(self, num_rows: int, seq_len: int) -> Rows:
        self.before(self.position)
        self.served.append(self.position)
        return one_document(self.draw(num_rows, seq_len))


def tiny_config(folder: Path, *settings: str) -> TrainConfig:
    return load_config(settings=[*SETTINGS, f'run.folder="{folder}"', *settings])


def tiny_run(folder: Path, *settings: str, feed: TinyFeed | None = None, **kwargs: Any) -> Result:
    def build(config: TrainConfig, cfg: ModelConfig, folder: Path) -> TinyFeed:
        return feed or TinyFeed()

    return train(tiny_config(folder, *settings), build_feed=build, **kwargs)


def records(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest_files(folder: Path) -> list[bytes]:
    """Weights and optimizer of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    return [(newest / name).read_bytes() for name in ("weights.safetensors", "optimizer.safetensors")]
