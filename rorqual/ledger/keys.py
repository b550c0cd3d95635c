"""API keys: made here, kept as hashes, found by what a client sends."""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass, fields
from typing import Any

from rorqual.errors import ConfigError
from rorqual.ledger.database import Database
from rorqual.money import PICOS

MAX_AMOUNT = 10**6 * PICOS  # a million; sums of many still fit SQLite's integers
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Limits:
    """What one key may do at a time; None sets no bound.

    running: requests at a time. running_per_user: the same for each `user_id`, the empty one being a user of its own.
    requests_per_minute, tokens_per_minute: over the last 60 seconds, tokens of prompts and output.
    """

    running: int | None = None
    running_per_user: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in self.to_dict().values())

    def to_dict(self) -> dict[str, int | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def or_else(self, other: Limits) -> Limits:
        """These, and the other's where there is none."""
        mine, theirs = self.to_dict(), other.to_dict()
        return Limits(**{name: theirs[name] if mine[name] is None else mine[name] for name in mine})


@dataclass(frozen=True)
class Key:
    """A key of the ledger. `granted` and `topped_up`: what is left of each, in picos; None without a budget."""

    name: str
    hint: str
    created: float
    revoked: float | None
    granted: int | None
    topped_up: int | None
    limits: Limits

    @property
    def balance(self) -> int | None:
        return None if self.granted is None else self.granted + (self.topped_up or 0)


def digest(secret: str) -> bytes:
    """What is kept of a key. Keys are long and random, so a plain hash cannot be searched."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def add(database: Database, name: str, *, budget: int | None = None, limits: Limits | None = None) -> str:
    """Make a key and return it; it cannot be read again. budget: in picos, None for none.

    Raises: ConfigError for a name that is taken or none, or a budget out of range.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a key. Use letters, digits, dots, dashes and underscores, up to 64.")
    _check(budget)
    secret = f"sk-{secrets.token_hex(24)}"
    limits = limits or Limits()
    row = {
        "name": name,
        "digest": digest(secret),
        "hint": secret[-4:],
        "created": time.time(),
        "granted": budget,
        "topped_up": None if budget is None else 0,
        **limits.to_dict(),
    }
    try:
        with database.transaction() as rows:
            rows.execute(f"INSERT INTO keys ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", [*row.values()])
    except sqlite3.IntegrityError as error:
        raise ConfigError(
            f"there is a key named {name!r} already (a revoked one keeps its name, for its usage). Take another name."
        ) from error
    return secret


def top_up(database: Database, name: str, amount: int) -> Key:
    """Add picos to a key's budget. Raises: ConfigError when there is no such key, or it has no budget."""
    _check(amount)
    with database.transaction() as rows:
        key = _named(rows, name)
        if key.balance is None:
            raise ConfigError(f"the key {name!r} has no budget, so it may spend without end. Nothing was added.")
        _check(key.balance + amount)
        rows.execute("UPDATE keys SET topped_up = topped_up + ? WHERE name = ?", (amount, name))
        return _named(rows, name)


def revoke(database: Database, name: str) -> None:
    """Refuse the key from now on, in every server. Raises: ConfigError when there is no such key."""
    with database.transaction() as rows:
        _named(rows, name)
        rows.execute("UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL", (time.time(), name))


def every(database: Database) -> list[Key]:
    """All keys in the order they were made."""
    with database.reading() as rows:
        return [_key(row) for row in rows.execute("SELECT * FROM keys ORDER BY created, name")]


def named(database: Database, name: str) -> Key:
    """Raises: ConfigError when there is no such key."""
    with database.reading() as rows:
        return _named(rows, name)


def find(database: Database, secret: str) -> Key | None:
    """The key that is not revoked; None for any other text.

    The look-up is by hash: how long it takes tells of the hash of what was sent, never of a key.
    """
    with database.reading() as rows:
        row = rows.execute("SELECT * FROM keys WHERE digest = ? AND revoked IS NULL", (digest(secret),)).fetchone()
        return None if row is None else _key(row)


def _named(rows: sqlite3.Connection, name: str) -> Key:
    row = rows.execute("SELECT * FROM keys WHERE name = ?", (name,)).fetchone()
    if row is None:
        known = [row["name"] for row in rows.execute("SELECT name FROM keys ORDER BY created")]
        raise ConfigError(f"there is no key named {name!r}. Keys: {', '.join(known) or 'none yet'}.")
    return _key(row)


def _key(row: Any) -> Key:
    limits = Limits(**{field.name: row[field.name] for field in fields(Limits)})
    parts = {name: row[name] for name in ("name", "hint", "created", "revoked", "granted", "topped_up")}
    return Key(**parts, limits=limits)


def _check(amount: int | None) -> None:
    if amount is not None and not 0 <= amount <= MAX_AMOUNT:
        raise ConfigError("a budget goes from 0 to 1,000,000. Give the key none to let it spend without end.")
