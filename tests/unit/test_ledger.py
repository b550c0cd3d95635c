"""The ledger: budgets that hold under races and crashes, limits, and what `summary` adds up."""

import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import ledger_process
import pytest

from rorqual.errors import ConfigError, RequestError
from rorqual.ledger import keys
from rorqual.ledger.keys import Limits
from rorqual.ledger.ledger import LOST, Asked, Ledger, Used

FREE = Limits()


class Clock:
    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite", clock=clock)
    yield ledger
    ledger.close()


def asked(account: str = "ada", amount: int = 100, user: str = "", prompt_tokens: int = 10) -> Asked:
    return Asked(account, user, "minke", "/v1/chat/completions", "trace", prompt_tokens, amount)


def used(cost: int = 60, tokens: int = 5) -> Used:
    return Used(200, "stop", 10, 4, 6, tokens, 2, cost, cost + 1, 1.5)


def balance(ledger: Ledger, name: str = "ada") -> int:
    left = keys.named(ledger.database, name).balance
    assert left is not None
    return left


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, ledger_process.__file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_request_reserves_its_worst_and_pays_its_true_cost(ledger: Ledger) -> None:
    keys.add(ledger.database, "ada", budget=250)
    first = ledger.reserve(asked(), FREE)
    ledger.reserve(asked(), FREE)
    assert (ledger.held("ada"), balance(ledger)) == (200, 250)
    with pytest.raises(RequestError, match="^Insufficient Balance$") as refused:
        ledger.reserve(asked(), FREE)
    assert (refused.value.status, refused.value.type, refused.value.code) == (
        402,
        "unknown_error",
        "invalid_request_error",
    )
    ledger.settle(first, used(cost=60))
    assert (ledger.held("ada"), balance(ledger)) == (100, 190)
    ledger.reserve(asked(amount=90), FREE)
    with pytest.raises(RequestError):
        ledger.reserve(asked(amount=1), FREE)


def test_granted_money_is_spent_first(ledger: Ledger) -> None:
    keys.add(ledger.database, "ada", budget=100)
    keys.top_up(ledger.database, "ada", 1000)
    left = []
    for cost in (70, 70, 70):
        ledger.settle(ledger.reserve(asked(amount=100), FREE), used(cost))
        key = keys.named(ledger.database, "ada")
        left.append((key.granted, key.topped_up))
    assert left == [(30, 1000), (0, 960), (0, 890)]


def test_a_key_without_a_budget_spends_freely(ledger: Ledger) -> None:
    keys.add(ledger.database, "ada")
    ledger.settle(ledger.reserve(asked(amount=10**15), FREE), used(cost=10**15))
    assert keys.named(ledger.database, "ada").balance is None
    assert ledger.summary(())[0]["cost"] == 10**15
    with pytest.raises(ConfigError, match="no budget"):
        keys.top_up(ledger.database, "ada", 1)


