"""What a trial shows: each figure before and after, their difference, and how sure it is.

Only questions decided in both arms count, so that both columns are of the same ones. HR never stands without RET and
OI (evaluation specification, section 12), and wrong answers that became right never without right ones that became
wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rorqual.evals.economy import PriceVector, verification_ratio
from rorqual.evals.metrics import Counts, hallucination_rate, omniscience_index, rescue, retention, share
from rorqual.evals.records import Record
from rorqual.evals.statistics import Interval, compare_right, paired_bootstrap, wilson
from rorqual.evals.trial.questions import Question

MOST_UNDECIDED = 0.005
"""Share of undecided questions above which the result says that it is not valid."""
BOOTSTRAP_SEED = 0


def summarise(
    questions: Sequence[Question], bare: Sequence[Record], after: Sequence[Record], price: PriceVector
) -> dict[str, Any]:
    """The result as one JSON-ready object. The records are in the order of the questions."""
    pairs = [(b, a) for b, a in zip(bare, after, strict=True) if "X" not in (b.grade, a.grade)]
    before, later = [b for b, _ in pairs], [a for _, a in pairs]
    rate = 1 - len(pairs) / len(questions)
    return {
        "suite": "trial",
        "n": len(questions),
        "valid": rate <= MOST_UNDECIDED,
        "before": _arm(before, price),
        "after": _arm(later, price),
        "change": _change(before, later, price),
        "headline": _headline(before, later),
        "by_kind": {kind: _kind(pairs, kind) for kind in sorted({b.stratum["kind"] for b, _ in pairs})},
        "verdicts": dict(Counter(word for record in after for word in _named(record, "verdict.")).most_common()),
        "reasons": dict(Counter(code for record in after for code in _named(record, "code.")).most_common()),
        "undecided": {"n": len(questions) - len(pairs), "rate": rate, "reasons": _undecided(bare, after)},
        "price": asdict(price),
        "notes": _notes(rate, len(pairs), price),
    }


def _arm(records: Sequence[Record], price: PriceVector) -> dict[str, Any]:
    """One column."""
    counts = Counts.of(record.grade for record in records)
    n, solved = len(records), sum(record.score >= 1 for record in records)
    times = [record.t_total_ms for record in records]
    tokens = [_tokens(record) for record in records]
    cost = sum(price.cost(record.usage) for record in records)
    out: dict[str, Any] = {
        "n": n,
        "grades": {letter: int(getattr(counts, letter)) for letter in "CPIA"},
        "rightly_declined": sum(record.grade == "A" and record.score >= 1 for record in records),
        "wrong": _interval(wilson(counts.I, n)),
        "right": _interval(wilson(solved, n)),
        "HR": hallucination_rate(counts),
        "HR_interval": _interval(wilson(counts.I, counts.I + counts.P + counts.A)),
        "OI": omniscience_index(counts),
        "latency_ms": {name: _quantile(times, q) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))},
        "tokens": {"prompt": sum(t[0] for t in tokens), "completion": sum(t[1] for t in tokens)},
        "TPS": share(sum(t[1] for t in tokens), solved),
    }
    if price != PriceVector():
        out |= {"cost": cost, "CPS": share(cost, solved)}
    return out


def _change(before: Sequence[Record], after: Sequence[Record], price: PriceVector) -> dict[str, Any]:
    """Differences of the pairs, with their intervals and tests."""
    forced, gated = [r.grade for r in before], [r.grade for r in after]
    harmed = sum(b.score >= 1 and a.grade == "I" for b, a in zip(before, after, strict=True))
    lost = sum(b.score >= 1 and a.score < 1 for b, a in zip(before, after, strict=True))
    right = sum(b.score >= 1 for b in before)
    kept = sum(f == "C" and g == "C" for f, g in zip(forced, gated, strict=True))
    out: dict[str, Any] = {
        "wrong": _compared(before, after, lambda record: record.grade == "I"),
        "right": _compared(before, after, lambda record: record.score >= 1),
        "RET": retention(forced, gated),
        "RET_interval": _interval(wilson(kept, forced.count("C"))),
        "RESCUE": rescue(forced, gated),
        "right_to_wrong": {"n": harmed, **_cell(wilson(harmed, right))},
        "right_to_not": lost,
        "wrong_to_right": sum(f == "I" and a.score >= 1 for f, a in zip(forced, after, strict=True)),
        "VER": verification_ratio(after),
        "VER_quantiles": _verification(after),
        "latency_ms": _difference(before, after, lambda record: record.t_total_ms),
        "completion_tokens": _difference(before, after, lambda record: float(_tokens(record)[1])),
    }
    if price != PriceVector():
        out["cost"] = _difference(before, after, lambda record: price.cost(record.usage))
    return out


def _verification(records: Sequence[Record]) -> dict[str, float | None]:
    """The referee's tokens over the generation's, question by question."""
    ratios = [one.usage.referee_completion / one.usage.completion for one in records if one.usage.completion]
    return {"p50": _quantile(ratios, 0.5), "p95": _quantile(ratios, 0.95)}


def _headline(before: Sequence[Record], after: Sequence[Record]) -> dict[str, float | None]:
    """The figures of the specification's ids, of the answers behind the referee."""
    counts = Counts.of(record.grade for record in after)
    forced, gated = [r.grade for r in before], [r.grade for r in after]
    return {"HR": hallucination_rate(counts), "RET": retention(forced, gated), "OI": omniscience_index(counts)}


