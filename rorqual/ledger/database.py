"""Files that any number of processes share: SQLite with a write-ahead log. `LEDGER` is one: keys, budgets, usage.

A transaction is short and takes the write lock at once, so what it read still holds when it writes. A process may be
killed at any moment: what was committed stays, what was not is as if it had never begun. Amounts of money are whole
picos (1e-12 of a currency unit); times are seconds since 1970.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import ConfigError
from rorqual.folders import data_folder

WAIT_S = 30
"""Longest wait for another process that writes."""

VERSION = 1
_KEYS_AND_USAGE = """
CREATE TABLE keys (
    name TEXT PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,      -- SHA-256 of the key, which itself is nowhere
    hint TEXT NOT NULL,               -- its last four characters
    created REAL NOT NULL,
    revoked REAL,
    granted INTEGER,                  -- what is left; NULL: no budget, so no bound
    topped_up INTEGER,
    running INTEGER,                  -- limits; NULL: the server's own
    running_per_user INTEGER,
    requests_per_minute INTEGER,
    tokens_per_minute INTEGER
);
CREATE TABLE reservations (           -- one row for each request that runs
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    server TEXT NOT NULL,
    account TEXT NOT NULL,
    user_id TEXT NOT NULL,
    amount INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    started REAL NOT NULL,
    trace TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL
);
CREATE INDEX reservations_of_account ON reservations (account);
CREATE TABLE usage (                  -- one row for each request that ran
    id INTEGER PRIMARY KEY,
    started REAL NOT NULL,
    account TEXT NOT NULL,
    user_id TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    trace TEXT NOT NULL,
    status INTEGER NOT NULL,
    finish TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    hit_tokens INTEGER NOT NULL,
    miss_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    reasoning_tokens INTEGER NOT NULL,
    cost INTEGER NOT NULL,
    without_cache INTEGER NOT NULL,
    duration REAL NOT NULL
);
CREATE INDEX usage_of_account ON usage (account, started);
CREATE INDEX usage_by_time ON usage (started);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Form:
    """What a file holds. name: for errors. tables: SQL, a statement up to each `;` at a line's end. advice: what to do
    where a file cannot be used, and elsewhere: where its version is another.
    """

    name: str
    version: int
    tables: str
    advice: str
    elsewhere: str


LEDGER = Form(
    "ledger",
    VERSION,
    _KEYS_AND_USAGE,
    "Give the server a file it may write, with --ledger FILE, or run it with --no-ledger.",
    "name another file with --ledger",
)


def default_path() -> Path:
    """`ledger.sqlite` in the user's data folder: $RORQUAL_HOME, $XDG_DATA_HOME/rorqual, or ~/.local/share/rorqual."""
    return data_folder() / "ledger.sqlite"


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. While others do the same, SQLite says `locked` at once, without its usual wait."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Database:
    """Two connections, one to write and one to read, which threads take in turns.

    path: None keeps everything in memory, for this process alone. form: what it holds.
    Raises: ConfigError when the file cannot be used.
    """

    def __init__(self, path: Path | None, form: Form = LEDGER) -> None:
        self.path, self._form = path, form
        self._writing, self._reading = threading.Lock(), threading.Lock()
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite's own files take the same mode
            self._writer = _connect(path)
            _use_wal(self._writer)
            if path is None:
                self._reader, self._reading = self._writer, self._writing
            else:
                self._reader = _connect(path)  # which does not wait while the other one writes
            with self.transaction() as rows:
                self._prepare(rows)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the {form.name} {path} cannot be used: {error}. {form.advice}") from error

    @contextmanager
    def transaction(self, *, outlives_power: bool = True) -> Iterator[sqlite3.Connection]:
        """Everything in the block, or nothing; nobody else writes meanwhile.

        outlives_power: wait until the disk has it. Without, which is quicker, it outlives the process only.
        """
        with self._writing:
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if outlives_power else 'NORMAL'}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the file, whatever others write meanwhile."""
        with self._reading:
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                self._reader.execute("COMMIT")

    def close(self) -> None:
        with self._writing:
            self._writer.close()
            self._reader.close()

    def _prepare(self, rows: sqlite3.Connection) -> None:
        version = rows.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            for statement in self._form.tables.split(";\n"):
                rows.execute(statement)
            rows.execute(f"PRAGMA user_version = {self._form.version}")
        elif version != self._form.version:
            raise ConfigError(
                f"the {self._form.name} {self.path} has version {version}, and this Rorqual reads version "
                f"{self._form.version}. Use the Rorqual that wrote it, or {self._form.elsewhere}."
            )


def _connect(path: Path | None) -> sqlite3.Connection:
    where = ":memory:" if path is None else path
    connection = sqlite3.connect(where, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection
