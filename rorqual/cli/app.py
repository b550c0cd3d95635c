"""Builds the command line: the table of commands, loading the one that was asked for, and how errors end.

Only the command named on the command line is imported; the others are listed by their sentence alone. That
keeps `rorqual --help` quick, since most commands need torch and torch takes seconds to import.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from rorqual.errors import ConfigError, RequestError, RorqualError


@dataclass(frozen=True)
class Command:
    """One line of `rorqual --help`: the sentence shown there and the group it stands in."""

    summary: str
    group: str


TALK, ACT, RUN, LEARN, LOOK = (
    "Talk to a model", "Let a model work", "Run a server for others", "Train", "Look inside",
)  # fmt: skip

COMMANDS: dict[str, Command] = {
    "up": Command("Start the bundled model, its server and the web page; works offline.", TALK),
    "chat": Command("Chat with a model in the terminal.", TALK),
    "ask": Command("Ask a question about a long text file, up to a million tokens.", TALK),
    "complete": Command("Complete code or text, before a cursor or between two pieces.", TALK),
    "serve": Command("Serve any checkpoint over HTTP, with the web page.", TALK),
    "agent": Command("Do a task with tools in a sandbox; survives being killed.", ACT),
    "tasks": Command("An agent on tasks that hidden tests judge: Terminal-Bench, SWE-bench.", ACT),
    "referee": Command("Check, repair and record the answers of any endpoint on their way.", RUN),
    "connect": Command("Point a coding client at your server: claude-code, opencode, cline, cursor.", RUN),
    "keys": Command("Make, list, top up and revoke API keys with budgets and limits.", RUN),
    "usage": Command("Show requests, tokens and cost by day, key and model.", RUN),
    "eval": Command("Measure a model or an endpoint: facts, long context, tools, code and more.", LOOK),
    "train": Command("Train a model from a recipe.", LEARN),
    "posttrain": Command("Tune a trained model in stages: examples, rewards, teachers.", LEARN),
    "plan": Command("Plan for a model: bytes, what fits, fastest speed and why, least cost.", LOOK),
    "pull": Command("Fetch a checkpoint from the Hugging Face Hub, resumable and checked.", LOOK),
    "convert": Command("Convert a checkpoint: DeepSeek's layout, that of transformers, GGUF.", LOOK),
    "inspect": Command("Explain a preset, a config or a checkpoint: layers, parameters, names.", LOOK),
    "journal": Command("Show, check or compact a journal, the log that rollouts are resumed from.", LOOK),
    "selftest": Command("Prove that answers here do not depend on batch, cache or restarts.", LOOK),
    "sandbox": Command("Run commands in sandboxes; list, end, check and build them.", RUN),
    "doctor": Command("Check this machine: versions, threads, compiler, optional extras.", LOOK),
}

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def load(name: str) -> Callable[..., Any] | typer.Typer:
    """The function behind command `name`, or its group of commands, imported now."""
    found: Callable[..., Any] | typer.Typer = getattr(importlib.import_module(f"rorqual.cli.{name}"), name)
    return found


def _listed_only() -> None:
    """Stands in `--help` for a command that was not asked for."""
    raise AssertionError("only the command named on the command line is ever run")


def build_app(names: Sequence[str] = tuple(COMMANDS)) -> typer.Typer:
    """The typer application, with the commands in `names` imported and the others only listed."""
    app = typer.Typer(
        name="rorqual",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings=CONTEXT,
        rich_markup_mode="rich",
    )
    app.callback()(_root)
    for name, command in COMMANDS.items():
        function = load(name) if name in names else _listed_only
        if isinstance(function, typer.Typer):
            app.add_typer(
                function,
                name=name,
                short_help=command.summary,
                rich_help_panel=command.group,
                context_settings=CONTEXT,
            )
        else:
            app.command(name, short_help=command.summary, rich_help_panel=command.group)(function)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from rorqual import __version__

        typer.echo(f"rorqual {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    """Train, serve and talk to DeepSeek-V4 models, small ones on a laptop.

    \b
    rorqual up                        the bundled model with its web page
    rorqual inspect v4-flash          what DeepSeek-V4-Flash is made of
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always ends in SystemExit with 0 (fine), 1 (task failed) or 2 (wrong request)."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    asked = next((word for word in argv if not word.startswith("-")), None)
    try:
        build_app([asked] if asked in COMMANDS else [])(args=argv, prog_name="rorqual")
    except RorqualError as error:
        if os.environ.get("RORQUAL_DEBUG") == "1":
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(exit_code(error)) from None


def exit_code(error: RorqualError) -> int:
    """2 when what was asked cannot be, 1 when doing it failed."""
    if isinstance(error, RequestError):
        return 2 if error.status < 500 else 1
    return 2 if isinstance(error, ConfigError) else 1
