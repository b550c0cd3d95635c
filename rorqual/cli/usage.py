"""`rorqual usage`: what was asked of servers on this machine, and what it cost."""

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from rorqual.cli.options import OUTPUT, Json
from rorqual.errors import ConfigError
from rorqual.ledger import GROUPS, Ledger, default_path
from rorqual.money import amount_text

_AGO = re.compile(r"(\d+)([mhdw])")
_UNITS_S = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_COLUMNS = {
    "requests": "requests",
    "failed": "failed",
    "hit_tokens": "hit",
    "miss_tokens": "miss",
    "completion_tokens": "output",
    "reasoning_tokens": "reasoning",
}


def usage(
    by: Annotated[
        str,
        typer.Option("--by", help=f"Groups, of {', '.join(GROUPS)}; days are UTC.", rich_help_panel=OUTPUT),
    ] = "day,key,model",
    since: Annotated[
        str | None,
        typer.Option("--since", help="A day (2026-09-01) or how long ago (12h, 7d, 4w).", rich_help_panel=OUTPUT),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option("--ledger", help="File of the ledger; in your data folder otherwise.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was asked of servers on this machine: requests, tokens and cost by day, key and model.

    \b
    rorqual usage
    rorqual usage --since 7d --by key
    rorqual usage --by model,endpoint --json
    """
    groups = [group.strip() for group in by.split(",") if group.strip()]
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ConfigError(f"--by has {unknown[0]!r}, which usage is not kept by. Use some of {', '.join(GROUPS)}.")
    start_s = 0.0 if since is None else _since(since)
    book = Ledger(ledger or default_path())
    try:
        rows, currency = book.summary(groups, start_s), book.currency()
        total = book.summary((), start_s)
    finally:
        book.close()
    for row in [*rows, *total]:
        row.update(cost=amount_text(row["cost"]), without_cache=amount_text(row["without_cache"]), currency=currency)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "total": total[0] if total else None}))
    elif not rows:
        typer.echo("Nothing was asked yet, or no server kept a ledger.")
    else:
        _print_table(groups, rows, total[0], currency)


def _print_table(groups: list[str], rows: list[dict[str, Any]], total: dict[str, Any], currency: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for group in groups:
        table.add_column(group, overflow="fold")
    for title in (*_COLUMNS.values(), f"cost {currency}", "without cache"):
        table.add_column(title, justify="right")
    for row in [*rows, *([total] if groups else [])]:
        names = [row[group] or "-" for group in groups] if row is not total else ["all", *[""] * (len(groups) - 1)]
        counts = [f"{row[name]:,}" for name in _COLUMNS]
        table.add_row(*names, *counts, row["cost"], row["without_cache"])
    Console().print(table)


def _since(text: str) -> float:
    """Raises: ConfigError when it is neither a day nor a time ago."""
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return time.time() - int(ago.group(1)) * _UNITS_S[ago.group(2)]
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise ConfigError(
            f"--since is {text!r}, which is no day and no time ago. Write for example 2026-09-01, 12h, 7d or 4w."
        ) from None
