"""`rorqual sandbox doctor`: which kinds of sandbox this machine can run, and what would allow the others."""

import asyncio
import json
from dataclasses import asdict
from typing import Annotated

import typer

from rorqual.cli.options import Json


def doctor(
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Try again, instead of what was found earlier since boot.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Try every driver by running a command in it; say which work, and for the others why not and what would help.

    \b
    rorqual sandbox doctor
    rorqual sandbox doctor --fresh --json
    """
    from rich.console import Console
    from rich.table import Table

    from rorqual.sandbox import cgroups
    from rorqual.sandbox.drivers import driver
    from rorqual.sandbox.probe import probe_all
    from rorqual.sandbox.spec import KINDS

    reports = [report for kind in KINDS for report in asyncio.run(probe_all(kind, fresh=fresh))]
    groups = cgroups.why_not()
    if as_json:
        for report in reports:
            isolation = driver(report.kind, report.driver).capabilities().isolation  # type: ignore[arg-type]
            typer.echo(json.dumps({**asdict(report), "isolation": isolation}))
        typer.echo(json.dumps({"control_groups": groups is None, "why": groups or ""}))
        return
    table = Table("kind", "driver", "isolates by", "works", "why not, and what would help", box=None)
    for report in reports:
        isolation = driver(report.kind, report.driver).capabilities().isolation  # type: ignore[arg-type]
        works = f"yes ({report.seconds:.2f} s)" if report.works else "no"
        table.add_row(report.kind, report.driver, isolation, works, report.why)
    console = Console()
    console.print(table)
    if groups is None:
        console.print("\nMemory, processes and processor time are held by control groups.")
    else:
        console.print(
            f"\nNo control groups for this user ({groups}): the keeper watches memory instead, and limits of processes "
            "are those of the user namespace.",
            highlight=False,
        )