def test_threads_never_overspend_together(ledger: Ledger) -> None:
    keys.add(ledger.database, "ada", budget=1000)
    spent, lock = [0], threading.Lock()

    def spend(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(20):
            worst = dice.randint(1, 120)
            try:
                reservation = ledger.reserve(asked(amount=worst), FREE)
            except RequestError:
                continue
            cost = dice.randint(0, worst)
            with lock:
                spent[0] += cost
            ledger.settle(reservation, used(cost))
            assert balance(ledger) >= 0

    threads = [threading.Thread(target=spend, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1000 - spent[0] == balance(ledger) >= 0
    assert ledger.summary(())[0]["cost"] == spent[0] and ledger.held("ada") == 0


def test_processes_never_overspend_together(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    keys.add(ledger.database, "ada", budget=57 * ledger_process.WORST + 99)
    racers = [start(path, "ada", "race", 25) for _ in range(4)]
    won = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sum(won) == 57 and balance(ledger) == 99, won
    ledger.close()


def test_a_killed_process_loses_no_settled_row_and_its_reservation(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    keys.add(ledger.database, "ada", budget=10**9)
    for _ in range(3):
        before = ledger.summary(())
        spender = start(path, "ada", "spend")
        assert spender.stdout is not None
        told = [int(spender.stdout.readline()) for _ in range(40)]
        os.kill(spender.pid, signal.SIGKILL)
        told += [int(line) for line in spender.stdout.read().splitlines()]
        spender.wait()
        spender.stdout.close()
        ledger.release_of_the_dead()
        now = ledger.summary(())[0]
        cost = now["cost"] - (before[0]["cost"] if before else 0)
        assert cost in (sum(told), sum(told) + told[-1] + 1)  # one may have been settled and not told of yet
        assert ledger.held("ada") == 0
    assert balance(ledger) == 10**9 - now["cost"]
    ledger.close()


def test_what_the_dead_hold_is_given_back_before_anybody_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    keys.add(ledger.database, "ada", budget=150)
    holder = start(path, "ada", "hold")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RequestError):
        ledger.reserve(asked(), FREE)
    with pytest.raises(RequestError):
        ledger.reserve(asked(amount=1), Limits(running=1))
    holder.kill()
    holder.wait()
    holder.stdout.close()
    ledger.settle(ledger.reserve(asked(), FREE), used(1))
    (lost,) = [row for row in ledger.summary(("endpoint",)) if row["failed"]]
    assert (lost["requests"], lost["failed"]) == (2, 1)
    with ledger.database.reading() as rows:
        assert [row[0] for row in rows.execute("SELECT finish FROM usage ORDER BY id")] == [LOST, "stop"]
    assert os.listdir(tmp_path / "ledger.sqlite.servers") == [ledger.server]
    ledger.close()
    assert os.listdir(tmp_path / "ledger.sqlite.servers") == []


def test_two_ledgers_of_one_process_know_each_other_alive(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    one, other = Ledger(path), Ledger(path)
    keys.add(one.database, "ada", budget=100)
    one.reserve(asked(), FREE)
    with pytest.raises(RequestError):
        other.reserve(asked(amount=1), FREE)
    one.close()  # as when a server stops in the middle of a request
    other.reserve(asked(), FREE)
    other.close()


def test_many_processes_may_make_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.sqlite"
    racers = [start(path, "nobody", "race", 3) for _ in range(4)]
    assert [int(racer.communicate(timeout=60)[0]) for racer in racers] == [3] * 4
    ledger = Ledger(path)
    assert ledger.summary(())[0]["requests"] == 12
    ledger.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_running_requests_are_limited_by_key_and_by_user(ledger: Ledger) -> None:
    limits = Limits(running=3, running_per_user=2)
    held = [ledger.reserve(asked(user="u"), limits), ledger.reserve(asked(user="u"), limits)]
    with pytest.raises(RequestError, match="2 requests of user 'u' are running.*key ada") as refused:
        ledger.reserve(asked(user="u"), limits)
    assert refused.value.status == 429 and refused.value.type == "rate_limit_error"
    held.append(ledger.reserve(asked(user=""), limits))  # no user is a user too
    with pytest.raises(RequestError, match="3 requests are running"):
        ledger.reserve(asked(user="v"), limits)
    ledger.reserve(asked(account="bob", user="u"), limits)
    ledger.settle(held[0], used())
    ledger.reserve(asked(user="u"), limits)


def test_requests_a_minute(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(requests_per_minute=3)
    for second in (0, 10, 20):
        clock.now = 1_790_000_000.0 + second
        ledger.settle(ledger.reserve(asked(), limits), used())
    clock.now += 5
    with pytest.raises(RequestError, match="3 requests were made") as refused:
        ledger.reserve(asked(), limits)
    assert refused.value.retry_after_s == pytest.approx(35)
    clock.now += 34.9
    with pytest.raises(RequestError):
        ledger.reserve(asked(), limits)
    clock.now += 0.1
    ledger.reserve(asked(), limits)
    with pytest.raises(RequestError):
        ledger.reserve(asked(), limits)


def test_tokens_a_minute(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(tokens_per_minute=100)
    ledger.settle(ledger.reserve(asked(prompt_tokens=10), limits), used(tokens=40))
    clock.now += 10
    ledger.settle(ledger.reserve(asked(prompt_tokens=10), limits), used(tokens=20))
    with pytest.raises(RequestError, match="80 tokens .* this prompt has 30, more than the 100") as refused:
        ledger.reserve(asked(prompt_tokens=30), limits)
    assert refused.value.retry_after_s == pytest.approx(50)
    clock.now += 50
    ledger.reserve(asked(prompt_tokens=70), limits)
    with pytest.raises(RequestError):
        ledger.reserve(asked(prompt_tokens=1), limits)


def test_the_summary_adds_up_by_any_group(ledger: Ledger, clock: Clock) -> None:
    for account, cost in (("ada", 1), ("bob", 20), ("ada", 300)):
        ledger.settle(ledger.reserve(asked(account), FREE), used(cost))
    clock.now += 86_400
    ledger.record(asked(""), clock.now, Used(499, "client_gone", 10, 0, 10, 1, cost=4000))
    by_key = {row["key"]: (row["requests"], row["cost"], row["failed"]) for row in ledger.summary(["key"])}
    assert by_key == {"": (1, 4000, 1), "ada": (2, 301, 0), "bob": (1, 20, 0)}
    days = ledger.summary(["day", "model"])
    assert [(row["day"], row["model"], row["cost"]) for row in days] == [
        ("2026-09-21", "minke", 321),
        ("2026-09-22", "minke", 4000),
    ]
    assert [row["cost"] for row in ledger.summary((), since=clock.now)] == [4000]
    assert ledger.summary((), since=clock.now + 1) == []


def test_keys_are_kept_as_hashes_and_die_when_revoked(ledger: Ledger, tmp_path: Path) -> None:
    secret = keys.add(ledger.database, "ada", budget=5, limits=Limits(running=2))
    key = keys.find(ledger.database, secret)
    assert key is not None and (key.name, key.hint, key.limits) == ("ada", secret[-4:], Limits(running=2))
    for other in ("", secret[:-1], f"{secret} ", secret.upper(), "\udcff"):
        assert keys.find(ledger.database, other) is None
    for file in tmp_path.iterdir():
        assert file.is_dir() or secret[3:].encode() not in file.read_bytes()
    keys.revoke(ledger.database, "ada")
    assert keys.find(ledger.database, secret) is None
    with pytest.raises(ConfigError, match="named 'ada' already"):
        keys.add(ledger.database, "ada")
    with pytest.raises(ConfigError, match="no key named 'eve'. Keys: ada"):
        keys.revoke(ledger.database, "eve")


@pytest.mark.parametrize(("name", "budget"), [("", 1), ("a b", 1), ("-a", 1), ("x" * 65, 1), ("a", -1), ("a", 10**19)])
def test_impossible_keys_are_refused(ledger: Ledger, name: str, budget: int) -> None:
    with pytest.raises(ConfigError, match="cannot name a key|a budget goes from"):
        keys.add(ledger.database, name, budget=budget)


def test_one_ledger_one_currency(ledger: Ledger) -> None:
    assert ledger.currency() == "USD"
    ledger.use_currency("CNY")
    ledger.use_currency("CNY")
    with pytest.raises(ConfigError, match="counts in CNY and the prices are in USD"):
        ledger.use_currency("USD")


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing of the kind, though long enough to be read as a database" * 20)
    with pytest.raises(ConfigError, match="cannot be used.*--ledger"):
        Ledger(tmp_path / "text")
    with pytest.raises(ConfigError, match="cannot be used"):
        Ledger(tmp_path / "text" / "ledger.sqlite")
    Ledger(tmp_path / "later").close()
    newer = Ledger(tmp_path / "later")
    with newer.database.transaction() as rows:
        rows.execute("PRAGMA user_version = 9")
    newer.close()
    with pytest.raises(ConfigError, match="has version 9"):
        Ledger(tmp_path / "later")
