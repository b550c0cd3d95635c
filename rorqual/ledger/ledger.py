"""What requests may spend, and what they have spent.

A request reserves the most it can cost before it runs, in the same transaction that looks whether the budget has it;
when it ends, the reservation gives way to a usage row with the true cost. So requests of any number of servers never
spend more than there is. Every server holds a lock on a small file while it lives: reservations of one whose lock is
free belong to nobody any more and are given back.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError, RequestError
from rorqual.ledger.database import Database
from rorqual.ledger.keys import Key, Limits

WINDOW_S = 60.0
LOST = "server_lost"  # how a request ended whose server died
GROUPS = {
    "day": "strftime('%Y-%m-%d', started, 'unixepoch')",
    "key": "account",
    "model": "model",
    "user": "user_id",
    "endpoint": "endpoint",
}
_SUMS = (
    "prompt_tokens", "hit_tokens", "miss_tokens", "completion_tokens", "reasoning_tokens", "cost", "without_cache"
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request at the door. `amount`: the most it can cost, in picos."""

    account: str
    user_id: str
    model: str
    endpoint: str
    trace: str
    prompt_tokens: int
    amount: int


@dataclass(frozen=True)
class Used:
    """How a request went."""

    status: int
    finish: str
    prompt_tokens: int = 0
    hit_tokens: int = 0
    miss_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cost: int = 0
    without_cache: int = 0
    duration: float = 0.0


@dataclass(frozen=True)
class Reservation:
    """A place in the ledger, held until `settle`."""

    id: int
    asked: Asked
    started: float


