"""`rorqual serve`: any checkpoint over HTTP, with the web page."""

from typing import Annotated

import typer

from rorqual.chat import REVISIONS
from rorqual.cli.options import MODEL, NETWORK, Json, ModelArgument, Port, Speculate, Threads
from rorqual.cli.serving import start
from rorqual.errors import ConfigError


def serve(
    model: ModelArgument,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen on. There is no authentication: beyond 127.0.0.1 anyone can use it.",
            rich_help_panel=NETWORK,
        ),
    ] = "127.0.0.1",
    port: Port = 8000,
    max_running: Annotated[
        int,
        typer.Option("--max-running", min=1, help="Requests that run at a time.", rich_help_panel=NETWORK),
    ] = 8,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name clients ask for; the folder's otherwise.", rich_help_panel=MODEL),
    ] = None,
    revision: Annotated[
        str,
        typer.Option(
            "--revision",
            help=f"Prompt format it was trained with: {' or '.join(REVISIONS)}.",
            rich_help_panel=MODEL,
        ),
    ] = REVISIONS[0],
    speculate: Speculate = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Serve a checkpoint over an OpenAI-style HTTP API, with the web page.

    \b
    rorqual serve minke
    rorqual serve runs/mine/model --name mine --port 8001
    """
    if revision not in REVISIONS:
        raise ConfigError(
            f"--revision is {revision!r}, which is no prompt format known here. Use {' or '.join(REVISIONS)}."
        )
    start(
        model,
        host=host,
        port=port,
        name=name,
        revision=revision,
        max_running=max_running,
        speculate=speculate,
        threads=threads,
        as_json=as_json,
    )
