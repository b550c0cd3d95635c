"""`rorqual agent`: tasks done by a model with tools in a sandbox, which survive whatever kills them."""

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rorqual.cli.options import MODEL, OUTPUT, Json, ModelOption
from rorqual.errors import ConfigError, RorqualError

if TYPE_CHECKING:
    from rorqual.agents import Observer, RunFolder, RunSettings
    from rorqual.agents.cost import Meter
    from rorqual.agents.run import RunResult

RUN, SANDBOX, MAIL = "The run", "Sandbox and files", "Mail"


def agent(
    ctx: typer.Context,
    action: Annotated[Literal["run", "show", "list"], typer.Argument(help="What to do.", metavar="ACTION")],
    task: Annotated[
        str | None, typer.Argument(help="For run: what is to be done. For show: name of the run.", metavar="TASK")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the run; the time and a few digits otherwise.", rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run of --name, or the newest unfinished one of this task; begin it if there is none.",
            rich_help_panel=RUN,
        ),
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Resume although a process that hangs still holds it.", rich_help_panel=RUN),
    ] = False,
    model: ModelOption = "minke",
    model_name: Annotated[
        str | None,
        typer.Option(
            "--model-name", help="For a URL: the model's name there; its first otherwise.", rich_help_panel=MODEL
        ),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option("--script", help="Recorded replies (JSON) in place of a model.", rich_help_panel=MODEL),
    ] = None,
    pace: Annotated[
        float, typer.Option("--pace", min=0.0, help="Seconds between a script's tokens.", rich_help_panel=MODEL)
    ] = 0.0,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=2.0, help="0 for the likeliest token.", rich_help_panel=MODEL)
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every draw of the run.", rich_help_panel=MODEL)] = 0,
    accept_new_weights: Annotated[
        bool,
        typer.Option(
            "--accept-new-weights", help="Resume with another model; the record says where.", rich_help_panel=MODEL
        ),
    ] = False,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1, help="Turns of the model.", rich_help_panel=RUN)] = 50,
    turn_tokens: Annotated[
        int, typer.Option("--turn-tokens", min=1, help="Most tokens of one turn.", rich_help_panel=RUN)
    ] = 8192,
    total_tokens: Annotated[
        int, typer.Option("--total-tokens", min=1, help="Most tokens that the model writes.", rich_help_panel=RUN)
    ] = 131_072,
    kind: Annotated[
        Literal["function", "container", "microvm", "vm"],
        typer.Option("--kind", help="Kind of sandbox.", rich_help_panel=SANDBOX),
    ] = "container",
    driver: Annotated[
        str | None,
        typer.Option("--driver", help="Its driver; the first that works otherwise.", rich_help_panel=SANDBOX),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", help="Its image; it needs python3.", rich_help_panel=SANDBOX)
    ] = None,
    memory: Annotated[int, typer.Option("--memory", min=64, help="Its memory in MiB.", rich_help_panel=SANDBOX)] = 1024,
    idle: Annotated[
        int, typer.Option("--idle", min=1, help="Seconds it is kept while nobody drives it.", rich_help_panel=SANDBOX)
    ] = 86_400,
    files: Annotated[
        Path | None, typer.Option("--files", help="Folder with what the task is about.", rich_help_panel=SANDBOX)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for what it makes; the run's own otherwise.", rich_help_panel=SANDBOX),
    ] = None,
    skills: Annotated[
        list[Path] | None,
        typer.Option("--skills", help="Folder of skills; may be repeated.", rich_help_panel=SANDBOX),
    ] = None,
    mcp: Annotated[
        Path | None, typer.Option("--mcp", help="JSON file of MCP servers.", rich_help_panel=SANDBOX)
    ] = None,
    smtp: Annotated[
        str | None, typer.Option("--smtp", help="HOST:PORT of your mail server.", rich_help_panel=MAIL)
    ] = None,
    mail_to: Annotated[
        list[str] | None,
        typer.Option(
            "--mail-to", help="Address that mail may go to, yours first; may be repeated.", rich_help_panel=MAIL
        ),
    ] = None,
    mail_from: Annotated[
        str | None, typer.Option("--mail-from", help="Sender; the first --mail-to otherwise.", rich_help_panel=MAIL)
    ] = None,
    smtp_user: Annotated[
        str | None,
        typer.Option("--smtp-user", help="Log in; the password is in RORQUAL_SMTP_PASSWORD.", rich_help_panel=MAIL),
    ] = None,
    smtp_security: Annotated[
        Literal["none", "starttls", "tls"],
        typer.Option("--smtp-security", help="Of the connection.", rich_help_panel=MAIL),
    ] = "none",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Nothing but the answer.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Do a task with tools in a sandbox: rorqual agent [run TASK | show NAME | list].

    \b
    rorqual agent run "Which of my PDFs mention 2025?" --files ~/papers --model http://127.0.0.1:8000
    rorqual agent run --resume --name 20261129-101500-3fa9c1
    rorqual agent show 20261129-101500-3fa9c1

    A run can be killed at any moment and goes on where it was: no token that was shown is lost (a server behind a URL
    begins a broken-off turn again), no finished call is made again, no mail is sent twice. Its journal lies in your
    data folder under agents/NAME.
    """
    if action == "list":
        _list(as_json)
    elif action == "show":
        from rorqual.agents import find_run
        from rorqual.agents.report import show_run

        if task is None:
            raise ConfigError("`agent show` takes the name of a run. `rorqual agent list` has them.")
        show_run(find_run(task), as_json=as_json)
    else:
        options = {
            "model": model, "model_name": model_name, "script": _path(script), "pace_s": pace,
            "temperature": temperature, "seed": seed, "max_turns": max_turns, "turn_tokens": turn_tokens,
            "total_tokens": total_tokens, "kind": kind, "files": _path(files), "out": _path(out),
            "skills": tuple(str(path.resolve()) for path in skills or ()), "mcp": _path(mcp), "smtp": smtp,
            "smtp_user": smtp_user, "smtp_security": smtp_security, "mail_from": mail_from,
            "mail_to": tuple(mail_to or ()),
            "sandbox": _sandbox_options(driver, image, memory, idle),
        }  # fmt: skip
        given = _given(ctx, options) | ({} if task is None else {"task": task})
        folder = _folder(task, name, resume or take_over, options)
        _amend(folder, given, accept_new_weights)
        _run(folder, quiet=quiet, as_json=as_json, take_over=take_over, accept_new_weights=accept_new_weights)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().resolve())


def _sandbox_options(driver: str | None, image: str | None, memory: int, idle: int) -> dict[str, Any]:
    options: dict[str, Any] = {"memory_mb": memory, "idle_ttl": idle, "max_lifetime": 7 * 86_400}
    return options | {key: value for key, value in (("driver", driver), ("image", image)) if value is not None}


def _folder(task: str | None, name: str | None, resume: bool, options: dict[str, Any]) -> "RunFolder":
    """The run that is meant, or a new one. Raises: ConfigError, AgentError."""
    from rorqual.agents import RunSettings, create_run
    from rorqual.agents.report import state_of
    from rorqual.agents.runs import all_runs, find_run, runs_folder

    if resume:
        if name is not None and (runs_folder() / name / "settings.json").is_file():
            return find_run(name)
        if name is None:
            for run in all_runs():
                with contextlib.suppress(RorqualError):  # one that cannot be read is none to go on with
                    if task in (None, run.settings.task) and state_of(run).closed is None:
                        return run
    if task is None:
        raise ConfigError("there is no unfinished run to go on with. Give a task, or --name with --resume.")
    return create_run(RunSettings(task, **options), name)


_SANDBOX_KEYS = {"driver": "driver", "image": "image", "memory": "memory_mb", "idle": "idle_ttl"}
_MODEL_KEYS = ("model", "model_name", "script")
_MAY_CHANGE = (*_MODEL_KEYS, "pace_s", "max_turns", "out")


def _given(ctx: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that stand on the command line."""
    given: dict[str, Any] = {}
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        field = "pace_s" if name == "pace" else name
        if field in options:
            given[field] = options[field]
        elif name in _SANDBOX_KEYS:
            given.setdefault("sandbox", {})[_SANDBOX_KEYS[name]] = options["sandbox"][_SANDBOX_KEYS[name]]
    return given


