"""What answers were, kept on disk: it outlives the process, and several gateways may share it.

SQLite holds what is sealed. Every entry is encrypted (AES-256-GCM) under a key of its own, made of a secret that lies
beside the file and of what the answer is known by: its owner, its call ids, its text. So who has no such conversation
of that very owner can find no entry, and the file alone says nothing but sizes and times. An entry that was changed, or
sealed with another secret, is as if it were not there.

An answer is committed before it is given out in the modes that judge first. A killed process loses nothing that was
committed; a machine that loses power may lose the last of it, and then the model thinks again.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rorqual import log
from rorqual.errors import ConfigError, MissingExtraError
from rorqual.ledger.database import Database, Form
from rorqual.referee.continuity import Continuity, Kept

logger = log.get(__name__)

FORM: Final = Form(
    "store of reasoning",
    1,
    """
CREATE TABLE kept (
    id BLOB PRIMARY KEY,
    used REAL NOT NULL,
    nbytes INTEGER NOT NULL,
    sealed BLOB NOT NULL
);
CREATE INDEX kept_by_use ON kept (used);
CREATE TABLE size (nbytes INTEGER NOT NULL);
INSERT INTO size VALUES (0);
CREATE TRIGGER kept_more AFTER INSERT ON kept BEGIN UPDATE size SET nbytes = nbytes + new.nbytes; END;
CREATE TRIGGER kept_less AFTER DELETE ON kept BEGIN UPDATE size SET nbytes = nbytes - old.nbytes; END;
""",
    "Give the gateway a folder it may write, with --continuity FOLDER, or keep it in memory with --continuity memory.",
    "name another folder with --continuity",
)
_NONCE_BYTES: Final = 12
_BESIDES_BYTES: Final = 64
"""Of an entry besides what is sealed: its id, times and places in two indexes, about."""
_TOUCH_SHARE: Final = 0.01
"""A use is written down once it is later than the last by this share of the time things are kept."""


class DiskContinuity(Continuity):
    """As `Continuity`, in a folder. Thread-safe; processes may share the folder.

    max_bytes: of all entries on the disk. clock: wall time in seconds. Raises: ConfigError, MissingExtraError.
    """

    is_on_disk = True

    def __init__(
        self,
        folder: Path,
        max_bytes: int = 256 << 20,
        expires_s: float = 7 * 24 * 3600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(max_bytes, expires_s, clock)
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise MissingExtraError(
                'reasoning is kept sealed on the disk. Install "rorqual[serve]", which brings cryptography, or keep '
                "it in memory with --continuity memory."
            ) from None
        self._cipher = AESGCM
        self._database = Database(folder / "continuity.sqlite", FORM)
        try:
            self._secret = _secret(folder / "continuity.key")
        except OSError as error:
            raise ConfigError(f"the secret of {folder} cannot be used: {error}. {FORM.advice}") from error

    def __len__(self) -> int:
        with self._database.reading() as rows:
            return int(rows.execute("SELECT count(*) FROM kept").fetchone()[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        with self._database.reading() as rows:
            return int(rows.execute("SELECT nbytes FROM size").fetchone()[0])

    def close(self) -> None:
        self._database.close()

    def _keep(self, keys: Sequence[bytes], kept: Kept) -> None:
        plain = json.dumps([kept.reasoning, kept.calls, kept.arguments]).encode()
        entries = [(self._id(key), self._seal(key, plain)) for key in keys]
        try:
            with self._database.transaction(outlives_power=False) as rows:
                for id, sealed in entries:
                    rows.execute("DELETE FROM kept WHERE id = ?", (id,))
                    size = len(sealed) + _BESIDES_BYTES
                    rows.execute("INSERT INTO kept VALUES (?, ?, ?, ?)", (id, kept.used, size, sealed))
        except sqlite3.Error:  # the answer is made and goes out all the same
            logger.exception("reasoning could not be kept")

    def _find(self, keys: Sequence[bytes]) -> Kept | None:
        ids = {self._id(key): key for key in keys}
        marks = ",".join("?" * len(ids))
        try:
            with self._database.reading() as rows:
                found = rows.execute(f"SELECT id, used, sealed FROM kept WHERE id IN ({marks})", list(ids)).fetchall()
            self._touch([row["id"] for row in found if row["used"] < self._clock() - _TOUCH_SHARE * self._expires_s])
        except sqlite3.Error:
            logger.exception("reasoning could not be looked up")
            return None
        sealed = {bytes(row["id"]): row for row in found}
        for id, key in ids.items():  # surest first
            opened = self._open(key, sealed[id]) if id in sealed else None
            if opened is not None:
                return opened
        return None

    def _touch(self, ids: Sequence[bytes]) -> None:
        if ids:
            with self._database.transaction(outlives_power=False) as rows:
                rows.executemany("UPDATE kept SET used = ? WHERE id = ?", [(self._clock(), id) for id in ids])

    def _forget_old(self) -> None:
        oldest = self._clock() - self._expires_s
        try:
            with self._database.reading() as rows:
                first = rows.execute("SELECT min(used) FROM kept").fetchone()[0]
                size = rows.execute("SELECT nbytes FROM size").fetchone()[0]
            if first is None or (first >= oldest and size <= self._max_bytes):
                return
            with self._database.transaction(outlives_power=False) as rows:
                rows.execute("DELETE FROM kept WHERE used < ?", (oldest,))
                over = rows.execute("SELECT nbytes FROM size").fetchone()[0] - self._max_bytes
                by_use = rows.execute("SELECT id, nbytes FROM kept ORDER BY used, rowid")
                last = []
                while over > 0 and (row := by_use.fetchone()) is not None:
                    last.append((row["id"],))
                    over -= row["nbytes"]
                rows.executemany("DELETE FROM kept WHERE id = ?", last)
        except sqlite3.Error:
            logger.exception("old reasoning could not be forgotten")

    def _id(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, b"id" + key, "sha256")[:16]

    def _seal(self, key: bytes, plain: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher(self._sealing_key(key)).encrypt(nonce, plain, self._id(key))

    def _open(self, key: bytes, row: sqlite3.Row) -> Kept | None:
        from cryptography.exceptions import InvalidTag

        sealed = bytes(row["sealed"])
        try:
            plain = self._cipher(self._sealing_key(key)).decrypt(
                sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self._id(key)
            )
        except (InvalidTag, ValueError):
            return None
        reasoning, calls, arguments = json.loads(plain)
        sampled = tuple(tuple((str(k), str(v), bool(s)) for k, v, s in call) for call in calls)
        return Kept(row["used"], reasoning, sampled, tuple(arguments))

    def _sealing_key(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, b"seal" + key, "sha256")


def _secret(path: Path) -> bytes:
    """The folder's secret, made when there is none; of several processes that make one, the first one's holds."""
    made = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        if not path.exists():
            handle = os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(made, path)  # unlike a rename, it fails where another one is there already
        secret = path.read_bytes()
    finally:
        made.unlink(missing_ok=True)
    if len(secret) != 32:
        raise OSError(f"{path.name} holds {len(secret)} bytes and not 32; remove it, and what it sealed is lost")
    return secret
