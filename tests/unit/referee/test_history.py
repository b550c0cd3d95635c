"""Verdicts over time: counted from a journal as it grows, against sums made here from the same records."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rorqual.journal import Event, Journal
from rorqual.referee.audit import FAILURE, VERDICT
from rorqual.referee.history import HOUR_S, History

NOW = 1_800_000_000.0 + 1234
WORDS = ("pass", "repaired", "flagged", "rejected")
CODES = ("arith_wrong", "type_wrong", "schema_not_json")


def verdict(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(WORDS)
    codes = [] if word == "pass" else rng.sample(CODES, rng.randint(1, 3))
    return {
        "time": NOW - rng.uniform(0, 60 * HOUR_S),
        "verdict": word,
        "checks": [{"reason_code": code} for code in codes],
        "rounds_asked": [{"codes": codes[:1], "left": []}] if codes else [],
        "rounds": len(codes[:1]),
        "tokens": None if rng.random() < 0.1 else {"prompt_tokens": rng.randint(1, 999), "completion_tokens": 7},
        "usage": {"prompt_tokens": 3, "completion_tokens": rng.randint(0, 9)},
        "duration_s": math.exp(rng.uniform(-7, 2)),
    }


def journal_of(folder: Path, records: list[Event]) -> Journal:
    journal = Journal(folder)
    for record in records:
        journal.append(record)
    journal.commit()
    return journal


def test_counts_by_hour_and_day(tmp_path: Path) -> None:
    rng = random.Random(5)
    made = [verdict(rng) for _ in range(400)]
    records = [Event(VERDICT, one) for one in made] + [Event(FAILURE, {"time": NOW - 10, "status": 502, "why": "x"})]
    records += [Event("something.else", {"time": NOW})]
    journal_of(tmp_path, records).close()
    history = History(tmp_path)
    for by, seconds, last in (("hour", HOUR_S, 24), ("day", 24 * HOUR_S, 2), ("hour", HOUR_S, 400)):
        told = history.over(by, last, NOW)  # type: ignore[arg-type]
        newest = int(NOW // seconds)
        assert [one["time"] for one in told["buckets"]] == [seconds * n for n in range(newest - last + 1, newest + 1)]
        for bucket in told["buckets"]:
            mine = [one for one in made if bucket["time"] <= one["time"] < bucket["time"] + seconds]
            assert bucket["verdicts"] == Counter(one["verdict"] for one in mine)
            assert bucket["reasons"] == Counter(row["reason_code"] for one in mine for row in one["checks"])
        mine = [one for one in made if one["time"] >= told["buckets"][0]["time"]]
        total = told["total"]
        faulty = [one for one in mine if one["verdict"] != "pass"]
        assert total["judged"] == len(mine) and total["failures"] == 1
        assert total["repair_rate"] == sum(one["verdict"] == "repaired" for one in faulty) / len(faulty)
        assert total["rounds"] == sum(one["rounds"] for one in mine)
        assert total["tokens"] == {
            "prompt": sum((one["tokens"] or {}).get("prompt_tokens", 0) for one in mine),
            "completion": sum((one["tokens"] or {}).get("completion_tokens", 0) for one in mine),
            "referee": sum(sum(one["usage"].values()) for one in mine),
        }
        times = [1000 * one["duration_s"] for one in mine]
        for name, q in (("p50", 0.5), ("p95", 0.95)):
            exact = np.quantile(times, q, method="inverted_cdf")
            assert total["latency_ms"][name] == pytest.approx(exact, rel=0.05)
    history.close()


def test_a_growing_journal_is_counted_once(tmp_path: Path) -> None:
    history, rng = History(tmp_path / "journal"), random.Random(1)
    assert history.over("day", 30, NOW)["total"]["judged"] == 0  # nobody has written it yet
    journal, made = Journal(tmp_path / "journal"), list[dict[str, Any]]()
    for _ in range(3):
        for one in (verdict(rng) for _ in range(20)):
            made.append(one)
            journal.append(Event(VERDICT, one))
        journal.commit()
        total = history.over("day", 30, NOW)["total"]
        assert total["verdicts"] == Counter(one["verdict"] for one in made)
    journal.close()
    history.close()


def test_nothing_is_no_rate(tmp_path: Path) -> None:
    total = History(tmp_path / "absent").over("hour", 1, NOW)["total"]
    assert total["repair_rate"] is None and total["latency_ms"] == {"p50": None, "p95": None}
