"""One run from its folder, in one process over a stand-in sandbox: how it ends, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
from local_sandbox import Files, Maker
from typer.testing import CliRunner

from rorqual.agents import (
    AgentError,
    InfraFailed,
    Preempted,
    RunFolder,
    RunHooks,
    RunSettings,
    Tool,
    create_run,
    run_agent,
)
from rorqual.agents.report import summary_of
from rorqual.agents.tools import Outcome, ToolContext
from rorqual.agents.tools.base import schema
from rorqual.cli import build_app
from rorqual.errors import ConfigError
from rorqual.sandbox.errors import PolicyRejected

REPLIES = [
    {"calls": [{"name": "shell", "arguments": {"command": "echo made > out/made.txt"}}]},
    {"content": "It is made."},
]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))
    path = tmp_path / "replies.json"
    path.write_text(json.dumps({"replies": REPLIES}))
    return path


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path / "sandboxes")


def new_run(script: Path, **more: Any) -> RunFolder:
    return create_run(RunSettings("Make it.", script=str(script), **more), "run")


def test_files_that_cannot_be_had_do_not_cost_the_answer(
    script: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Files, *args: Any, **options: Any) -> None:
        raise PolicyRejected("out/link leads out of the folder")

    monkeypatch.setattr(Files, "download", refuse)
    run = new_run(script)
    for _ in range(2):  # the second time from the record
        result = run_agent(run, RunHooks(maker=maker))
        assert (result.answer.text, result.files) == ("It is made.", [])
        assert result.note.endswith("out/link leads out of the folder")
    assert maker.list() == []


def test_a_folder_that_cannot_be_written_is_told_and_mended(script: Path, maker: Maker, tmp_path: Path) -> None:
    run = new_run(script, out=str(tmp_path / "results" / "here"))
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(AgentError, match="cannot be written to .*here"):
        run_agent(run, RunHooks(maker=maker))
    (tmp_path / "results").unlink()
    result = run_agent(run, RunHooks(maker=maker))
    assert result.files == [tmp_path / "results" / "here" / "made.txt"] and result.note == ""


def test_a_failed_run_leaves_no_sandbox(script: Path, maker: Maker) -> None:
    def fail(arguments: Any, context: ToolContext) -> Outcome:
        raise InfraFailed("nobody knows")

    script.write_text(json.dumps({"replies": [REPLIES[0], {"calls": [{"name": "fail", "arguments": {}}]}]}))
    tools = (Tool("fail", "Fail.", schema(), "external", fail),)
    with pytest.raises(InfraFailed, match="nobody knows"):
        run_agent(new_run(script), RunHooks(maker=maker, more_tools=tools))
    assert maker.made == 1 and maker.list() == []


def test_a_run_is_read_although_its_files_are_gone(script: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    run = new_run(script, files=str(tmp_path / "in"))
    (tmp_path / "in").rmdir()
    assert (run.settings.task, summary_of(run)["state"]) == ("Make it.", "new")
    with pytest.raises(ConfigError, match="--files .* is no folder"):
        run.settings.check()


def test_files_that_are_gone_are_asked_for_when_a_sandbox_is_made(script: Path, maker: Maker, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    run = new_run(script, files=str(tmp_path / "in"))
    (tmp_path / "in").rmdir()
    with pytest.raises(AgentError, match="no folder any more"):
        run_agent(run, RunHooks(maker=maker))
    (tmp_path / "in").mkdir()
    assert run_agent(run, RunHooks(maker=maker)).answer.text == "It is made."


def test_one_unreadable_run_does_not_hide_the_others(script: Path) -> None:
    broken = new_run(script).path / "settings.json"
    broken.write_text("{")
    create_run(RunSettings("Another.", script=str(script)), "other")
    listed = CliRunner().invoke(build_app(["agent"]), ["agent", "list", "--json"])
    states = {row["name"]: row["state"] for row in json.loads(listed.stdout)}
    assert states == {"run": "unreadable", "other": "new"}


def test_an_output_folder_that_cannot_be_is_refused_first(script: Path) -> None:
    with pytest.raises(ConfigError, match="--out .* cannot be written to"):
        new_run(script, out=str(script / "below"))


def test_a_name_is_free_when_its_run_was_killed_before_it_was_one(script: Path) -> None:
    run = new_run(script)
    with pytest.raises(ConfigError, match="there is a run 'run' already"):
        new_run(script)
    (run.path / "settings.json").unlink()
    assert new_run(script).settings.task == "Make it."


def test_another_prompt_is_told_and_does_not_end_the_run(script: Path, maker: Maker) -> None:
    run = new_run(script)
    tools = (Tool("more", "More.", schema(), "rerun", lambda arguments, context: Outcome.text("")),)
    with pytest.raises(Preempted):
        run_agent(run, RunHooks(maker=maker, stop=lambda: True))
    with pytest.raises(AgentError, match="began with another prompt"):
        run_agent(run, RunHooks(maker=maker, more_tools=tools))
    assert run_agent(run, RunHooks(maker=maker)).answer.text == "It is made."


def resume(*options: str) -> str:
    ended = CliRunner().invoke(build_app(["agent"]), ["agent", "run", "--resume", "--name", "run", *options])
    return f"{ended.exception or ''}{ended.output}"


def test_options_at_a_resume_are_taken_or_refused_and_never_dropped(
    script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rorqual.cli.agent._run", lambda *args, **options: None)
    run = new_run(script, max_turns=5, sandbox={"memory_mb": 512})
    assert "the run run has seed 0, and 3 was given" in resume("--seed", "3")
    assert "has task 'Make it.'" in resume("Other.")
    assert "has sandbox" in resume("--memory", "1024")
    assert "add --accept-new-weights" in resume("--model", "other")
    assert "can only become more" in resume("--max-turns", "4")
    assert run.settings.max_turns == 5
    assert resume("--max-turns", "9", "--out", str(tmp_path / "there"), "--seed", "0", "--memory", "512") == ""
    assert (run.settings.max_turns, run.settings.out) == (9, str(tmp_path / "there"))
    assert resume("--model", "other", "--accept-new-weights") == ""
    assert (run.settings.model, run.settings.script) == ("other", None)


def test_a_run_that_ended_takes_no_other_options(script: Path, maker: Maker, tmp_path: Path) -> None:
    run = new_run(script)
    run_agent(run, RunHooks(maker=maker))
    assert "cannot change any more" in resume("--out", str(tmp_path / "there"))
    assert run.settings.out is None
