"""The journal's peer: records as rows of an SQLite database that syncs each transaction."""

import sqlite3
from pathlib import Path

PEER = f"SQLite {sqlite3.sqlite_version} (WAL, synchronous=FULL)"

Row = tuple[int, int, bytes]
"""LSN, type, payload."""


def connect(path: Path) -> sqlite3.Connection:
    """The database with its table; used in the thread that asks."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE IF NOT EXISTS records (lsn INTEGER PRIMARY KEY, type INTEGER, payload BLOB)")
    return database


def insert(database: sqlite3.Connection, rows: list[Row]) -> None:
    """One transaction, durable on return."""
    database.execute("BEGIN")
    database.executemany("INSERT INTO records VALUES (?, ?, ?)", rows)
    database.execute("COMMIT")
