"""`rorqual keys`: the keys of the ledger, which servers on this machine ask for."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from rorqual.cli.options import OUTPUT, Json
from rorqual.errors import ConfigError
from rorqual.ledger import Key, Ledger, Limits, default_path
from rorqual.ledger import keys as stored
from rorqual.money import amount_text, parse_amount

LIMITS = "Limits of a new key"


def keys(
    action: Annotated[
        Literal["add", "list", "top-up", "revoke"], typer.Argument(help="What to do.", metavar="ACTION")
    ] = "list",
    name: Annotated[str | None, typer.Argument(help="Name of the key, as usage shows it.", metavar="NAME")] = None,
    amount: Annotated[str | None, typer.Argument(help="Money to add, for top-up.", metavar="AMOUNT")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="What it may spend; without end otherwise.", rich_help_panel=LIMITS)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Requests it may run at a time.", rich_help_panel=LIMITS)
    ] = None,
    user_limit: Annotated[
        int | None, typer.Option("--user-limit", min=1, help="The same for each user_id.", rich_help_panel=LIMITS)
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option("--requests-per-minute", min=1, help="Requests in any 60 s.", rich_help_panel=LIMITS),
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option("--tokens-per-minute", min=1, help="Tokens in any 60 s.", rich_help_panel=LIMITS),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option("--ledger", help="File of the ledger; in your data folder otherwise.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make, list, top up and revoke API keys: rorqual keys [list | add NAME | top-up NAME AMOUNT | revoke NAME].

    \b
    rorqual keys add ada --budget 5 --limit 10
    rorqual keys top-up ada 2.50
    rorqual keys revoke ada

    A key is shown once, when it is made; the ledger keeps its hash. A server that starts while there are keys asks for
    one. Revoking works at once, in running servers too.
    """
    _check(action, name, amount, [budget, limit, user_limit, requests_per_minute, tokens_per_minute])
    book = Ledger(ledger or default_path())
    try:
        if action == "list" or name is None:
            _print_all(book, as_json)
        elif action == "add":
            limits = Limits(limit, user_limit, requests_per_minute, tokens_per_minute)
            picos = None if budget is None else parse_amount(budget)
            secret = stored.add(book.database, name, budget=picos, limits=limits)
            typer.echo(json.dumps({"name": name, "key": secret}) if as_json else secret)
        elif action == "top-up":
            key = stored.top_up(book.database, name, parse_amount(amount or ""))
            _print_one(key, f"{name} has {amount_text(key.balance or 0)} {book.currency()}", as_json)
        else:
            stored.revoke(book.database, name)
            _print_one(stored.named(book.database, name), f"{name} is revoked", as_json)
    finally:
        book.close()


def _check(action: str, name: str | None, amount: str | None, of_new: list[object]) -> None:
    """Raises: ConfigError when the action lacks its words, or has others'."""
    wants_name, wants_amount = action != "list", action == "top-up"
    if (name is not None, amount is not None) != (wants_name, wants_amount):
        form = f"rorqual keys {action}{' NAME' if wants_name else ''}{' AMOUNT' if wants_amount else ''}"
        raise ConfigError(f"`keys {action}` has other words than it takes. Write: {form}")
    if action != "add" and any(value is not None for value in of_new):
        raise ConfigError(f"budget and limits belong to a new key, not to `keys {action}`. Leave them out.")


def _print_one(key: Key, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(_described(key)) if as_json else text)


def _described(key: Key) -> dict[str, object]:
    return {
        "name": key.name,
        "hint": key.hint,
        "created": _day(key.created),
        "revoked": None if key.revoked is None else _day(key.revoked),
        "granted": None if key.granted is None else amount_text(key.granted),
        "topped_up": None if key.topped_up is None else amount_text(key.topped_up),
        "balance": None if key.balance is None else amount_text(key.balance),
        **key.limits.to_dict(),
    }


def _print_all(book: Ledger, as_json: bool) -> None:
    found = stored.every(book.database)
    if as_json:
        typer.echo(json.dumps([_described(key) for key in found]))
        return
    if not found:
        typer.echo("No keys. Make one with: rorqual keys add NAME")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("key", "ends in", "made", "left", "limits", ""):
        table.add_column(title)
    for key in found:
        limits = ", ".join(f"{name} {value}" for name, value in key.limits.to_dict().items() if value is not None)
        left = "no budget" if key.balance is None else f"{amount_text(key.balance)} {book.currency()}"
        row = (key.name, key.hint, _day(key.created), left, limits.replace("_", " "), "revoked" if key.revoked else "")
        table.add_row(*row)
    Console().print(table)


def _day(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")
