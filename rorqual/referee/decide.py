"""The decision rules, top to bottom; the first that matches acts. Source: the specification, 8.5.

Pure: a situation in, an action out. Rule 1 (transport) and rule 3 (local repair) are carried out before this is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rorqual.referee.policy import Mode
from rorqual.referee.reasons import Finding

Kind = Literal["PASS", "BLOCK", "RE-ASK", "RETRIEVE", "ABSTAIN", "REJECT-DONE", "REMOVE", "BEST", "ERROR"]


@dataclass(frozen=True)
class Situation:
    """What is known when a candidate was checked.

    copy_misses: how many candidates before this one missed a copy. bound: why no further round may be asked, None while
    one may. p: probability that it is right, None when nobody estimated it. can_retrieve: there is a retriever, and it
    was not asked yet. threshold: of the profile. was_mended: sentences were asked for again already.
    """

    mode: Mode
    findings: Sequence[Finding]
    copy_misses: int = 0
    bound: str | None = None
    p: float | None = None
    threshold: float = 0.5
    can_retrieve: bool = False
    was_mended: bool = False


@dataclass(frozen=True)
class Action:
    """rule: its number in the table. codes: the reasons it acts on."""

    rule: int
    kind: Kind
    codes: tuple[str, ...] = ()
    because: str = ""

    def to_dict(self) -> dict[str, object]:
        out: dict[str, object] = {"rule": self.rule, "action": self.kind}
        if self.codes:
            out["codes"] = list(self.codes)
        if self.because:
            out["because"] = self.because
        return out


def decide(now: Situation) -> Action:
    """What happens to the candidate."""
    standing = [one for one in now.findings if one.rejects]
    codes = tuple(dict.fromkeys(one.code for one in standing))
    if "check_failed" in codes:  # open in annotate, closed in enforce
        return Action(1, "ERROR" if now.mode == "enforce" else "BEST", ("check_failed",))
    if "side_effect_forbidden" in codes:
        return Action(2, "BLOCK", ("side_effect_forbidden",))
    copies = tuple(one for one in codes if one.startswith("copy_"))
    done = tuple(one for one in codes if one == "done_without_evidence")
    later = {*copies, *done, *_CODE, *_CLAIMS}
    others = tuple(one for one in codes if one not in later)
    if others:
        return Action(4, "RE-ASK", codes) if now.bound is None else _exhausted(now, codes)
    if copies:
        if now.copy_misses >= 1:
            return Action(5, "BLOCK", copies, "missed twice")
        if now.bound is None:
            return Action(5, "RE-ASK", copies)
        return Action(5, "BLOCK", copies, now.bound) if now.mode == "enforce" else _exhausted(now, copies)
    code = tuple(one for one in codes if one in _CODE)
    if code:
        return Action(6, "RE-ASK", code) if now.bound is None else _exhausted(now, code)
    if (claims := _about_claims(now, codes)) is not None:
        return claims
    if now.p is not None and now.p <= now.threshold:
        if now.can_retrieve and now.bound is None:
            return Action(9, "RETRIEVE", ("low_confidence",))
        return Action(9, "ABSTAIN", ("low_confidence",), f"p = {now.p:.3f}, not above {now.threshold:.3f}")
    if done:
        if now.bound is None:
            return Action(10, "RE-ASK", done)
        return Action(10, "REJECT-DONE", done, now.bound)
    return Action(12, "PASS")


_CODE = ("code_broken", "code_fails")
_CLAIMS = ("claim_contradicted", "claim_not_found")
_PROSE = {"arith_wrong", "sum_wrong", "quote_not_found", "source_unknown", "citation_missing", "judge_failed", *_CODE}


def _about_claims(now: Situation, codes: Sequence[str]) -> Action | None:
    """Rules 7 and 8; None where neither matches. Sentences are asked for again once, and then taken out."""
    standing = tuple(one for one in codes if one in _CLAIMS)
    if "claim_contradicted" in standing:
        if now.bound is None and not now.was_mended:
            return Action(7, "RE-ASK", standing)
        return _without(now, 7, standing)
    if any(one.code == "claim_not_found" for one in now.findings):
        if now.can_retrieve and now.bound is None:
            return Action(8, "RETRIEVE", ("claim_not_found",))
        if standing:
            return _without(now, 8, standing)
    return None


def _without(now: Situation, rule: int, codes: tuple[str, ...]) -> Action:
    """The sentences are taken out in enforce, and told in annotate."""
    because = now.bound or ("asked again once" if now.was_mended else "")
    return Action(rule, "REMOVE" if now.mode == "enforce" else "BEST", codes, because)


def _exhausted(now: Situation, codes: tuple[str, ...]) -> Action:
    """Rule 11: the best candidate in annotate; in enforce an abstention for prose, an error for anything else."""
    because = now.bound or ""
    if now.mode != "enforce":
        return Action(11, "BEST", codes, because)
    return Action(11, "ABSTAIN" if set(codes) <= _PROSE else "ERROR", codes, because)
