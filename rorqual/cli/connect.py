"""`rorqual connect`: point a coding client at a server of ours, and undo it."""

import json
from typing import Annotated, Literal

import typer

from rorqual.cli.options import Json
from rorqual.cli.serving import require_server
from rorqual.errors import ConfigError


def connect(
    client: Annotated[
        Literal["claude-code", "opencode", "cline", "cursor"], typer.Argument(help="Which client.", metavar="CLIENT")
    ],
    url: Annotated[
        str, typer.Option("--url", help="Address of `rorqual up`, `serve` or `referee`.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option("--model", help="Model to ask for; the first one served there otherwise.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", envvar="RORQUAL_API_KEY", help="Key the client sends; it is written to its settings."),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Put back what stood there before.")] = False,
    as_json: Json = False,
) -> None:
    """Write a coding client's configuration so that it asks a server of yours, and undo it.

    \b
    rorqual connect claude-code
    rorqual connect opencode --url http://127.0.0.1:8100 --model deepseek-chat
    rorqual connect opencode --undo
    """
    require_server()
    from rorqual.folders import data_folder
    from rorqual.server import connect as clients
    from rorqual.server.upstream_wire import connect as ask

    records = data_folder() / "connect"
    if undo:
        outcome = clients.undo(client, records)
    else:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url is {url!r}. Give an address such as http://127.0.0.1:8000.")
        url = url.rstrip("/").removesuffix("/v1")
        if model is None and client in ("opencode", "cline"):
            model = ask(url, key).model
        outcome = clients.connect(client, clients.Target(url, model, key or clients.PLACEHOLDER), records)
    if as_json:
        typer.echo(json.dumps({"client": client, "files": [str(path) for path in outcome.files], "undone": undo}))
        return
    for path in outcome.files:
        typer.echo(f"{'Restored' if undo else 'Wrote'} {path}")
    if not outcome.files:
        typer.echo("Nothing to change.")
    for line in outcome.advice if outcome.files else ():
        typer.echo(line)
    if not undo and outcome.files:
        typer.echo(f"Undo with: rorqual connect {client} --undo")
