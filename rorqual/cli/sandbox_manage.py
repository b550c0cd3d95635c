"""`rorqual sandbox list`, `end` and `prune`: sandboxes that live, and what dead ones left."""

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer

from rorqual.cli.options import Json
from rorqual.errors import ConfigError


def list_(as_json: Json = False) -> None:
    """List the sandboxes of this user that live, whoever drives them: also those of a cluster's edges.

    \b
    rorqual sandbox list
    rorqual sandbox list --json

    A last line says how many full snapshots of virtual machines are kept, and what they take.
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
        _tell_snapshots()
        return
    table = Table("id", "kind", "driver", "isolation", "state", "age", "limits", box=None)
    for info in found:
        limits = f"{info.limits.cpu:g} cores, {info.limits.memory_mb} MiB"
        table.add_row(
            info.id, info.kind, info.driver, info.isolation, info.state, f"{time.time() - info.created:,.0f} s", limits
        )
    Console().print(table)
    _tell_snapshots()


def _tell_snapshots() -> None:
    from rorqual.sandbox.vm import snapshot

    sizes = snapshot.sizes()
    if sizes:
        typer.echo(
            f"{len(sizes)} full snapshot(s), {sum(sizes.values()) / 1e6:,.1f} MB in {snapshot.folder()}; "
            "`rorqual sandbox prune` removes those that nothing needs."
        )


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

    Full snapshots of virtual machines go too, once they are an hour old and no name, sandbox or rollout log needs them;
    `rorqual sandbox image gc` does the same for layers. Sandboxes of a cluster's edges count, wherever those keep them.
    """
    from rorqual.sandbox import bases
    from rorqual.sandbox.images.collect import collect_full
    from rorqual.sandbox.sweep import sweep

    removed = [one for base in bases.known() for one in sweep(base)]
    bases.forget_missing()
    if removed and not as_json:
        typer.echo(f"removed {len(removed)}: {', '.join(removed)}")
    done = collect_full()
    if as_json:
        typer.echo(json.dumps({"removed": removed, "snapshots": done.full, "bytes": done.bytes}))
    elif done.full or done.temporary:
        typer.echo(
            f"freed {done.bytes / 1e6:,.1f} MB: {len(done.full)} full snapshot(s), {done.temporary} half-written one(s)"
        )
    elif not removed:
        typer.echo("nothing to remove")
