"""`rorqual selftest`: whether answers on this machine depend on anything but weights, prompt and sampling."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rorqual.cli.options import MODEL, CacheFormat, Json, Threads, Weights, use_threads

if TYPE_CHECKING:
    from rorqual.engine.selftest import Check, SubjectReport

Tell = Callable[[str, int, int], None]


def selftest(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Test this one too (bundled name, folder, Hub id) instead of minke; `none`: the small one only.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Every third length, fewer policies and requests.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the random network, tokens and schedules.")] = 0,
    record: Annotated[
        Path | None,
        typer.Option("--record", help="File of earlier digests (selftest.json beside the built operations)."),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp32"],
        typer.Option("--dtype", help="Precision of the computation that is tested.", rich_help_panel=MODEL),
    ] = "fp32",
    threads: Threads = None,
    weights: Weights = None,
    cache_format: CacheFormat = None,
    as_json: Json = False,
) -> None:
    """Prove on this machine that tokens do not depend on neighbours, chunks, cache, drafts taken back or restarts.

    Logits are compared bit by bit with those of one plain pass, on a random network that is built so that rounding
    shows, and on the bundled model: prompts of every length modulo 4 and 128. A control with the C operations off shows
    that the comparison can fail. Exit code 1 where something differs.

    \b
    rorqual selftest
    rorqual selftest --quick --model none --json
    rorqual selftest --dtype bf16 --weights fp4 --cache-format fp8
    """
    import torch

    from rorqual.checkpoint import load
    from rorqual.engine import selftest as tests

    use_threads(threads)
    began = time.perf_counter()
    reports: list[SubjectReport] = []
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    small = tests.small_network(seed, precision, weights, cache_format)
    with _progress(not as_json) as tell:
        for name in ["small random network", *(["minke"] if model is None else model)]:
            if name == "none":
                continue
            is_small = not reports
            network = small if is_small else load(name, dtype=precision, weights=weights, cache=cache_format)[0]
            report = tests.examine_model(name, network, seed, tell, is_small=is_small, quick=quick)
            tests.compare(report, f"{name} {seed} {quick} {tests.identity(network)}", record or tests.default_path())
            reports.append(report)
        tell("control", 0, 1)
        control = tests.control(small)
    seconds = time.perf_counter() - began
    passed = all(report.passed for report in reports)
    if as_json:
        found: dict[str, Any] = {
            "passed": passed, "seconds": seconds, "seed": seed, "models": [report.to_dict() for report in reports],
            "control": {"requests": control.cases, "differing": control.differences},
        }  # fmt: skip
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(reports, control, seconds)
    if not passed:
        raise typer.Exit(1)


@contextmanager
def _progress(wanted: bool) -> Iterator[Tell]:
    """A bar on stderr, where somebody looks."""
    if not wanted or not sys.stderr.isatty():
        yield lambda text, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


def _show(reports: "list[SubjectReport]", control: "Check", seconds: float) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for report in reports:
        facts = report.arithmetic
        console.print(
            f"{report.model}: {facts.dtype} on {facts.device}, {facts.operations} operations ({facts.kernels})"
        )
        if facts.why is not None:
            console.print(f"  [yellow]nothing is promised here:[/] {escape(facts.why)}")
        table = Table(box=None, show_header=False, padding=(0, 1))
        for check in report.checks:
            mark = "[green]same[/]" if check.passed else "[red]differs[/]"
            said = check.about if check.passed else f"{check.differences} of {check.cases}; the first: {check.first}"
            note = "" if check.note is None else f" ({check.note})"
            table.add_row(mark, check.name, str(check.cases), escape(said + note))
        console.print(table)
        console.print(f"  bits of the plain run: {report.digest}")
    if control.differences:
        console.print(
            f"Control without the C operations: {control.differences} of {control.cases} requests differ, so the "
            "comparison can fail."
        )
    else:
        console.print("Control without the C operations: no difference found on this machine.")
    compared = sum(check.cases for report in reports for check in report.checks)
    verdict = "Everything is the same, bit by bit" if all(report.passed for report in reports) else "Something differs"
    console.print(
        f"{verdict} ({compared:,} comparisons, {seconds:.0f} s). "
        "This holds for this machine; on another processor the bits may be others."
    )
