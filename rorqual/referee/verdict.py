"""What the referee says of one request: the answer that goes out, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rorqual.errors import RequestError
from rorqual.referee.answer import Answer
from rorqual.referee.reasons import Finding

Word = Literal["pass", "repaired", "flagged", "blocked", "abstained", "rejected"]
"""`pass`: as the model gave it. `repaired`: after a repair, or after the model was asked again. `flagged`: it goes out
with faults (observe, annotate). `blocked`: calls were taken out, or "done" was not accepted. `abstained`: no answer is
given. `rejected`: an error is."""


@dataclass(frozen=True)
class Verdict:
    """answer: what goes out; None when nothing but the error does. usage: of all upstream calls of the request."""

    word: Word
    answer: Answer | None
    findings: Sequence[Finding]
    ran: Sequence[str]
    policy_id: str
    p: float | None = None
    rounds: int = 0
    spent: Mapping[str, int] = field(default_factory=dict)
    usage: Mapping[str, Any] | None = None
    actions: Sequence[Mapping[str, Any]] = ()
    costs_ms: Mapping[str, float] = field(default_factory=dict)
    rounds_asked: Sequence[Mapping[str, Sequence[str]]] = ()
    """Of each round, why it was asked and what was left: what `RepairRates` learns from."""
    judging: Mapping[str, int] | None = None
    """Of the judge of claims: calls, claims, negative and dropped verdicts, tokens; None where it was not asked."""

    @property
    def tokens(self) -> int:
        """Of rounds beyond the first answer."""
        return sum(self.spent.values())

    def to_dict(self) -> dict[str, Any]:
        """The `referee` extension of a response."""
        checks: list[dict[str, Any]] = []
        for name in dict.fromkeys([*self.ran, *(one.check for one in self.findings)]):
            found = [one for one in self.findings if one.check == name]
            cost = {"ms": round(self.costs_ms.get(name, 0.0), 3), "tokens": 0}
            if name == "claims" and self.judging is not None:
                cost["tokens"] = self.judging["prompt_tokens"] + self.judging["completion_tokens"]
            checks += [_row(one, cost) for one in found]
            if not found:
                checks.append(_blank(name, cost))
        told: dict[str, Any] = {} if self.judging is None else {"judging": dict(self.judging)}
        return {
            "verdict": self.word,
            "p_correct": self.p,
            "checks": checks,
            "rounds": self.rounds,
            "usage": dict(self.spent),
            "actions": [dict(action) for action in self.actions],
            "policy_id": self.policy_id,
            **told,
        }

    def headers(self) -> dict[str, str]:
        return {
            "x-referee-verdict": self.word,
            "x-referee-rounds": str(self.rounds),
            "x-referee-tokens": str(self.tokens),
        }

    def error(self) -> RequestError:
        """The refusal of an answer that stayed broken: what was wrong with it, in words."""
        faults = [one for one in self.findings if one.rejects]
        says = "; ".join(one.says for one in faults[:8]) or "no check passed"
        asked = f" after {self.rounds} further attempts" if self.rounds else ""
        return RequestError(
            f"The referee did not let the model's answer pass{asked}: {says}. Send the request again, loosen the "
            "schema, or use mode annotate to have it all the same.",
            status=422,
            type="referee_rejected",
            code=faults[0].code if faults else "referee_rejected",
        )


def _row(found: Finding, cost: Mapping[str, float]) -> dict[str, Any]:
    row = _blank(found.check, cost)
    row |= {"status": found.status, "reason_code": found.code, "says": found.says}
    row["evidence_ids"] = list(found.evidence_ids)
    row["span"] = None if found.span is None else list(found.span)
    for key, value in (("call", found.call), ("path", found.path), ("candidate", found.candidate)):
        if value is not None:
            row[key] = value
    return row


def _blank(name: str, cost: Mapping[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "status": "pass",
        "reason_code": None,
        "span": None,
        "evidence_ids": [],
        "cost": dict(cost),
    }