class Ledger:
    """Keys, budgets and usage in one file; safe for threads, processes, and processes that die.

    path: None keeps it in memory. Raises: ConfigError when the file cannot be used.
    """

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.time) -> None:
        self.database = Database(path)
        self.clock = clock
        self.server = uuid.uuid4().hex
        self._folder = None if path is None else path.with_name(f"{path.name}.servers")
        self._alive: int | None = None
        if self._folder is not None:
            self._folder.mkdir(exist_ok=True, mode=0o700)
            self._alive = os.open(self._folder / self.server, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._alive, fcntl.LOCK_EX)
        self.release_of_the_dead()

    def close(self) -> None:
        """Reservations still held are given back: the requests they were for have ended with the server."""
        with self.database.transaction() as rows:
            self._release(rows, self.server)
        self.database.close()
        if self._alive is not None and self._folder is not None:
            (self._folder / self.server).unlink(missing_ok=True)
            os.close(self._alive)
            self._alive = None

    def use_currency(self, currency: str) -> None:
        """Raises: ConfigError when the ledger's amounts are in another one."""
        with self.database.transaction() as rows:
            rows.execute("INSERT OR IGNORE INTO facts VALUES ('currency', ?)", (currency,))
            kept = rows.execute("SELECT value FROM facts WHERE name = 'currency'").fetchone()[0]
        if kept != currency:
            raise ConfigError(
                f"the ledger counts in {kept} and the prices are in {currency}, so budgets would mean another amount. "
                "Use prices in the ledger's currency, or another ledger (--ledger FILE)."
            )

    def currency(self) -> str:
        """What amounts are in; USD until a server with other prices used it."""
        with self.database.reading() as rows:
            row = rows.execute("SELECT value FROM facts WHERE name = 'currency'").fetchone()
            return "USD" if row is None else str(row[0])

    def reserve(self, asked: Asked, limits: Limits) -> Reservation:
        """Take a place and the money for a request, or neither.

        Raises: RequestError 429 over a limit, 402 when the budget does not hold the most it can cost.
        """
        try:
            return self._reserve(asked, limits)
        except RequestError:
            if not self.release_of_the_dead():
                raise
            return self._reserve(asked, limits)

    def settle(self, reservation: Reservation, used: Used) -> None:
        """Charge the true cost, granted money first, and write the usage row; committed when it returns."""
        with self.database.transaction() as rows:
            rows.execute("DELETE FROM reservations WHERE id = ?", (reservation.id,))
            self._charge(rows, reservation.asked.account, used.cost)
            self._write(rows, reservation.asked, reservation.started, used)

    def record(self, asked: Asked, started: float, used: Used) -> None:
        """Write the usage row of a request that needed no reservation."""
        with self.database.transaction() as rows:
            self._write(rows, asked, started, used)

    def held(self, account: str) -> int:
        """Picos that running requests of the account have reserved."""
        with self.database.reading() as rows:
            return _held(rows, account)

    def release_of_the_dead(self) -> int:
        """Give back what servers hold that are no more; how many requests that were."""
        if self._folder is None:
            return 0
        with self.database.reading() as rows:
            servers = [row[0] for row in rows.execute("SELECT DISTINCT server FROM reservations")]
        dead = [server for server in servers if server != self.server and not self._lives(server)]
        if not dead:
            return 0
        with self.database.transaction() as rows:
            return sum(self._release(rows, server) for server in dead)

    def summary(self, by: Sequence[str], since: float = 0.0) -> list[dict[str, Any]]:
        """Sums of usage by the groups named (`GROUPS`), as rows in their order; amounts in picos. Days are UTC."""
        groups = [f"{GROUPS[name]} AS {name}" for name in by]
        sums = [f"SUM({name}) AS {name}" for name in _SUMS]
        what = ", ".join([*groups, "COUNT(*) AS requests", "SUM(status >= 400) AS failed", *sums])
        order = f"GROUP BY {', '.join(by)} ORDER BY {', '.join(by)}" if by else ""
        with self.database.reading() as rows:
            found = rows.execute(f"SELECT {what} FROM usage WHERE started >= ? {order}", (since,))
            return [dict(row) for row in found if row["requests"]]

    def _reserve(self, asked: Asked, limits: Limits) -> Reservation:
        started = self.clock()
        with self.database.transaction(outlives_power=False) as rows:  # no reservation outlives its server anyway
            _check_limits(rows, asked, limits, started)
            row = rows.execute("SELECT granted, topped_up FROM keys WHERE name = ?", (asked.account,)).fetchone()
            if row is not None and row["granted"] is not None:
                left = row["granted"] + row["topped_up"] - _held(rows, asked.account)
                if left < asked.amount or left < 0:
                    raise insufficient_balance()
            columns = {"server": self.server, "started": started, **vars(asked)}
            marks = ", ".join("?" * len(columns))
            added = rows.execute(
                f"INSERT INTO reservations ({', '.join(columns)}) VALUES ({marks})", [*columns.values()]
            )
            assert added.lastrowid is not None
            return Reservation(added.lastrowid, asked, started)

    def _charge(self, rows: sqlite3.Connection, account: str, cost: int) -> None:
        rows.execute(
            "UPDATE keys SET granted = granted - MIN(?1, MAX(granted, 0)),"
            " topped_up = topped_up - (?1 - MIN(?1, MAX(granted, 0)))"
            " WHERE name = ?2 AND granted IS NOT NULL",
            (cost, account),
        )

    def _write(self, rows: sqlite3.Connection, asked: Asked, started: float, used: Used) -> None:
        columns = {**vars(asked), "started": started, **vars(used)}
        del columns["amount"]
        marks = ", ".join("?" * len(columns))
        rows.execute(f"INSERT INTO usage ({', '.join(columns)}) VALUES ({marks})", [*columns.values()])

    def _release(self, rows: sqlite3.Connection, server: str) -> int:
        lost = rows.execute("DELETE FROM reservations WHERE server = ? RETURNING *", (server,)).fetchall()
        for row in lost:
            asked = Asked(**{name: row[name] for name in Asked.__dataclass_fields__})
            used = Used(503, LOST, asked.prompt_tokens, 0, asked.prompt_tokens)
            self._write(rows, asked, row["started"], used)
        return len(lost)

    def _lives(self, server: str) -> bool:
        assert self._folder is not None
        try:
            handle = os.open(self._folder / server, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        (self._folder / server).unlink(missing_ok=True)
        return False


def insufficient_balance() -> RequestError:
    """The hosted API's refusal, in its very words, since clients look for them."""
    return RequestError("Insufficient Balance", status=402, type="unknown_error", code="invalid_request_error")


def balance_of(key: Key | None, held: int = 0) -> tuple[bool, int, int]:
    """Whether a request may still be made, what is left of granted and of topped-up money (picos)."""
    if key is None or key.balance is None:
        return True, 0, 0
    return key.balance - held > 0, key.granted or 0, key.topped_up or 0


def _held(rows: sqlite3.Connection, account: str) -> int:
    found = rows.execute("SELECT COALESCE(SUM(amount), 0) FROM reservations WHERE account = ?", (account,))
    return int(found.fetchone()[0])


def _check_limits(rows: sqlite3.Connection, asked: Asked, limits: Limits, now: float) -> None:
    """Raises: RequestError 429 with the seconds after which it is worth asking again."""
    who = f"key {asked.account}" if asked.account else "this server"
    running = "SELECT COUNT(*) FROM reservations WHERE account = ?"
    for limit, extra, words, values in (
        (limits.running, "", "", [asked.account]),
        (limits.running_per_user, " AND user_id = ?", f" of user {asked.user_id!r}", [asked.account, asked.user_id]),
    ):
        if limit is not None and rows.execute(running + extra, values).fetchone()[0] >= limit:
            raise _too_many(f"{limit} requests{words} are running", f"all that {who} may run", _mean_s(rows, asked))
    recent = "FROM usage WHERE account = ? AND started > ?"
    of_account = [asked.account, now - WINDOW_S]
    if limits.requests_per_minute is not None:
        count = rows.execute(f"SELECT COUNT(*) {recent}", of_account).fetchone()[0]
        count += rows.execute(f"{running} AND started > ?", of_account).fetchone()[0]
        over = count - limits.requests_per_minute
        if over >= 0:
            nth = f"SELECT started {recent} ORDER BY started LIMIT 1 OFFSET ?"
            row = rows.execute(nth, [*of_account, over]).fetchone()
            wait_s = 1.0 if row is None else row[0] + WINDOW_S - now
            what = f"{count} requests were made in the last minute"
            raise _too_many(what, f"all that {who} may make in one", wait_s)
    if limits.tokens_per_minute is not None:
        spent = f"SELECT COALESCE(SUM(prompt_tokens + completion_tokens), 0) {recent}"
        held = "SELECT COALESCE(SUM(prompt_tokens), 0) FROM reservations WHERE account = ?"
        tokens = rows.execute(spent, of_account).fetchone()[0] + rows.execute(held, [asked.account]).fetchone()[0]
        over = tokens + asked.prompt_tokens - limits.tokens_per_minute
        if over > 0:
            entries = f"SELECT started, prompt_tokens + completion_tokens {recent} ORDER BY started"
            raise _too_many(
                f"{tokens} tokens were read and written in the last minute and this prompt has {asked.prompt_tokens}",
                f"more than the {limits.tokens_per_minute} that {who} may use in one",
                _until_less(rows.execute(entries, of_account), over) - now,
            )


def _until_less(entries: Iterable[Any], tokens: int) -> float:
    """When that many tokens will be a minute old; the last entry's time where there are not so many."""
    last = 0.0
    for started, count in entries:
        last, tokens = started, tokens - count
        if tokens <= 0:
            break
    return last + WINDOW_S


def _mean_s(rows: sqlite3.Connection, asked: Asked) -> float:
    """Seconds that the account's last requests took."""
    last = "SELECT duration FROM usage WHERE account = ? AND status < 400 ORDER BY started DESC LIMIT 20"
    mean = rows.execute(f"SELECT AVG(duration) FROM ({last})", [asked.account]).fetchone()[0]
    return float(mean or 1.0)


def _too_many(what: str, limit: str, wait_s: float) -> RequestError:
    return RequestError(
        f"Rate limit reached: {what}, {limit}. Try again in {max(1, round(wait_s))} s.",
        status=429,
        type="rate_limit_error",
        retry_after_s=min(max(1.0, wait_s), WINDOW_S),
    )
