"""A training run small enough for a test: a model of two layers, and rows made from a counter."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.train import Result, TrainConfig, load_config, train
from rorqual.train.feed import Continuation, Rows

SETTINGS = [
    "model.overrides={vocab_size=48, hidden_size=32, num_hidden_layers=2, compress_ratios=[0, 4, 0], "
    "num_attention_heads=2, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_lora_rank=16, "
    "n_routed_experts=4, moe_intermediate_size=32, sliding_window=8, index_topk=2, index_n_heads=2, "
    "index_head_dim=16, num_hash_layers=1}",
    "schedule={total_tokens=640, tokens_per_step=64, seq_lens=[[0.0, 32]], warmup_steps=2, dense_until=0.3}",
    "run.threads=1",
    "run.micro_batch_tokens=32",
    "run.log_every=1",
    "run.eval_every=0",
    "run.eval_tokens=64",
    "run.report=false",
]


class TinyFeed:
    """Rows that are a function of their number; `served` lists the numbers handed out, `before` is called with each."""

    def __init__(self) -> None:
        self.position = 0
        self.served: list[int] = []
        self.before: Callable[[int], None] = lambda number: None

    def next_rows(self, num_rows: int, seq_len: int) -> Rows:
        self.before(self.position)
        self.served.append(self.position)
        generator = torch.Generator().manual_seed(self.position)
        self.position += 1
        # Few distinct tokens in runs: something a model can learn in a few steps.
        tokens = torch.randint(0, 6, (num_rows, seq_len // 4), generator=generator).repeat_interleave(4, dim=1)
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        return Rows(tokens, labels, torch.zeros_like(tokens))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def token_counts(self) -> Tensor:
        return torch.ones(48)

    def token_byte_lengths(self) -> Tensor | None:
        return None

    def held_out(self, num_tokens: int, seq_len: int) -> Iterator[tuple[str, Rows]]:
        yield "invented", TinyFeed().next_rows(num_tokens // seq_len, seq_len)

    def continuation(self, text: str) -> Continuation | None:
        return None

    def save_artifacts(self, folder: str) -> None:
        pass


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
