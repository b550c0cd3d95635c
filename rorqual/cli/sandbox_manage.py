"""`rorqual sandbox list`, `end` and `prune`: sandboxes that live, and what dead ones left."""

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer

from rorqual.cli.options import Json
from rorqual.errors import ConfigError


def list_(as_json: Json = False) -> None:
    """List the sandboxes of this user that live, whoever drives them.

    \b
    rorqual sandbox list
    rorqual sandbox list --json
    """
    from rich.console import Console
    from rich.table import Table

    from rorqual.sandbox import Sandbox

    found = Sandbox.list()
    if as_json:
        for info in found:
            typer.echo(json.dumps(asdict(info)))
        return
    if not found:
        typer.echo("No sandboxes. `rorqual sandbox run -- COMMAND` makes one for a command.")
        return
    table = Table("id", "kind", "driver", "isolation", "state", "age", "limits", box=None)
    for info in found:
        limits = f"{info.limits.cpu:g} cores, {info.limits.memory_mb} MiB"
        table.add_row(
            info.id, info.kind, info.driver, info.isolation, info.state, f"{time.time() - info.created:,.0f} s", limits
        )
    Console().print(table)


def end(
    ids: Annotated[list[str] | None, typer.Argument(help="Sandboxes to end.", metavar="ID...")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Every sandbox of this user.")] = False,
) -> None:
    """End sandboxes, also those that another process drives.

    \b
    rorqual sandbox end container-1a2b3c4d5e6f
    rorqual sandbox end --all
    """
    from rorqual.sandbox import Sandbox

    if everyone == bool(ids):
        raise ConfigError("name the sandboxes to end, or give --all; `rorqual sandbox list` shows them.")
    for sandbox_id in ids or [info.id for info in Sandbox.list()]:
        Sandbox.end(sandbox_id)
        typer.echo(f"{sandbox_id} ended")


def prune(as_json: Json = False) -> None:
    """Remove what dead sandboxes left: processes, mounts, control groups, folders. Living ones are left alone.

    \b
    rorqual sandbox prune
    rorqual sandbox prune --json
    """
    from rorqual.sandbox.sweep import sweep

    removed = sweep()
    if as_json:
        typer.echo(json.dumps({"removed": removed}))
    else:
        typer.echo(f"removed {len(removed)}: {', '.join(removed)}" if removed else "nothing to remove")
