"""What `rorqual referee` and `referee trial` share: which checks run, who judges claims, where code is run."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.referee.check_code import SandboxRunner
    from rorqual.referee.judge_url import JudgeServer
    from rorqual.referee.retrieval import FolderRetriever

JUDGING = "Judging"
JUDGE_KEY_VARIABLE = "RORQUAL_JUDGE_KEY"

Checks = Annotated[
    list[str] | None,
    typer.Option(
        "--check",
        help="A check besides the usual ones: claims, citations, code, done; repeatable.",
        rich_help_panel=JUDGING,
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help=f"Endpoint that judges claims, its key in {JUDGE_KEY_VARIABLE}; the upstream itself otherwise.",
        rich_help_panel=JUDGING,
    ),
]
JudgeModel = Annotated[
    str | None, typer.Option("--judge-model", help="The judge's name there.", rich_help_panel=JUDGING)
]
Sources = Annotated[
    Path | None,
    typer.Option(
        "--sources",
        help="Folder of texts that are searched before an answer is withheld, or where a claim was not found.",
        rich_help_panel=JUDGING,
    ),
]
RunCode = Annotated[
    Literal["function", "container", "microvm", "vm"] | None,
    typer.Option("--run-code", help="Run code in answers in sandboxes of this kind.", rich_help_panel=JUDGING),
]


def checks_with(names: list[str] | None, run_code: str | None) -> tuple[str, ...]:
    """The usual checks and those named. Raises: ConfigError for a name that is none, and for code that nothing runs."""
    from typing import get_args

    from rorqual.referee.policy import DEFAULT, CheckName

    unknown = [name for name in names or () if name not in get_args(CheckName)]
    if unknown:
        raise ConfigError(f"--check {unknown[0]} is none. Checks: {', '.join(get_args(CheckName))}.")
    if "code" in (names or ()) and run_code is None:
        raise ConfigError("--check code runs code of answers. Say where: --run-code function.")
    return tuple(dict.fromkeys((*DEFAULT, *(names or ()))))


def code_runner(kind: str | None) -> "SandboxRunner | None":
    """What runs code; sandboxes are made when the first is needed."""
    if kind is None:
        return None
    from rorqual.referee.check_code import SandboxRunner

    return SandboxRunner(kind)


def retriever_of(folder: Path | None) -> "FolderRetriever | None":
    """Raises: ConfigError for a folder without texts."""
    if folder is None:
        return None
    from rorqual.referee.retrieval import FolderRetriever

    return FolderRetriever(folder)


def judge_server(url: str | None, model: str | None) -> "JudgeServer | None":
    """Raises: ConfigError for one without the other."""
    if (url is None) != (model is None):
        raise ConfigError("--judge URL and --judge-model NAME belong together. Give both, or neither.")
    if url is None or model is None:
        return None
    from rorqual.referee.judge_url import JudgeServer

    return JudgeServer(url, model, os.environ.get(JUDGE_KEY_VARIABLE) or None)