def _compared(before: Sequence[Record], after: Sequence[Record], holds: Callable[[Record], bool]) -> dict[str, Any]:
    """Two shares of the same questions, and McNemar's exact p."""
    found = compare_right({r.item_id: holds(r) for r in before}, {r.item_id: holds(r) for r in after})
    if found is None:
        return {"difference": None, "p": None}
    return {"difference": found.difference, "p": found.p}


def _difference(
    before: Sequence[Record], after: Sequence[Record], of: Callable[[Record], float]
) -> dict[str, float] | None:
    """The mean difference a question, with its bootstrap interval."""
    return _interval(
        paired_bootstrap({r.item_id: of(r) for r in before}, {r.item_id: of(r) for r in after}, seed=BOOTSTRAP_SEED)
    )


def _kind(pairs: Sequence[tuple[Record, Record]], kind: str) -> dict[str, Any]:
    mine = [(b, a) for b, a in pairs if b.stratum["kind"] == kind]
    wrong = [sum(pair[arm].grade == "I" for pair in mine) for arm in (0, 1)]
    right = [sum(pair[arm].score >= 1 for pair in mine) for arm in (0, 1)]
    return {"n": len(mine), "wrong": wrong, "right": right}


def _tokens(record: Record) -> tuple[int, int]:
    usage = record.usage
    return usage.prompt + usage.referee_prompt, usage.completion + usage.referee_completion


def _named(record: Record, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in record.signals or () if name.startswith(prefix)]


def _undecided(bare: Sequence[Record], after: Sequence[Record]) -> dict[str, int]:
    reasons = [(b.error or a.error or "")[:120] for b, a in zip(bare, after, strict=True) if "X" in (b.grade, a.grade)]
    return dict(Counter(reasons).most_common())


def _notes(rate: float, decided: int, price: PriceVector) -> list[str]:
    notes = []
    if rate > MOST_UNDECIDED:
        notes.append(f"Not valid: {rate:.1%} of the questions could not be decided in both arms, more than 0.5 %.")
    if 0 < decided < 100:
        notes.append(f"{decided} questions are few: look at the intervals before the figures.")
    if price == PriceVector():
        notes.append("No cost: give --price HIT,MISS,OUTPUT for a million tokens.")
    return notes


def _interval(found: Interval | None) -> dict[str, float] | None:
    return None if found is None else asdict(found)


def _cell(found: Interval | None) -> dict[str, float]:
    return {} if found is None else asdict(found)


def _quantile(values: Sequence[float], q: float) -> float | None:
    return float(np.quantile(values, q)) if values else None
