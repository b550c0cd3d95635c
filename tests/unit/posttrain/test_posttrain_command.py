"""`rorqual posttrain` as a command: recipes by path and name, settings, what it prints, and its refusals."""

import json
from pathlib import Path

import pytest
from little_model import little_model

from rorqual.cli import main
from rorqual.errors import ConfigError
from rorqual.posttrain.recipe import find_recipe, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
[run]
threads = 1
[[stages]]
kind = "sft"
name = "words"
seq_len = 64
tokens_per_step = 128
data = [{path = "chat.jsonl"}]
[stages.optim]
lr = 1e-3
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "posttrain").mkdir(parents=True)
    (tmp_path / "recipes" / "posttrain" / "words.toml").write_text(RECIPE)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 6)
    return tmp_path


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["posttrain", *words])
    return int(end.value.code or 0)


def test_a_recipe_by_name_from_begin_to_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    little_model(here / "base")
    assert call("--recipe", "words", "--base", "base", "--run-dir", "run", "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "end" and events[-1]["finished"]
    assert Path(events[-1]["model_folder"]) == Path("run/01-words/model")
    assert (here / "run" / "01-words" / "model" / "tokenizer.json").is_file()
    assert call("--resume", "--run-dir", "run", "--quiet") == 0  # the folder knows its recipe
    assert capsys.readouterr().out == ""


def test_settings_reach_their_stage_and_the_shown_recipe_is_one(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    settings = ["--set", "stages.0.optim.lr=3e-4", "--set", "run.seed=7", "--set", "stages.0.epochs=2"]
    assert call("--recipe", "words", *settings, "--show-config") == 0
    shown = capsys.readouterr().out
    (here / "shown.toml").write_text(shown)
    again = load_recipe(["shown.toml"])
    assert again.to_toml() == shown
    assert again.stages[0].optim.lr == 3e-4 and again.config.run.seed == 7
    assert again.stages == load_recipe(["words"], ["stages.0.optim.lr=3e-4", "stages.0.epochs=2"]).stages


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (
        (["--recipe", "poems"], "recipes/posttrain holds"),
        (["--run-dir", "x"], "Nothing says what to do"),
        (["--recipe", "words", "--set", "stages.1.epochs=2"], "there are 1 stages"),
        (["--recipe", "words", "--set", "stages.0.epoch=2"], "did you mean epochs"),
        (["--recipe", "words", "--set", "run.colour=red"], "run.colour"),
        (["--recipe", "words", "--base", "nowhere/at/all", "--run-dir", "x"], "there is no model"),
    ):
        assert call(*words) in (1, 2)
        assert why in capsys.readouterr().err
    with pytest.raises(ConfigError, match="words"):
        find_recipe("verses")


def test_the_example_recipe_is_one() -> None:
    [stage] = load_recipe([Path(__file__).parents[3] / "recipes" / "posttrain" / "sft.toml"]).stages
    assert stage.kind == "sft" and stage.name == "tool"
