"""Options for running a server for others, and the `Operations` they make."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rorqual.cli.options import NETWORK
from rorqual.errors import ConfigError

if TYPE_CHECKING:  # it brings torch, which takes seconds to import
    from rorqual.ledger import Ledger
    from rorqual.server import Behaviour
    from rorqual.server.dashboard import Dashboard
    from rorqual.server.listen import Certificate
    from rorqual.server.operations import Operations

ACCOUNTS = "Accounts"

ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar="RORQUAL_API_KEY",
        help="Key that clients must send, in the environment rather than here; see `rorqual keys` for many.",
        rich_help_panel=ACCOUNTS,
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help="File of such keys, a line each: KEY, or NAME KEY.", rich_help_panel=ACCOUNTS),
]
NoAuth = Annotated[
    bool,
    typer.Option("--no-auth", help="Ask for no key, whatever the address and the keys.", rich_help_panel=ACCOUNTS),
]
LedgerOption = Annotated[
    Path | None,
    typer.Option(
        "--ledger", help="File of keys, budgets and usage; in your data folder otherwise.", rich_help_panel=ACCOUNTS
    ),
]
NoLedger = Annotated[
    bool, typer.Option("--no-ledger", help="Keep no usage and know no keys but those given.", rich_help_panel=ACCOUNTS)
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Requests a key may run at a time (429 beyond).", rich_help_panel=ACCOUNTS),
]
UserLimit = Annotated[
    int | None,
    typer.Option(
        "--user-limit",
        min=1,
        help="The same for each user_id of a key (none is one too).",
        rich_help_panel=ACCOUNTS,
    ),
]
RequestsPerMinute = Annotated[
    int | None,
    typer.Option("--requests-per-minute", min=1, help="Requests of a key in any 60 s.", rich_help_panel=ACCOUNTS),
]
TokensPerMinute = Annotated[
    int | None,
    typer.Option(
        "--tokens-per-minute", min=1, help="Tokens of a key in any 60 s, prompts and output.", rich_help_panel=ACCOUNTS
    ),
]
Prices = Annotated[
    Path | None,
    typer.Option(
        "--prices", help="Table of your prices, as rorqual/planner/prices.toml; else 0.", rich_help_panel=ACCOUNTS
    ),
]
PriceAs = Annotated[
    str | None,
    typer.Option(
        "--price-as", help="Hosted model whose prices hold here, such as deepseek-v4-pro.", rich_help_panel=ACCOUNTS
    ),
]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        help="Web page that may call the API, such as https://app.example; * for any. None otherwise.",
        rich_help_panel=NETWORK,
    ),
]
MaxBody = Annotated[str, typer.Option("--max-body", help="Largest request body that is read.", rich_help_panel=NETWORK)]
CertFile = Annotated[
    Path | None, typer.Option("--ssl-certfile", help="PEM certificate; serves https.", rich_help_panel=NETWORK)
]
KeyOfCert = Annotated[
    Path | None,
    typer.Option("--ssl-keyfile", help="Its PEM key, when it is in another file.", rich_help_panel=NETWORK),
]
DrainSeconds = Annotated[
    float,
    typer.Option(
        "--drain-s", min=0, help="Seconds that running requests get to finish after SIGTERM.", rich_help_panel=NETWORK
    ),
]
Aliases = Annotated[
    list[str] | None,
    typer.Option("--alias", help="NAME=MODEL: another name clients may ask by; repeatable.", rich_help_panel=NETWORK),
]
KeepReasoning = Annotated[
    bool,
    typer.Option(
        "--keep-reasoning/--no-keep-reasoning",
        help="Put reasoning back that a client dropped, or refuse its tool turns as the hosted API does.",
        rich_help_panel=NETWORK,
    ),
]
ForcedWhileThinking = Annotated[
    bool,
    typer.Option(
        "--force-while-thinking",
        help="Let tool_choice force a call in thinking mode, which the hosted API refuses.",
        rich_help_panel=NETWORK,
    ),
]
EngineView = Annotated[
    bool,
    typer.Option(
        "--engine-view/--no-engine-view",
        help="Show at /engine/view what runs, and to who has an answer's id what the indexer picked for it.",
        rich_help_panel=NETWORK,
    ),
]
Evals = Annotated[
    Path | None,
    typer.Option(
        "--evals", help="Folder of runs whose results /dashboard shows, to all who may ask.", rich_help_panel=NETWORK
    ),
]
LogStyle = Annotated[
    Literal["text", "json", "off"],
    typer.Option("--log", help="A line on stderr for each request; not what is said in it.", rich_help_panel=NETWORK),
]


def build_behaviour(
    aliases: list[str] | None, keep_reasoning: bool, force_while_thinking: bool, engine_view: bool
) -> "Behaviour":
    """Where the server differs from the hosted one. Raises: ConfigError for an alias that is none."""
    from rorqual.errors import ConfigError
    from rorqual.server import Behaviour

    named = {}
    for one in aliases or []:
        alias, _, name = one.partition("=")
        if not alias or not name:
            raise ConfigError(f"--alias is {one!r}; write NAME=MODEL, such as gpt-4o=minke.")
        named[alias] = name
    return Behaviour(
        aliases=named,
        keep_reasoning=keep_reasoning,
        forced_calls_while_thinking=force_while_thinking,
        engine_view=engine_view,
    )


def build_operations(
    *,
    api_keys: list[str] | None = None,
    key_file: Path | None = None,
    no_auth: bool = False,
    ledger: Path | None = None,
    no_ledger: bool = False,
    limit: int | None = None,
    user_limit: int | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    prices: Path | None = None,
    price_as: str | None = None,
    allow_origin: list[str] | None = None,
    max_body_bytes: int | None = None,
) -> "Operations":
    """The options as the server takes them. Raises: ConfigError for what cannot be, or options that clash."""
    from rorqual.ledger import Limits
    from rorqual.planner.prices import PriceTable
    from rorqual.server.accounts import Accounts, Tariff
    from rorqual.server.auth import read_key_file
    from rorqual.server.guard import MAX_BODY_BYTES
    from rorqual.server.operations import Operations

    if ledger is not None and no_ledger:
        raise ConfigError("--ledger names a file and --no-ledger says that there is none. Leave one of them out.")
    given = {f"api-key-{number}" if number > 1 else "api-key": key for number, key in enumerate(api_keys or [], 1)}
    if key_file is not None:
        given.update(read_key_file(key_file))
    accounts = Accounts(
        None if no_ledger else open_ledger(ledger),
        given_keys=given,
        is_open=True if no_auth else None,
        limits=Limits(limit, user_limit, requests_per_minute, tokens_per_minute),
        tariff=Tariff(None if prices is None else PriceTable.load(prices), like=price_as),
    )
    max_body_bytes = MAX_BODY_BYTES if max_body_bytes is None else max_body_bytes
    return Operations(accounts, allow_origin or (), max_body_bytes)


def open_ledger(path: Path | None) -> "Ledger | None":
    """The ledger in that file, or in the user's data folder; None with a warning where that folder takes none.

    Raises: ConfigError when the file was named, or is there and cannot be used: its keys would not be asked for.
    """
    from rorqual.ledger import Ledger, default_path

    try:
        return Ledger(path or default_path())
    except ConfigError as error:
        if path is not None or default_path().exists():
            raise
        typer.echo(f"No usage is kept: {error}", err=True)
        return None


def certificate(cert_file: Path | None, key_file: Path | None) -> "Certificate | None":
    """Raises: ConfigError when the files do not load, or there is a key without a certificate."""
    from rorqual.server.listen import Certificate

    if cert_file is None:
        if key_file is not None:
            raise ConfigError("--ssl-keyfile is the key of a certificate, and none was given. Add --ssl-certfile.")
        return None
    return Certificate(cert_file, key_file)


def build_dashboard(evals: Path | None, verdicts: Path | None) -> "Dashboard":
    """What the dashboard shows. Raises: ConfigError for a folder of evals that is none."""
    from rorqual.server.dashboard import Dashboard

    if evals is not None and not evals.is_dir():
        raise ConfigError(f"--evals {evals} is no folder. Give the one that holds the folders of runs.")
    return Dashboard(evals, verdicts)
