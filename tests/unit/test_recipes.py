"""Every recipe can be read, builds its network on no memory, and fits the processes it asks for."""

from pathlib import Path

import pytest
import torch

from rorqual.config import preset_names
from rorqual.model import Transformer
from rorqual.train.build import check_layout
from rorqual.train.loop import build_schedule
from rorqual.train.recipe_file import load_config

RECIPES = Path(__file__).parents[2] / "recipes"
LAYERS = {"minke-engram": ["minke", "minke-engram"]}
"""Recipes that are laid over another."""


def test_every_preset_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(preset_names())


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_recipe(name: str) -> None:
    config = load_config([RECIPES / f"{layer}.toml" for layer in LAYERS.get(name, [name])])
    assert config.model.preset == name
    check_layout(config)
    schedule = build_schedule(config)
    assert schedule.total_steps() > schedule.warmup_steps
    assert schedule.lr(0, 0) < schedule.peak_lr == config.optim.lr
    longest = schedule.seq_len(schedule.total_tokens)
    assert schedule.seq_len(0) <= longest <= config.model.build().max_position_embeddings
    with torch.device("meta"):
        model = Transformer(config.model.build())
    assert all(p.is_meta for p in model.parameters())
    rows = schedule.tokens_per_step // longest
    replicas = config.run.processes // (config.parallel.pp * config.parallel.cp)
    assert rows >= replicas, "at the longest rows some replica would have none"
