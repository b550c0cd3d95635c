"""`rorqual eval`: a suite against a checkpoint or a URL; one JSON object or tables, and a report in the folder."""

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rorqual.cli.options import MODEL, OUTPUT, SAMPLING, CacheFormat, Json, Memory, Threads, Weights, use_threads
from rorqual.cli.referee_judging import JUDGE_KEY_VARIABLE, JudgeModel, judge_server
from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.data.tasks import World
    from rorqual.evals.model_grader import ModelGrader
    from rorqual.evals.run import Outcome, RunSettings
    from rorqual.evals.targets import Target

ITEMS = "Items"
KEY_VARIABLE = "RORQUAL_MODEL_KEY"

SuiteArgument = Annotated[
    str,
    typer.Argument(
        help="facts, needle, hop, mrcr, aggregation, arith, effort, tools, json, claims, threads, done or code.",
        show_default=False,
        metavar="SUITE",
    ),
]


def eval(
    suite: SuiteArgument,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Bundled name, checkpoint folder, or Hub id; minke unless given.", rich_help_panel=MODEL
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url", help=f"An OpenAI-style server instead; its key in {KEY_VARIABLE}.", rich_help_panel=MODEL
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            "--model-name", help="The model's name on that server; its first one otherwise.", rich_help_panel=MODEL
        ),
    ] = None,
    guard: Annotated[
        Literal["on", "off"] | None,
        typer.Option(
            "--guard", help="The engine's retrieval guard; its own choice unless given.", rich_help_panel=MODEL
        ),
    ] = None,
    threads: Threads = None,
    weights: Weights = None,
    memory: Memory = None,
    cache_format: CacheFormat = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Draws items, wordings and unknown names.", rich_help_panel=ITEMS)
    ] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="The tiny size: seconds on a small model.", rich_help_panel=ITEMS)
    ] = False,
    size: Annotated[
        Literal["tiny", "small", "full"] | None,
        typer.Option("--size", help="How many items, and how long; small unless given.", rich_help_panel=ITEMS),
    ] = None,
    items: Annotated[
        int | None, typer.Option("--items", min=1, help="So many items instead.", rich_help_panel=ITEMS)
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Lengths of long texts, such as 1K,8K,64K.", rich_help_panel=ITEMS),
    ] = None,
    split: Annotated[
        Literal["train", "cal", "test"], typer.Option("--split", help="Of entities.", rich_help_panel=ITEMS)
    ] = "test",
    world: Annotated[
        str | None,
        typer.Option("--world", help="A world.json; the checkpoint's own unless given.", rich_help_panel=ITEMS),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--set",
            help="For facts: a file of AA-Omniscience-Public or SimpleQA; for mrcr: one of OpenAI-MRCR.",
            rich_help_panel=ITEMS,
        ),
    ] = None,
    announce: Annotated[
        bool,
        typer.Option(
            "--announce",
            help="For facts: tell the model a price of wrong answers, and score by it (U@t).",
            rich_help_panel=ITEMS,
        ),
    ] = False,
    sandbox: Annotated[
        Literal["function", "container", "none"],
        typer.Option(
            "--sandbox", help="Where code of the model runs; none evaluates without running.", rich_help_panel=ITEMS
        ),
    ] = "function",
    forced: Annotated[
        bool | None,
        typer.Option(
            "--forced/--no-forced",
            help="Ask again with abstentions masked, for RET.",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help=f"Endpoint that grades what strings cannot (facts with --set); its key in {JUDGE_KEY_VARIABLE}.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    judge_model: JudgeModel = None,
    repeat: Annotated[
        int,
        typer.Option(
            "--repeat", min=1, max=100, help="Times each question is asked, for REPEAT.", rich_help_panel=SAMPLING
        ),
    ] = 1,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.", rich_help_panel=SAMPLING),
    ] = 1.0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=1, help="Longest answer; the suite's own unless given.", rich_help_panel=SAMPLING
        ),
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, max=1024, help="Questions at a time.", rich_help_panel=OUTPUT)
    ] = 8,
    price: Annotated[
        str | None,
        typer.Option("--price", help="HIT,MISS,OUTPUT a million tokens, for CPS.", rich_help_panel=OUTPUT),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the run; the same command with it goes on after a kill.", rich_help_panel=OUTPUT
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a model: figures with intervals beside those of trivial programs, plots, and a report.

    \b
    rorqual eval facts --quick
    rorqual eval needle --lengths 1K,4K --seed 7 --json
    rorqual eval tools --url http://127.0.0.1:8000
    """
    from rorqual.evals.economy import PriceVector
    from rorqual.evals.model_grader import ModelGrader
    from rorqual.evals.run import RunSettings
    from rorqual.evals.suites import check_name
    from rorqual.sizes import parse_tokens

    check_name(suite)
    judges = judge_server(judge, judge_model)
    if model is not None and url is not None:
        raise ConfigError(f"--model {model} loads a checkpoint and --url {url} asks a server. Give one of them.")
    if quick and size not in (None, "tiny"):
        raise ConfigError(f"--quick is the size tiny, and --size says {size}. Leave one of them out.")
    options = {"sandbox": sandbox} | ({} if file is None else {"set": file}) | ({"announce": True} if announce else {})
    settings = RunSettings(
        suite=suite, seed=seed, size="tiny" if quick else size or "small", split=split, items=items,
        max_tokens=max_tokens, temperature=temperature, top_p=top_p,
        guard=None if guard is None else guard == "on", forced=forced, repeat=repeat,
        lengths=tuple(parse_tokens(text.strip(), "--lengths") for text in lengths.split(",")) if lengths else (),
        price=PriceVector() if price is None else PriceVector.parse(price), options=options,
    )  # fmt: skip
    use_threads(threads)
    found = find_world(world, None if url is not None else model or "minke", is_told=suite == "facts")
    if url is not None:
        target = open_server(url, model_name, guard, parallel)
    else:
        target = open_checkpoint(model or "minke", parallel, guard, weights=weights, memory=memory, cache=cache_format)
    folder = out or new_folder(suite)
    grader = None if judges is None else ModelGrader(judges)
    try:
        run(
            settings, target, found, folder, grader=grader, as_json=as_json,
            is_shown=not quiet and sys.stderr.isatty(),
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"stopped; the answers so far are kept, and the same command with --out {folder} goes on", err=True)
        raise
    finally:
        target.close()
        if grader is not None:
            grader.close()


def run(
    settings: "RunSettings",
    target: "Target",
    world: "World",
    folder: Path,
    *,
    as_json: bool,
    is_shown: bool,
    grader: "ModelGrader | None" = None,
) -> None:
    """Run, keep and print."""
    from rorqual.evals import report
    from rorqual.evals.run import evaluate, save_result

    with progress(is_shown) as show:
        outcome = evaluate(settings, target, world, folder, show, grader)
        result = outcome.result
        result["plots"] = report.write(outcome, folder)
        result["report"] = str(folder / "report.html")
        save_result(folder, result)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        print_tables(outcome)
    if not result["valid"]:
        raise typer.Exit(1)


def find_world(world: str | None, model: str | None, *, is_told: bool) -> "World":
    """The world asked for, the checkpoint's, or the bundled model's, which is then told. Raises: ConfigError,
    CheckpointError.
    """
    from rorqual.checkpoint.load import locate
    from rorqual.data.tasks import World
    from rorqual.evals.worlds import read_world, world_of

    if world is not None:
        return read_world(Path(world).expanduser())
    found = None if model is None else world_of(locate(model))
    if found is None and is_told:
        whose = "a server tells no world" if model is None else f"{model} has no world.json"
        typer.echo(f"{whose}: facts are asked of the bundled model's world; --world names another", err=True)
    return found or World.build()


def open_checkpoint(model: str, parallel: int, guard: str | None, **load: Any) -> "Target":
    """A checkpoint as target. Raises: ConfigError, CheckpointError."""
    from rorqual.evals.targets.loaded import LoadedTarget

    return LoadedTarget(model, parallel=parallel, guard=None if guard is None else guard == "on", **load)


def open_server(url: str, model_name: str | None, guard: str | None, parallel: int) -> "Target":
    """A server as target. Raises: ConfigError, MissingExtraError."""
    from rorqual.evals.targets.server import ServerTarget

    if guard is not None:
        raise ConfigError(
            f"--guard {guard} switches the engine of a loaded checkpoint, and {url} has its own. Start that server "
            "with the guard you want, or give --model."
        )
    return ServerTarget(url, model=model_name, key=os.environ.get(KEY_VARIABLE) or None, parallel=parallel)


def new_folder(suite: str) -> Path:
    """A folder that no run has, among the user's data."""
    from rorqual.folders import data_folder

    return data_folder() / "evals" / f"{suite}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


@contextmanager
def progress(is_shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, a line for each pass over the items."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as bar:
        lines: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in lines:
                lines[what] = bar.add_task(what, total=total)
            bar.update(lines[what], completed=done, total=total)

        yield show


def print_tables(outcome: "Outcome") -> None:
    """The headline beside the baselines, the strata, and where the rest lies."""
    from rich.console import Console

    from rorqual.cli.plan_tables import new_table
    from rorqual.evals.report import shown

    console, result = Console(), outcome.result
    names = list(result["baselines"])
    table = new_table(f"{result['suite']} · {result['model']['id']} · {result['n']} items", "", "model", "95 %", *names)
    for metric, value in result["headline"].items():
        bounds = result["intervals"].get(metric)
        between = "" if bounds is None else f"{shown(bounds[0])}-{shown(bounds[1])}"
        table.add_row(metric, shown(value), between, *(shown(result["baselines"][name].get(metric)) for name in names))
    console.print(table)
    for key, cells in result["strata"].items():
        if len(cells) > 1:
            columns = list(dict.fromkeys(name for cell in cells.values() for name in cell))
            part = new_table(f"by {key.replace('_', ' ')}", "", *columns)
            for name, cell in cells.items():
                part.add_row(name, *(shown(cell.get(column)) for column in columns))
            console.print(part)
    for note in result["notes"]:
        console.print(note, style="dim", highlight=False)
    console.print(f"report: {result['report']}", highlight=False, soft_wrap=True)
