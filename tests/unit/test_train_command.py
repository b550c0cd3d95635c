"""`rorqual train` on the command line: help, the resolved config, and requests that say too little."""

from pathlib import Path

import pytest

from rorqual.cli import main
from rorqual.train.recipe_file import load_config


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    return int(ended.value.code or 0)


def test_help_starts_with_a_sentence_and_two_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    assert text.index("Train a model from a recipe") < text.index("rorqual train --recipe recipes/minke.toml")
    assert text.count("rorqual train --") == 2
    for panel in ("What to train", "Where, and going on", "Output"):
        assert panel in text


def test_show_config_prints_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--preset", "bryde", "--data", 'a "b"', "--data", "c.jsonl", "-s", "optim.lr=0.5", "--show-config") == 0
    (tmp_path / "shown.toml").write_text(capsys.readouterr().out)
    shown = load_config([tmp_path / "shown.toml"])
    assert shown.model.preset == "bryde" and shown.optim.lr == 0.5
    assert [(s.kind, s.path) for s in shown.data.sources] == [("path", 'a "b"'), ("jsonl", "c.jsonl")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing says what to train"),
        (["--recipe", "nowhere.toml"], "Cannot read the recipe nowhere.toml"),
        (["--preset", "orca", "--run-dir", "unused"], "no preset named 'orca'"),
        (["--set", "optim.lrr=1"], "did you mean lr?"),
    ],
)
def test_wrong_requests_exit_with_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err


def test_resuming_reads_the_recipe_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a \\ b"
    folder.mkdir()
    (folder / "config.toml").write_text('[optim]\nlr = 0.5\n[run]\nfolder = "where it was"\n')
    for where in (("--run-dir", str(folder)), ("--set", f"run.folder='{folder}'")):
        assert call("--resume", *where, "--show-config") == 0
        (tmp_path / "shown.toml").write_text(capsys.readouterr().out)
        shown = load_config([tmp_path / "shown.toml"])
        assert shown.optim.lr == 0.5 and shown.run.folder == str(folder)
