"""Recipes: layering, --set, errors that name the setting, round trip through TOML, what may change."""

from pathlib import Path

import pytest

from rorqual.errors import ConfigError
from rorqual.train import TrainConfig, load_config, to_toml
from rorqual.train.recipe_file import validate
from rorqual.train.settings import HARMLESS, breaking_changes, flatten, layout_changes

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("minke*.toml"))


def test_layers_and_settings_win_from_left_to_right(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[optim]\nlr = 0.1\nweight_decay = 0.2\n[run]\nseed = 3\n")
    (tmp_path / "b.toml").write_text("[optim]\nlr = 0.05\n")
    config = load_config([tmp_path / "a.toml", tmp_path / "b.toml"], ["run.seed=7", "run.folder=out/x"])
    assert (config.optim.lr, config.optim.weight_decay, config.run.seed) == (0.05, 0.2, 7)
    assert config.run.folder == "out/x"  # no quotes needed


def test_settings_take_toml_values() -> None:
    config = load_config(
        settings=[
            "schedule.seq_lens=[[0.0, 64], [0.5, 128]]",
            "optim.adam_eps=1e-20",
            "model.overrides.vocab_size=512",
            'data.sources=[{kind="path", path="x y"}]',
        ]
    )
    assert config.schedule.seq_lens == [(0.0, 64), (0.5, 128)]
    assert config.optim.adam_eps == 1e-20
    assert config.model.build().vocab_size == 512
    assert config.data.sources[0].path == "x y"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.lrr=1"], r"optim.lrr: there is no such setting; did you mean lr\?"),
        (["optimm.lr=1"], r"optimm: there is no such setting; did you mean optim\?"),
        (["optim.lr=-1"], r"optim.lr: Input should be greater than 0 \(got -1\)"),
        (["run.dtype=fp16"], r"run.dtype: Input should be 'fp32' or 'bf16' \(got 'fp16'\)"),
        (["optim.lr"], r"has no '='.*Write --set optim.lr=1e-3"),
        (["optim.lr=inf"], r"optim.lr: Input should be a finite number \(got inf\)"),
        (["optim.adam_betas=[0.9, 1.0]"], r"optim.adam_betas.1: Input should be less than 1"),
        (["schedule.seq_lens=[[nan, 64]]"], r"schedule.seq_lens.0.0: Input should be a finite number"),
        (["schedule.seq_lens=[[0.5, 64]]"], "seq_lens must begin at 0.0 and rise"),
        (['data.sources=[{kind="path"}]'], "a source of kind 'path' needs a path"),
        (["optim.lr=fast", "run.seed=x"], r"(?s)optim.lr: .*run.seed: "),
    ],
)
def test_bad_settings_name_the_fault_and_the_cure(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(settings=settings)


def test_unreadable_recipes_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the recipe .*nowhere.toml: No such file"):
        load_config([tmp_path / "nowhere.toml"])
    (tmp_path / "bad.toml").write_text("lr = = 3\n")
    with pytest.raises(ConfigError, match=r"bad.toml is not valid TOML"):
        load_config([tmp_path / "bad.toml"])


def test_impossible_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="o_groups"):
        load_config(settings=["model.overrides.o_groups=3"]).model.build()


@pytest.mark.parametrize(
    "settings", [[], ['run.folder="a\\"b\\\\c"', "run.max_steps=3"], ['run.folder="a\\r\\u0001\\u007f\\nb"']]
)
def test_resolved_config_round_trips_through_toml(tmp_path: Path, settings: list[str]) -> None:
    config = load_config(RECIPES[:1], settings)
    (tmp_path / "config.toml").write_text(to_toml(config))
    again = load_config([tmp_path / "config.toml"])
    assert again == config
    assert validate(config.model_dump(mode="json")) == config


def test_every_setting_has_a_sentence() -> None:
    lines = to_toml(TrainConfig()).splitlines()
    for i, line in enumerate(lines):
        if "=" in line and not line.startswith(("#", "[")):
            assert lines[i - 1].startswith("# ") and lines[i - 1].endswith("."), line


def test_only_changes_that_move_weights_break_a_resume() -> None:
    config = TrainConfig()
    assert set(flatten(config)) >= HARMLESS
    other = load_config(settings=["run.log_every=99", "run.folder=elsewhere", "run.max_steps=3"])
    assert breaking_changes(config, other) == []
    other = load_config(settings=["optim.lr=0.1", "run.processes=2", "parallel.ep=2"])
    assert breaking_changes(config, other) == ["optim.lr: 0.002 -> 0.1"]
    assert layout_changes(config, other) == ["parallel.ep: 1 -> 2", "run.processes: 1 -> 2"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_load(recipe: Path) -> None:
    config = load_config([recipe])
    assert config.model.build().vocab_size > 0
