"""`rorqual pull`: a checkpoint from the Hugging Face Hub into a folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rorqual.cli.options import Json
from rorqual.cli.progress import byte_progress
from rorqual.errors import ConfigError


def pull(
    name: Annotated[str, typer.Argument(help="owner/name, or owner/name@revision.", metavar="NAME")],
    to: Annotated[Path | None, typer.Option("--to", help="Folder to fill; ./name otherwise.")] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit; the main branch otherwise.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a checkpoint from the Hugging Face Hub and check every file against the Hub's SHA-256 or Git id.

    An interrupted download goes on with the same command; files that are there and right are kept.

    \b
    rorqual pull deepseek-ai/DeepSeek-V4-Flash
    rorqual pull deepseek-ai/DeepSeek-V4-Flash --to /data/flash --revision main
    """
    from rorqual.checkpoint import bundled_names
    from rorqual.checkpoint import pull as run
    from rorqual.checkpoint.hub import HUB_ID

    if name in bundled_names():
        raise ConfigError(f"{name} travels with the package, so there is nothing to fetch. Use it by its name.")
    found = HUB_ID.fullmatch(name)
    if found is None:
        raise ConfigError(f"{name!r} is no Hub id. Write owner/name, or owner/name@revision.")
    if found.group(2) and revision:
        raise ConfigError(f"a revision is named twice, {found.group(2)} and {revision}. Leave one of them out.")
    folder = Path(found.group(1).split("/")[1]) if to is None else to.expanduser()
    with byte_progress(not as_json, {"pull": f"fetching {found.group(1)}"}) as on_bytes:
        done = run(found.group(1), folder, revision=revision or found.group(2), on_bytes=on_bytes)
    if as_json:
        typer.echo(json.dumps({**asdict(done), "folder": str(done.folder)}, indent=2))
        return
    fetched = len(done.sha256) + len(done.blob_id) - len(done.kept)
    again = f" ({len(done.replaced)} of them because the ones there had other bytes)" if done.replaced else ""
    typer.echo(f"{done.folder}: {done.repository} at {done.commit}, {done.nbytes / 1e6:,.1f} MB")
    typer.echo(f"{fetched} file(s) fetched{again}, {len(done.kept)} kept")
    typer.echo(
        f"checked: SHA-256 of {len(done.sha256)} file(s), Git blob id of {len(done.blob_id)}; all as the Hub says"
    )
