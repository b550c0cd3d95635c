"""`rorqual tasks`: an agent on tasks that hidden tests judge, Terminal-Bench's and SWE-bench's."""

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rorqual.cli.options import MODEL, OUTPUT, Json, ModelOption

if TYPE_CHECKING:
    from rorqual.evals.agent_tasks import TaskRun

SET, SANDBOX = "Tasks", "Sandbox"


def tasks(
    source: Annotated[
        Path, typer.Argument(help="Folder of Terminal-Bench tasks, or SWE-bench's JSON Lines.", metavar="SET")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the results; the same one again goes on.", rich_help_panel=OUTPUT)
    ] = Path("runs/tasks"),
    only: Annotated[
        list[str] | None, typer.Option("--only", help="This task; may be repeated.", rich_help_panel=SET)
    ] = None,
    repos: Annotated[
        Path | None,
        typer.Option("--repos", help="For SWE-bench: folder of clones, OWNER__NAME each.", rich_help_panel=SET),
    ] = None,
    test_command: Annotated[
        str | None,
        typer.Option("--test-command", help="For SWE-bench: prints pytest's -rA lines.", rich_help_panel=SET),
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, help="Tasks at the same time.", rich_help_panel=SET)
    ] = 1,
    model: ModelOption = "minke",
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="For a URL: the model's name there.", rich_help_panel=MODEL)
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=2.0, help="0 for the likeliest token.", rich_help_panel=MODEL)
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every draw.", rich_help_panel=MODEL)] = 0,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1, help="Turns for a task.", rich_help_panel=SET)] = 50,
    kind: Annotated[
        Literal["container", "microvm", "vm"],
        typer.Option("--kind", help="Kind of sandbox.", rich_help_panel=SANDBOX),
    ] = "container",
    image: Annotated[
        str | None,
        typer.Option(
            "--image", help="Image in place of the tasks' own; this machine's /usr otherwise.", rich_help_panel=SANDBOX
        ),
    ] = None,
    memory: Annotated[int, typer.Option("--memory", min=64, help="In MiB.", rich_help_panel=SANDBOX)] = 2048,
    disk: Annotated[int, typer.Option("--disk", min=16, help="In MiB.", rich_help_panel=SANDBOX)] = 4096,
    as_json: Json = False,
) -> None:
    """Let an agent do tasks in sandboxes, and let hidden tests say how many it solved.

    \b
    rorqual tasks ~/terminal-bench/tasks --model http://127.0.0.1:8000 --parallel 4
    rorqual tasks swe.jsonl --repos ~/clones --image swe-python --model http://127.0.0.1:8000 --out runs/swe

    Each task is a run of `rorqual agent`: kill the command at any moment, and the same command goes on. Sandboxes have
    no network, so what a task installs must be in its --image.
    """
    from rorqual.agents import RunHooks, RunSettings
    from rorqual.evals.agent_tasks import read_tasks, run_tasks, summary

    options = {} if test_command is None else {"test_command": test_command}
    found = read_tasks(source.expanduser(), only=only or (), repos=repos, **options)
    sandbox: dict[str, Any] = {"memory_mb": memory, "disk_mb": disk, "max_lifetime": 86_400, "idle_ttl": 3600}
    if image is not None:
        sandbox["image"] = image
    settings = RunSettings(
        "-", model=model, model_name=model_name, temperature=temperature, seed=seed, max_turns=max_turns, kind=kind,
        sandbox=sandbox,
    )  # fmt: skip
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stopped.append(got))

    def show(one: "TaskRun") -> None:
        word = "not run" if one.score is None else "solved" if one.score >= 1 else f"score {one.score:g}"
        typer.echo(f"{one.task}: {word}, {one.turns} turns, {one.tokens} tokens {one.error}".rstrip(), err=True)

    outcomes = run_tasks(
        found, settings, out, parallel=parallel, on_done=show, hooks=lambda task: RunHooks(stop=lambda: bool(stopped))
    )
    result = summary(outcomes)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        low, high = result["interval"] or (0.0, 1.0)
        typer.echo(
            f"{result['solved']} of {result['judged']} solved (95 %: {low:.0%} to {high:.0%}), {result['tokens']} "
            f"tokens; {len(result['failed_to_run'])} could not be run. {out}"
        )
    if result["failed_to_run"]:
        raise typer.Exit(1)
