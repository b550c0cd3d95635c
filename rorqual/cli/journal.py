"""`rorqual journal`: what a journal's folder holds, whether all of it is whole, and making it smaller."""

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rorqual.cli.options import Json
from rorqual.errors import ConfigError
from rorqual.journal import Event, Reader, Record, Report, compact, replay_folder, verify

WHICH = "Records to show"


def journal(
    action: Annotated[Literal["show", "verify", "compact"], typer.Argument(help="What to do.", metavar="ACTION")],
    path: Annotated[Path, typer.Argument(help="Folder of the journal.", metavar="PATH")],
    since: Annotated[
        int, typer.Option("--since", min=0, help="Only records behind this LSN.", rich_help_panel=WHICH)
    ] = 0,
    request: Annotated[
        int | None, typer.Option("--request", min=0, help="Only records of this request.", rich_help_panel=WHICH)
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="Only records of this type, such as ToolCall, or events.", rich_help_panel=WHICH),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Stop after so many.", rich_help_panel=WHICH)
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as a writer makes more durable.", rich_help_panel=WHICH)
    ] = False,
    as_json: Json = False,
) -> None:
    """Show, check or compact a journal: rorqual journal [show | verify | compact] PATH.

    \b
    rorqual journal show runs/journal --request 7
    rorqual journal show runs/journal --follow --json
    rorqual journal verify runs/journal
    rorqual journal compact runs/journal

    `show` prints a line a record and stops at damage, with its place. `verify` reads everything, changes nothing, and
    ends with 1 when a committed record is damaged or missing. `compact` makes sealed segments columnar whose requests
    are all closed; a writer may go on meanwhile.
    """
    if action != "show" and (since, request, kind, limit, follow) != (0, None, None, None, False):
        raise ConfigError(
            f"--since, --request, --kind, --limit and --follow belong to `journal show`, not to {action}."
        )
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder, so it is no journal. Give the folder that holds its segments.")
    if action == "show":
        _show(path, since, request, kind, limit, follow, as_json)
    elif action == "verify":
        report = verify(path)
        typer.echo(json.dumps(report.to_dict()) if as_json else _text(report))
        if not report.ok:
            raise typer.Exit(1)
    else:
        done = compact(path)
        if as_json:
            typer.echo(json.dumps({name: getattr(done, name) for name in done.__dataclass_fields__}))
            return
        typer.echo(f"{len(done.segments)} segments compacted, {done.bytes_before:,} to {done.bytes_after:,} bytes.")
        if done.open_requests:
            typer.echo(f"{len(done.open_requests)} requests are open; the segments they are in stay as they are.")


def _show(
    path: Path, since: int, request: int | None, kind: str | None, limit: int | None, follow: bool, as_json: bool
) -> None:
    shown = 0
    records = Reader(path, since).follow() if follow else replay_folder(path, since)
    try:
        for lsn, record in _chosen(records, request, kind):
            line = {"lsn": lsn, "record": type(record).__name__, **_values(record)}
            # ASCII only: what tools printed is in there, and a terminal would obey its escapes
            sys.stdout.write((json.dumps(line) if as_json else _line(line)) + "\n")
            shown += 1
            if follow:
                sys.stdout.flush()
            if shown == limit:
                break
    except KeyboardInterrupt:
        return
    if not shown and not as_json:
        typer.echo("No such records.")


def _chosen(
    records: Iterator[tuple[int, Record]], request: int | None, kind: str | None
) -> Iterator[tuple[int, Record]]:
    for lsn, record in records:
        if request is not None and getattr(record, "request", None) != request:
            continue
        names = (type(record).__name__, record.kind if isinstance(record, Event) else None)
        if kind is None or kind in names:
            yield lsn, record


def _values(record: Record) -> dict[str, Any]:
    return {field.name: _plain(getattr(record, field.name)) for field in fields(record)}


def _plain(value: Any) -> Any:
    """JSON for a record's value; bytes as hexadecimal."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _line(line: dict[str, Any], width: int = 160) -> str:
    text = " ".join(f"{name}={json.dumps(value)}" for name, value in line.items() if name not in ("lsn", "record"))
    short = text if len(text) <= width else text[: width - 3] + "..."
    return f"{line['lsn']:>8}  {line['record']:<12}  {short}"


def _text(report: Report) -> str:
    lines = [
        f"{len(report.segments)} segments, {sum(report.records.values()):,} records to LSN {report.last_lsn:,}: "
        + (", ".join(f"{count:,} {name}" for name, count in report.records.items()) or "none")
    ]
    if report.torn_bytes:
        lines.append(f"A torn tail of {report.torn_bytes:,} bytes was never acknowledged; the next writer cuts it off.")
    if report.missing:
        lines.append(f"{report.missing:,} acknowledged records behind LSN {report.last_lsn:,} are missing.")
    lines += [f"{problem.segment}: {problem.message}" for problem in report.problems]
    lines += [f"{name} counts for nothing; the next writer removes it." for name in report.stale]
    if not report.has_state:
        lines.append("The file `state` is missing: a torn tail is told from damage by its length alone.")
    lines.append("Everything is whole." if report.ok else "It is not whole.")
    return "\n".join(lines)
