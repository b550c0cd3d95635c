"""Verdicts over time, counted from the audit journal: by word and reason, repairs, tokens, times. No texts, no names.

The journal is followed as it grows: each record is read once, into its hour. What is kept is a few numbers an hour,
whatever the traffic; times are kept as a histogram whose steps are 10 % apart.
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from rorqual.journal import Event, Reader
from rorqual.referee.audit import FAILURE, VERDICT

By = Literal["hour", "day"]
HOUR_S: Final = 3600
HOURS_OF: Final[Mapping[str, int]] = {"hour": 1, "day": 24}
MOST_HOURS: Final = 24 * 400
"""Hours that are kept; older ones are forgotten."""
_STEP: Final = math.log(1.1)


@dataclass
class Tally:
    """What happened in a span of time. times: how many requests took each step of the histogram."""

    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    times: Counter[int] = field(default_factory=Counter)
    failures: int = 0
    rounds: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    referee_tokens: int = 0

    def note(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Count one record of the audit journal."""
        if kind == FAILURE:
            self.failures += 1
            return
        self.verdicts[str(fields["verdict"])] += 1
        # a reason counts once a request, and also where a further round cured it
        codes = {row["reason_code"] for row in fields.get("checks", ())}
        codes |= {code for one in fields.get("rounds_asked", ()) for code in one["codes"]}
        self.reasons.update(str(code) for code in codes if code is not None)
        self.rounds += int(fields.get("rounds") or 0)
        tokens = fields.get("tokens") or {}
        self.prompt_tokens += _whole(tokens.get("prompt_tokens"))
        self.completion_tokens += _whole(tokens.get("completion_tokens"))
        self.referee_tokens += sum(map(_whole, (fields.get("usage") or {}).values()))
        self.times[_step_of(1000 * float(fields.get("duration_s") or 0.0))] += 1

    def add(self, other: Tally) -> None:
        for name in ("verdicts", "reasons", "times"):
            getattr(self, name).update(getattr(other, name))
        for name in ("failures", "rounds", "prompt_tokens", "completion_tokens", "referee_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def quantile_ms(self, q: float) -> float | None:
        """Time that a share `q` of the judged requests took at most, within 5 %; None without any."""
        left = q * sum(self.times.values())
        for step in sorted(self.times):
            left -= self.times[step]
            if left <= 1e-9:
                return math.exp((step + 0.5) * _STEP)
        return None

    def to_dict(self) -> dict[str, Any]:
        """repair_rate: of the answers that had a fault, the share that went out repaired; None where none had."""
        judged = sum(self.verdicts.values())
        faulty = judged - self.verdicts["pass"]
        return {
            "judged": judged,
            "failures": self.failures,
            "verdicts": dict(self.verdicts.most_common()),
            "reasons": dict(self.reasons.most_common()),
            "repair_rate": self.verdicts["repaired"] / faulty if faulty else None,
            "rounds": self.rounds,
            "tokens": {
                "prompt": self.prompt_tokens, "completion": self.completion_tokens, "referee": self.referee_tokens,
            },
            "latency_ms": {"p50": self.quantile_ms(0.5), "p95": self.quantile_ms(0.95)},
        }  # fmt: skip


class History:
    """Counts the verdicts of a journal that somebody may still be writing, this process too. Thread-safe.

    A folder that does not exist yet holds no verdicts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader: Reader | None = None
        self._lock = threading.Lock()
        self._hours: dict[int, Tally] = {}

    def over(self, by: By, last: int, now: float) -> dict[str, Any]:
        """The last `last` hours or days (UTC) up to `now`, oldest first, and their sum.

        Raises: JournalError when the journal is damaged.
        """
        span = HOURS_OF[by]
        newest = int(now // (HOUR_S * span))
        with self._lock:
            self._follow()
            total, spans = Tally(), dict[int, Tally]()
            for number in range(newest - last + 1, newest + 1):
                spans[number] = Tally()
                for hour in range(number * span, (number + 1) * span):
                    if hour in self._hours:
                        spans[number].add(self._hours[hour])
                total.add(spans[number])
        buckets = [{"time": number * span * HOUR_S, **tally.to_dict()} for number, tally in spans.items()]
        return {"by": by, "buckets": buckets, "total": total.to_dict()}

    def close(self) -> None:
        with self._lock:
            if self._reader is not None:
                self._reader.close()
                self._reader = None

    def count(self, records: Iterable[Any]) -> None:
        """Count audit records; others are passed over."""
        for record in records:
            if not isinstance(record, Event) or record.kind not in (VERDICT, FAILURE):
                continue
            fields = json.loads(record.fields["json"]) if set(record.fields) == {"json"} else record.fields
            self._hours.setdefault(int(fields["time"] // HOUR_S), Tally()).note(record.kind, fields)
        for hour in sorted(self._hours)[:-MOST_HOURS]:
            del self._hours[hour]

    def _follow(self) -> None:
        if self._reader is None:
            if not self._folder.is_dir():
                return
            self._reader = Reader(self._folder)
        self.count(record for _, record in self._reader.poll())


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _step_of(ms: float) -> int:
    return math.floor(math.log(max(ms, 1e-3)) / _STEP)