def _amend(run: "RunFolder", given: dict[str, Any], accept_new_weights: bool) -> None:
    """Take over what was given and may change while a run is on its way (a new run has it all already).

    Raises: ConfigError for what would make it another run.
    """
    from rorqual.agents.report import state_of

    settings = run.settings
    given = given | ({"sandbox": settings.sandbox | given["sandbox"]} if "sandbox" in given else {})
    changed = {name: value for name, value in given.items() if getattr(settings, name) != value}
    for name, value in changed.items():
        old = getattr(settings, name)
        about = f"the run {run.name} has {name} {old!r}, and {value!r} was given"
        if name not in _MAY_CHANGE or state_of(run).closed is not None:
            raise ConfigError(f"{about}. It cannot change any more: leave that out, or begin a new run.")
        if name in _MODEL_KEYS and not accept_new_weights:
            raise ConfigError(f"{about}. Leave that out, or add --accept-new-weights to go on with another model.")
        if name == "max_turns" and value < old:
            raise ConfigError(f"{about}. It can only become more.")
    if "model" in changed and "script" not in given:
        changed["script"] = None
    if changed:
        dataclasses.replace(settings, **changed).save(run.path / "settings.json")


def _run(folder: "RunFolder", *, quiet: bool, as_json: bool, take_over: bool, accept_new_weights: bool) -> None:
    from rorqual.agents import Preempted, RunHooks, run_agent
    from rorqual.agents.cost import Meter

    settings = folder.settings
    is_hosted = settings.script is None and settings.model.startswith("http")
    meter = Meter(settings.model_name if is_hosted else None)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: _notice(got, stopped))
    with _view(folder, settings, meter, quiet=quiet, as_json=as_json) as observer:
        hooks = RunHooks(
            observer, stop=lambda: bool(stopped), take_over=take_over, accept_new_weights=accept_new_weights
        )
        try:
            result = run_agent(folder, hooks)
        except Preempted as error:
            typer.echo(f"{error} (--name {folder.name})", err=True)
            return
    _print(result, meter, quiet=quiet, as_json=as_json)


