"""Every recipe can be read, builds its network on no memory, and fits the processes it asks for."""

from pathlib import Path

import pytest
import torch

from rorqual.config import preset_names
from rorqual.data.tasks import evaluation_families, families, posttraining_families
from rorqual.model import Transformer
from rorqual.posttrain.recipe import load_recipe
from rorqual.posttrain.sft import SFTConfig
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


KNOWN = {*families(), *evaluation_families(), *posttraining_families()}


@pytest.mark.parametrize("path", sorted((RECIPES / "phases").glob("*.toml")), ids=lambda path: path.stem)
def test_a_phase_begins_from_weights_of_its_preset_and_names_families(path: Path) -> None:
    config = load_config([path])
    schedule = build_schedule(config)
    assert config.model.init_from is not None and config.model.preset == "minke"
    assert set(config.data.tasks.families) <= KNOWN
    assert schedule.tokens_per_step % schedule.seq_len(0) == 0
    assert schedule.tokens_per_step // schedule.seq_len(0) >= config.run.processes


def test_minke_is_tuned_on_families_that_there_are() -> None:
    stages = [*load_recipe(["minke-skills"]).stages, *load_recipe(["minke"]).stages]
    assert len(stages) == 3
    for stage in stages:
        assert isinstance(stage, SFTConfig)
        named = {source.family for source in stage.data if source.family is not None}
        assert named and named <= KNOWN
