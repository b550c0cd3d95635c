"""Options of `rorqual sandbox` that do not apply together are refused by name, before anything is looked for."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rorqual.agents.environment import Environment, EnvironmentSettings
from rorqual.agents.log import TrajectoryLog
from rorqual.cli.app import main
from rorqual.errors import SandboxError
from rorqual.journal import Journal
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.pool import Pool, Template


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


@pytest.mark.parametrize("below", [{"image": "debian-12"}, {"layers": ["0" * 64]}], ids=["image", "layers"])
def test_what_lies_below_a_snapshot_is_refused_by_the_sdk_too(below: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=f"{next(iter(below))}=.* and snapshot= cannot be given together"):
        asyncio.run(AsyncSandbox.create(snapshot="s-1", home=tmp_path, **below))
    assert not list(tmp_path.iterdir())


def test_a_pool_and_an_agent_that_go_back_to_a_snapshot_name_it_alone(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Made(Exception):
        """It was asked for."""

    def note(kind: str = "", **keywords: Any) -> None:
        asked.append({name: value for name, value in keywords.items() if name in ("image", "layers", "snapshot")})
        raise Made

    class Maker:
        create, list = staticmethod(note), staticmethod(list)

    async def make(**keywords: Any) -> Any:
        note(**keywords)

    options = {"image": "debian-12", "layers": ("0" * 64,)}
    with Journal(tmp_path / "journal") as journal:
        environment = Environment(Maker(), EnvironmentSettings(options=options), TrajectoryLog(journal), "t")  # type: ignore[arg-type]
        for snapshot in (None, "s-1"):
            with pytest.raises(Made):
                environment._make(snapshot)
            with pytest.raises(Made):
                asyncio.run(Pool(maker=make)._make(Template.of("container", **options), snapshot=snapshot))
    alone = {"snapshot": "s-1"}
    assert asked == [options, {**options, "snapshot": None}, alone, alone]