def _notice(number: int, stopped: list[int]) -> None:
    """The first signal asks the run to stop at the next safe place; a second one ends the process."""
    stopped.append(number)
    if len(stopped) > 1:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


@contextlib.contextmanager
def _view(
    folder: "RunFolder", settings: "RunSettings", meter: "Meter", *, quiet: bool, as_json: bool
) -> Iterator["Observer"]:
    from rorqual.agents import Observer
    from rorqual.agents.view import JsonView, LiveView, PlainView

    if as_json:
        typer.echo(json.dumps({"event": "run", "name": folder.name, "folder": str(folder.path)}))
        yield JsonView(meter)
    elif quiet:
        yield Observer()
    elif sys.stderr.isatty():
        with LiveView(f"{folder.name}: {settings.task}", meter) as view:
            yield view
    else:
        typer.echo(f"run {folder.name}", err=True)
        yield PlainView(meter)


def _print(result: "RunResult", meter: "Meter", *, quiet: bool, as_json: bool) -> None:
    answer, files = result.answer, [str(path) for path in result.files]
    if as_json:
        body = {"event": "done", "ending": answer.ending, "answer": answer.text, "files": files, "turns": answer.turns}
        typer.echo(json.dumps(body | {"note": result.note, "cost": meter.text()}))
    else:
        typer.echo(answer.text)
        if result.note:
            typer.echo(result.note, err=True)
        if not quiet:
            typer.echo(
                "\n".join([*files, f"{answer.turns} turns; {meter.text()}", f"folder: {result.folder}"]), err=True
            )
    if answer.ending != "done":
        if not as_json:
            typer.echo(
                f"the run ended early ({answer.ending}); for more, begin a new run with a higher limit", err=True
            )
        raise typer.Exit(1)


def _list(as_json: bool) -> None:
    from rorqual.agents.report import summary_of
    from rorqual.agents.runs import all_runs

    rows = [summary_of(run) for run in all_runs()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    if not rows:
        typer.echo('No runs. Begin one with: rorqual agent run "TASK"')
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rorqual.agents.view import first_line

    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "turns", "calls", "task"):
        table.add_column(title)
    for row in rows:
        task = Text(first_line(row["task"] or row.get("problem", "")), overflow="ellipsis", no_wrap=True)
        table.add_row(row["name"], row["state"], str(row["turns"]), str(row["calls"]), task)
    Console().print(table)
