"""Options of `rorqual sandbox` that do not apply together are refused by name, before anything is looked for."""

import pytest

from rorqual.cli.app import main


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["sandbox", *words])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize(
    "written",
    [
        ["--kind", "container"],
        ["--driver", "runc"],
        ["--image", "debian-12"],
        ["--snapshot", "s"],
        ["--user", "agent"],
        ["--cpu", "1"],
        ["--memory-mb", "512"],
        ["--disk-mb", "1024"],
    ],
    ids=lambda words: words[0],
)
def test_a_shell_in_a_sandbox_that_is_there_takes_no_options_of_a_new_one(
    capsys: pytest.CaptureFixture[str], written: list[str]
) -> None:
    """Also where the value is the usual one: it was asked for."""
    told = refusal(capsys, "shell", "container-1a2b3c4d5e6f", *written)
    assert f"{written[0]}: of a new sandbox, and container-1a2b3c4d5e6f is there already" in told


def test_without_options_or_without_an_id_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["container-1a2b3c4d5e6f"], ["--kind", "microvm", "--cpu", "2"]):
        assert "needs a terminal" in refusal(capsys, "shell", *words)


@pytest.mark.parametrize("command", [["shell"], ["run", "true"]], ids=["shell", "run"])
def test_an_image_below_a_snapshot_is_refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    told = refusal(capsys, command[0], "--image", "debian-12", "--snapshot", "s-1", *command[1:])
    assert "--image debian-12 and --snapshot s-1 cannot be given together" in told
