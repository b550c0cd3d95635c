"""`rorqual sandbox image`: base images and other layers that sandboxes stand on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rorqual.cli.options import Json
from rorqual.errors import ConfigError, SandboxError

if TYPE_CHECKING:
    from rorqual.sandbox.images.store import Reference, Store

BUILD, COLLECT, WHERE = "Building", "Collecting", "Where"
Action = Literal["build", "list", "import", "export", "remove", "gc"]
_WORDS = {
    "build": ["NAME"],
    "list": [],
    "import": ["FILE", "NAME"],
    "export": ["NAME", "FILE"],
    "remove": ["NAME"],
    "gc": [],
}


def image(
    action: Annotated[Action, typer.Argument(help="What to do.", metavar="ACTION")] = "list",
    words: Annotated[
        list[str] | None, typer.Argument(help="NAME and FILE, as the action takes.", metavar="NAME")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="Debian or Ubuntu release; this machine's otherwise.", rich_help_panel=BUILD),
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option("--package", help="A package in place of the usual ones; again for more.", rich_help_panel=BUILD),
    ] = None,
    toolkit: Annotated[
        list[str] | None,
        typer.Option("--toolkit", help="A layer more: office, for PDFs and spreadsheets.", rich_help_panel=BUILD),
    ] = None,
    mirror: Annotated[
        str | None, typer.Option("--mirror", help="Where the packages come from.", rich_help_panel=BUILD)
    ] = None,
    journal: Annotated[
        list[Path] | None,
        typer.Option(
            "--journal", help="A rollout log that may be resumed: its snapshots stay.", rich_help_panel=COLLECT
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            min=0,
            help="Younger layers and snapshots stay, in seconds; an hour otherwise.",
            rich_help_panel=COLLECT,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go.", rich_help_panel=COLLECT)
    ] = False,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Folder of the layers; in your data folder otherwise.", rich_help_panel=WHERE),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build, list, import, export and remove images, and collect layers and snapshots that nothing needs.

    \b
    rorqual sandbox image build debian-12 --toolkit office
    rorqual sandbox image import alpine.tar alpine
    rorqual sandbox image export debian-12 debian-12.tar
    rorqual sandbox image remove alpine
    rorqual sandbox image gc --journal runs/journal --dry-run

    `build` fetches packages and needs mmdebstrap; `import` takes a tar of a root file system, or an image in OCI's
    layout as a tar or folder; `export` writes OCI's layout. `remove` takes the name away, and `gc` the layers, and the
    full snapshots of virtual machines, that no name, sandbox or rollout log needs any more.
    """
    from rorqual.sandbox.images.store import Store

    names = words or []
    wanted = _WORDS[action]
    if len(names) != len(wanted):
        usage = " ".join(["rorqual sandbox image", action, *wanted])
        raise ConfigError(f"{action} takes {len(wanted)} name(s), and {len(names)} were given. Write: {usage}")
    if action != "build" and (suite or package or toolkit or mirror):
        raise ConfigError(f"--suite, --package, --toolkit and --mirror belong to `image build`, not to {action}.")
    if action != "gc" and (journal or dry_run or grace is not None):
        raise ConfigError(f"--journal, --grace and --dry-run belong to `image gc`, not to {action}.")
    layers = Store(store)
    say = _say(as_json)
    if action == "build":
        _build(layers, names[0], suite, package, toolkit, mirror, as_json, say)
    elif action == "list":
        _list(layers, as_json)
    elif action == "import":
        from rorqual.sandbox.images.intake import import_image

        _made(layers, import_image(layers, Path(names[0]).expanduser(), names[1]).name, as_json)
    elif action == "export":
        from rorqual.sandbox.images.export import export_image

        size = export_image(layers, names[0], Path(names[1]).expanduser())
        typer.echo(json.dumps({"file": names[1], "bytes": size}) if as_json else f"{names[1]}: {_size(size)}")
    elif action == "remove":
        layers.forget(names[0])
        typer.echo(json.dumps({"removed": names[0]}) if as_json else f"{names[0]} is gone; `image gc` frees its layers")
    else:
        _collect(layers, journal or [], grace, dry_run, as_json)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _say(as_json: bool) -> Callable[[str], None]:
    """Shows what a long action does: a line that is overwritten on a terminal, lines elsewhere, nothing for JSON."""
    if as_json:
        return lambda line: None
    if not sys.stderr.isatty():
        return lambda line: print(line, file=sys.stderr)
    return lambda line: print(f"\r\x1b[K{line[:100]}", end="", file=sys.stderr, flush=True)


def _build(
    store: Store,
    name: str,
    suite: str | None,
    packages: list[str] | None,
    toolkits: list[str] | None,
    mirror: str | None,
    as_json: bool,
    say: Callable[[str], None],
) -> None:
    from rorqual.sandbox.images.base import BASE, build_base

    build_base(store, name, suite, packages or BASE, toolkits=toolkits or (), mirror=mirror, progress=say)
    if sys.stderr.isatty() and not as_json:
        print("\r\x1b[K", end="", file=sys.stderr)
    _made(store, name, as_json)


def _made(store: Store, name: str, as_json: bool) -> None:
    reference = store.reference(name)
    assert reference is not None
    if as_json:
        typer.echo(json.dumps(asdict(reference), indent=2))
        return
    sizes = [store.size_of(digest) for digest in reference.layers]
    typer.echo(f"{name}: {len(sizes)} layer(s), {_size(sum(sizes))}")
    for digest, size in zip(reference.layers, sizes, strict=True):
        typer.echo(f"  {digest}  {_size(size)}")
    typer.echo(f'Sandbox.create("container", image="{name}") stands on it.')


def _list(store: Store, as_json: bool) -> None:
    references = store.references()
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in references], indent=2))
        return
    if not references:
        typer.echo(f"no images in {store.folder}; make one: rorqual sandbox image build debian-12")
        return
    width = max(len(one.name) for one in references)
    for one in references:
        size = sum(store.size_of(digest) for digest in one.layers) + _full_bytes(one)
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.created))
        about = one.note.get("suite") or one.note.get("from") or (f"of {one.owner}" if one.owner else "")
        typer.echo(f"{one.name:<{width}}  {one.kind:<8}  {len(one.layers)} layer(s)  {_size(size)}  {made}  {about}")
    everything = sum(layer.size for layer in store.layers())
    typer.echo(f"in {store.folder}: {_size(everything)} in all, shared layers counted once")


def _full_bytes(reference: Reference) -> int:
    """What a full snapshot takes beside its layers; 0 for other names, and where its files are not here."""
    from rorqual.sandbox.vm import snapshot

    try:
        return snapshot.read(reference.note["full"]).size_bytes if "full" in reference.note else 0
    except (SandboxError, OSError):
        return 0


def _collect(store: Store, journals: list[Path], grace: float | None, dry_run: bool, as_json: bool) -> None:
    from rorqual.sandbox.images.collect import GRACE_S, collect

    done = collect(store, journals=journals, grace_s=GRACE_S if grace is None else grace, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(asdict(done), indent=2))
        return
    would = "would free" if dry_run else "freed"
    typer.echo(
        f"{would} {_size(done.bytes)}: {len(done.layers)} layer(s), {len(done.names)} snapshot name(s), "
        f"{len(done.full)} full snapshot(s), {done.temporary} half-written file(s), {len(done.local)} local copies"
    )
