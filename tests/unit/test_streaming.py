"""Experts streamed from disk: the logits of the model that is loaded whole, bit by bit, however small the cache."""

import threading
from pathlib import Path

import pytest
import torch
from small_models import build, packable_config

from rorqual import checkpoint
from rorqual.checkpoint.streaming import MemoryBudget
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Segment, Transformer
from rorqual.ops import registry

torch.set_num_threads(1)

CONFIG = packable_config()
TOKENS = torch.randint(0, CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
TOP = CONFIG.num_experts_per_tok


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One model as the released files store it, as the base ones do, and in bf16."""
    root = tmp_path_factory.mktemp("stored")
    model = build(CONFIG)
    for kind in ("fp4", "fp8"):
        checkpoint.save_official(model, root / kind, experts=kind)
    checkpoint.save_official(model, root / "bf16", dtype=torch.bfloat16)
    return {kind: root / kind for kind in ("fp4", "fp8", "bf16")}


def streamed(folder: Path, experts: int, weights: str | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model with a cache of so many experts."""
    return checkpoint.load_official(folder, weights=weights, dtype=dtype, memory=budget_for(folder, experts, weights)).eval()


def budget_for(folder: Path, experts: int, weights: str | None = None) -> MemoryBudget:
    probe = checkpoint.load_official(folder, weights=weights, memory=MemoryBudget(cache=1 << 30))
    return MemoryBudget(cache=experts * probe.expert_cache.reader.slot_bytes)


def decode(model: Transformer, tokens: torch.Tensor, prompt: int) -> list[torch.Tensor]:
    state = model.new_state(batch_size=tokens.shape[0])
    out = [model(tokens[:, :prompt], state=state)]
    return out + [model(tokens[:, i : i + 1], state=state) for i in range(prompt, tokens.shape[1])]


@pytest.mark.parametrize(("stored", "weights"), [("fp4", None), ("fp4", "int8"), ("fp8", None), ("bf16", "fp4"), ("bf16", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_logits_are_those_of_the_whole_model(folders, stored, weights, dtype):
    chosen = weights or stored
    whole = checkpoint.load_official(folders[stored], weights=chosen, dtype=dtype).eval()
    for experts in (1, 2, TOP + 1, 1000):
        model = streamed(folders[stored], experts, weights, dtype)
        assert torch.equal(model(TOKENS), whole(TOKENS)), experts
        for mine, theirs in zip(decode(model, TOKENS, 30), decode(whole, TOKENS, 30), strict=True):
            assert torch.equal(mine, theirs), experts
        stats = model.expert_cache.stats()
        assert stats.misses and stats.bytes_read and stats.resident_bytes <= stats.capacity_bytes


