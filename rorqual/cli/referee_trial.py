"""`rorqual referee trial`: wrong answers, cost and latency of an endpoint, before and after the referee."""

import json
import os
import secrets
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rorqual.cli.elsewhere import KEY_VARIABLE
from rorqual.cli.options import OUTPUT, SAMPLING, Json
from rorqual.cli.referee_judging import (
    JUDGING,
    Checks,
    JudgeModel,
    JudgeUrl,
    RunCode,
    Sources,
    checks_with,
    code_runner,
    judge_server,
    retriever_of,
)
from rorqual.cli.serving import require_server

if TYPE_CHECKING:
    from rorqual.evals.trial.questions import QuestionSet
    from rorqual.evals.trial.run import TrialSettings


def trial(
    upstream: Annotated[str, typer.Option("--upstream", help=f"Address of the endpoint; its key in {KEY_VARIABLE}.")],
    file: Annotated[
        Path, typer.Option("--set", help="Your questions: JSON Lines with question, answer, schema, unanswerable.")
    ],
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="The model's name there; its first one otherwise.")
    ] = None,
    mode: Annotated[
        Literal["annotate", "enforce"],
        typer.Option(
            "--mode", help="annotate: repair and tell. enforce: nothing broken goes out.", rich_help_panel=JUDGING
        ),
    ] = "enforce",
    profile: Annotated[
        Literal["chat", "assistant", "regulated"] | None,
        typer.Option("--profile", help="How careful to be; the policy's, or assistant.", rich_help_panel=JUDGING),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="TOML file: forbidden calls, other names of tools.", rich_help_panel=JUDGING),
    ] = None,
    confidence: Annotated[
        Path | None,
        typer.Option("--confidence", help="A calibration of `referee calibrate`.", rich_help_panel=JUDGING),
    ] = None,
    check: Checks = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    run_code: RunCode = None,
    sources: Sources = None,
    max_rounds: Annotated[
        int, typer.Option("--max-rounds", min=0, max=8, help="Times to ask again.", rich_help_panel=JUDGING)
    ] = 2,
    token_ratio: Annotated[
        float,
        typer.Option(
            "--token-ratio", min=0, help="Tokens that may take, of the first answer's.", rich_help_panel=JUDGING
        ),
    ] = 0.5,
    wall_ms: Annotated[
        float, typer.Option("--wall-ms", min=0, help="Time it may take.", rich_help_panel=JUDGING)
    ] = 20_000.0,
    fallback: Annotated[
        list[str] | None,
        typer.Option(
            "--fallback", help="Model asked when the request's own fails; repeatable.", rich_help_panel=JUDGING
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.", rich_help_panel=SAMPLING)
    ] = 0.0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest answer.", rich_help_panel=SAMPLING)
    ] = 1024,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, max=1024, help="Questions at a time.", rich_help_panel=OUTPUT)
    ] = 4,
    price: Annotated[
        str | None,
        typer.Option("--price", help="HIT,MISS,OUTPUT a million tokens, for the cost.", rich_help_panel=OUTPUT),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the trial; the same command with it goes on after a kill.", rich_help_panel=OUTPUT
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask an endpoint your own questions and compare its answers before and after the referee.

    \b
    rorqual referee trial --upstream https://api.deepseek.com --set my.jsonl
    rorqual referee trial --upstream http://127.0.0.1:8000 --set my.jsonl --price 0.028,0.14,0.28 --out trial --json
    """
    require_server()
    from rorqual.evals.calibrate import confidence_for
    from rorqual.evals.economy import PriceVector
    from rorqual.evals.records import Sampling
    from rorqual.evals.targets.server import ServerTarget
    from rorqual.evals.trial.questions import read_set
    from rorqual.evals.trial.run import TrialSettings
    from rorqual.folders import data_folder
    from rorqual.referee import Options, load_policy
    from rorqual.referee.policy import BudgetBody

    budget = BudgetBody(max_rounds=max_rounds, token_ratio=token_ratio, wall_ms=wall_ms)
    checks, runner, judges = checks_with(check, run_code), code_runner(run_code), judge_server(judge, judge_model)
    rules, key = load_policy(policy, profile), os.environ.get(KEY_VARIABLE) or None
    settings = TrialSettings(
        Options(mode, rules, checks, budget=budget, runs_code=runner is not None),
        Sampling(temperature=temperature, max_tokens=max_tokens),
        PriceVector() if price is None else PriceVector.parse(price),
        tuple(fallback or ()),
        judge=judges,
        code=runner,
        retriever=retriever_of(sources),
        sources=None if sources is None else str(sources),
    )
    asked = read_set(file)
    stamp = f"trial-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = out or data_folder() / "evals" / stamp
    target = ServerTarget(upstream, model=model_name, key=key, parallel=parallel)
    if confidence is not None:
        make = partial(
            confidence_for, confidence, upstream, target.identity.model_id, key=key, profile=rules.profile.name
        )
        settings = replace(settings, confidence=make, confidence_id=make().calibrator.training_hash)
    try:
        _run(settings, asked, target, folder, as_json=as_json, is_shown=not quiet and sys.stderr.isatty())
    except KeyboardInterrupt:
        typer.echo(f"stopped; the answers so far are kept, and the same command with --out {folder} goes on", err=True)
        raise
    finally:
        for one in (target, runner, judges):
            if one is not None:
                one.close()


def _run(
    settings: "TrialSettings", asked: "QuestionSet", target: Any, folder: Path, *, as_json: bool, is_shown: bool
) -> None:
    from rorqual.cli.eval import progress
    from rorqual.evals.run import save_result
    from rorqual.evals.trial import report
    from rorqual.evals.trial.run import run_trial

    with progress(is_shown) as show:
        result = run_trial(settings, asked, target, folder, show)
    result["report"] = str(report.write(result, folder))
    save_result(folder, result)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        _print(result, settings.options.mode)
    if not result["valid"]:
        raise typer.Exit(1)


def _print(result: "dict[str, Any]", mode: str) -> None:
    """The table and the notes."""
    from rich.console import Console

    from rorqual.cli.plan_tables import new_table
    from rorqual.evals.trial import report

    console = Console()
    table = new_table(f"{result['model']} · {result['n']} questions · {mode}", "", "before", "after", "change")
    for row in report.rows(result):
        table.add_row(*row)
    console.print(table)
    for note in result["notes"]:
        console.print(note, style="dim", highlight=False)
    console.print(f"report: {result['report']}", highlight=False, soft_wrap=True)
