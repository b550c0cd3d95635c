"""All deterministic checks over one answer, in the order in which they may change it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rorqual import log
from rorqual.referee.answer import Answer, Asked
from rorqual.referee.check_arith import check_arith
from rorqual.referee.check_claims import check_claims_alone
from rorqual.referee.check_content import check_citations, check_schema
from rorqual.referee.check_copy import check_copy
from rorqual.referee.check_done import check_done
from rorqual.referee.check_format import check_format
from rorqual.referee.check_tools import check_tools
from rorqual.referee.policy import Options
from rorqual.referee.reasons import Finding, failed

logger = log.get(__name__)


@dataclass(frozen=True)
class Checked:
    """An answer with what could be repaired. costs_ms: of each check that ran, in their order."""

    answer: Answer
    findings: Sequence[Finding]
    costs_ms: dict[str, float]

    @property
    def standing(self) -> tuple[str, ...]:
        """Codes of the faults that reject it."""
        return tuple(dict.fromkeys(one.code for one in self.findings if one.rejects))

    def with_findings(self, check: str, found: Sequence[Finding], began: float) -> Checked:
        """The same with those of one more check, which began at that time of `perf_counter`."""
        costs = {**self.costs_ms, check: 1000 * (time.perf_counter() - began)}
        return Checked(self.answer, (*self.findings, *found), costs)

    @property
    def is_repaired(self) -> bool:
        return any(one.status == "repaired" for one in self.findings)


BIG: Final = 32_768
"""Characters of a conversation and an answer from which on checks get a thread of their own."""


async def check_beside(asked: Asked, answer: Answer, options: Options) -> Checked:
    """As `check_answer`; where there is much to read in a thread, so that other requests go on meanwhile."""
    written = len(answer.content or "") + sum(len(call.arguments) for call in answer.calls)
    if asked.num_characters + written < BIG:
        return check_answer(asked, answer, options)
    return await asyncio.to_thread(check_answer, asked, answer, options)


def check_answer(asked: Asked, answer: Answer, options: Options) -> Checked:
    """Run the checks the options ask for. No model is called and nothing is executed.

    A check that raises is our mistake: it is logged, and `check_failed` stands among the findings (rule 1).
    """
    try:
        return _check(asked, answer, options)
    except Exception as error:
        logger.exception("a check failed")
        says = f"the referee failed to check this answer ({type(error).__name__}); its log has the trace"
        return Checked(answer, (failed("check_failed", says),), {})


def _check(asked: Asked, answer: Answer, options: Options) -> Checked:
    findings: list[Finding] = []
    costs: dict[str, float] = {}
    policy = options.policy
    for name in ("format", "tool", "schema", "copy", "arith", "citations", "claims", "done"):
        if name not in options.checks:
            continue
        began = time.perf_counter()
        found: list[Finding]
        if name == "format":
            answer, found = check_format(asked, answer)
        elif name == "tool":
            answer, found = check_tools(asked, answer, policy)
        elif name == "schema":
            answer, found = check_schema(asked, answer)
        elif name == "copy":
            found = check_copy(asked, answer, policy)
        elif name == "arith":
            found = check_arith(asked, answer)
        elif name == "citations":
            found = check_citations(asked, answer, options.evidence, policy)
        elif name == "claims":
            found = check_claims_alone(asked, answer, options.evidence)
        else:
            found = check_done(asked, answer)
        findings += found
        costs[name] = 1000 * (time.perf_counter() - began)
    return Checked(answer, tuple(findings), costs)
