"""The referee: checks an answer, acts by the rules, asks again within the budget, and explains what it did."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rorqual.errors import RequestError
from rorqual.referee.answer import Answer, Asked
from rorqual.referee.budget import RepairRates, Spending, add_usage
from rorqual.referee.check import Checked, check_beside
from rorqual.referee.check_claims import Memory, check_claims
from rorqual.referee.check_code import CodeRunner, check_code
from rorqual.referee.check_format import INTERRUPTED
from rorqual.referee.decide import Action, Situation, decide
from rorqual.referee.hooks import Confidence, Retriever, request_fields
from rorqual.referee.judge import Ask, Judge
from rorqual.referee.mend import ask_for_sentences, with_sentences, without_claims
from rorqual.referee.policy import Evidence, Options
from rorqual.referee.reask import ask_again
from rorqual.referee.reasons import Finding, failed
from rorqual.referee.retrieval import is_supported
from rorqual.referee.verdict import Verdict, Word


@dataclass
class _Candidate:
    checked: Checked
    p: float | None
    usage: tuple[int, int]

    @property
    def rank(self) -> tuple[int, float, int]:
        """Rule 11's order: fewer faults, likelier, shorter."""
        return -len(self.checked.standing), -1.0 if self.p is None else self.p, -self.usage[1]


@dataclass
class _Case:
    """One request on its way through the rules."""

    asked: Asked
    options: Options
    ask: Ask
    spending: Spending
    actions: list[dict[str, Any]] = field(default_factory=list)
    candidates: list[_Candidate] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    copy_misses: int = 0
    evidence: Sequence[Evidence] = ()
    has_retrieved: bool = False
    next_model: int = 0
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    extra: list[Finding] = field(default_factory=list)
    rounds: list[dict[str, list[str]]] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    was_mended: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    """What is added to requests for the sake of the estimate."""


class Referee:
    """confidence, retriever: hooks of rule 9. fallbacks: models asked when the request's own fails or stays wrong.

    constrain: ask for `strict` calls when asking again. rates: how often asking again helps, shared by all requests.
    judge: judges claims; without it the model of the request does, through the same upstream. code: runs code; without
    it none is run.
    """

    def __init__(
        self,
        *,
        confidence: Confidence | None = None,
        retriever: Retriever | None = None,
        fallbacks: Sequence[str] = (),
        constrain: bool = True,
        rates: RepairRates | None = None,
        judge: Judge | None = None,
        code: CodeRunner | None = None,
    ) -> None:
        self._confidence, self._retriever = confidence, retriever
        self._fallbacks, self._constrain = tuple(fallbacks), constrain
        self.rates = rates or RepairRates()
        self._judge, self._code = judge, code

    async def look(self, asked: Asked, answer: Answer, options: Options) -> Verdict:
        """What the checks find in an answer that goes out as it is (mode observe). No model is called, no code run."""
        checked = await check_beside(asked, answer, options)
        case = _Case(asked, options, _nobody, Spending(options.budget), usage=_plain_usage(answer))
        word: Word = "flagged" if checked.standing or checked.is_repaired else "pass"
        return self._verdict(case, _Candidate(checked, None, (0, 0)), word, answer)

    async def judge(self, asked: Asked, options: Options, ask: Ask, *, sent: Callable[[], str] = lambda: "") -> Verdict:
        """Ask, check, and act until the rules end it.

        sent: called when the first answer is whole: the text of it that the client already has, which cannot be taken
        back. Raises: RequestError when the upstream refuses the request, or has failed for good (rule 1).
        """
        case = _Case(asked, options, ask, Spending(options.budget))
        if "abstain" in options.checks:
            wanted = request_fields(self._confidence)
            case.fields = {name: value for name, value in wanted.items() if name not in asked.body}
        first = await self._first(case)
        return await self._conclude(case, first, sent())

    async def judge_answer(self, asked: Asked, answer: Answer, options: Options, ask: Ask | None = None) -> Verdict:
        """As `judge` for an answer that is already there. ask: None where no model can be asked."""
        if ask is None:
            options = replace(options, budget=options.budget.model_copy(update={"max_rounds": 0}))
        case = _Case(asked, options, ask or _nobody, Spending(options.budget))
        return await self._conclude(case, answer, "")

    async def _conclude(self, case: _Case, answer: Answer, sent: str) -> Verdict:
        """The rules from the first answer on."""
        case.usage = _plain_usage(answer)
        first_usage = _tokens(case.asked, answer)
        case.spending.begin(first_usage)
        usage, findings_before = first_usage, tuple[str, ...]()
        while True:
            candidate = await self._candidate(case, answer, usage, sent)
            case.candidates.append(candidate)
            if findings_before:
                self.rates.note(findings_before, candidate.checked.standing)
                case.rounds.append({"codes": list(findings_before), "left": list(candidate.checked.standing)})
            action = decide(self._situation(case, candidate, sent))
            if action.kind not in ("RE-ASK", "RETRIEVE"):
                case.actions.append(action.to_dict())
                return self._end(case, candidate, action, sent)
            again = await self._again(case, candidate, action, first_usage)
            if again is None:  # the budget or the upstream ended it in the middle
                bound = decide(replace(self._situation(case, candidate, sent), bound="the round failed"))
                case.actions.append(bound.to_dict())
                return self._end(case, candidate, bound, sent)
            answer, usage = again
            findings_before = candidate.checked.standing

    async def _candidate(self, case: _Case, answer: Answer, usage: tuple[int, int], sent: str) -> _Candidate:
        if sent and len(case.candidates):
            answer = replace(answer, content=sent)  # what the client has stays; only the calls are new
        checked = await self._checked(case, answer)
        p = None
        wants = "abstain" in case.options.checks and self._confidence is not None
        if wants and not checked.standing and not checked.answer.calls:
            assert self._confidence is not None
            p = await self._confidence.estimate(case.asked, checked.answer)
            if case.evidence and p is not None and p <= case.options.policy.profile.threshold:
                p = await self._of_supported(case, checked.answer, p)
        for one in checked.findings:
            if one.status == "repaired":
                case.actions.append({"rule": 3, "action": "REPAIR", "codes": [one.code], "because": one.says})
        return _Candidate(checked, p, usage)

    async def _checked(self, case: _Case, answer: Answer) -> Checked:
        """All checks; code is run and claims are judged only where nothing else is wrong."""
        asked, options = case.asked, case.options
        judge = self._judge_of(case) if "claims" in options.checks else None
        alone = options if judge is None else replace(options, checks=_without(options.checks, "claims"))
        checked = await check_beside(asked, answer, alone)
        if "code" in options.checks and self._code is not None and not checked.standing:
            began = time.perf_counter()
            found = await asyncio.to_thread(check_code, asked, checked.answer, options.tests, self._code)
            checked = checked.with_findings("code", found, began)
        if judge is not None and not checked.standing:
            began, tally = time.perf_counter(), case.memory.tally
            read = tally.prompt_tokens, tally.completion_tokens
            found = await check_claims(
                asked, checked.answer, options, judge, case.memory, more=case.evidence,
                may_ask=case.spending.allows_judging,
            )  # fmt: skip
            case.spending.judged(tally.prompt_tokens - read[0], tally.completion_tokens - read[1])
            checked = checked.with_findings("claims", found, began)
        return checked

    async def _of_supported(self, case: _Case, answer: Answer, p: float) -> float | None:
        """None, which withholds nothing, where what was retrieved supports the answer; else the estimate."""
        tally = case.memory.tally
        before = tally.prompt_tokens, tally.completion_tokens
        judge = self._judge_of(case) if case.spending.allows_judging() else None
        try:
            votes = case.options.policy.profile.votes
            is_fine = await is_supported(case.asked, answer, case.evidence, judge, tally, votes=votes)
        except RequestError:
            is_fine = False
        case.spending.judged(tally.prompt_tokens - before[0], tally.completion_tokens - before[1])
        if not is_fine:
            return p
        ids = ", ".join(one.id for one in case.evidence)
        case.actions.append({"rule": 9, "action": "SUPPORTED", "because": f"p = {p:.3f}, and {ids[:200]} says it"})
        return None

    def _judge_of(self, case: _Case) -> Judge | None:
        """The judge of claims: the one that was given, or the model itself; None where nobody can be asked."""
        if self._judge is not None:
            return self._judge
        if case.ask is _nobody:
            return None
        streams = {"stream": True} if case.asked.body.get("stream") else {}
        return Judge(case.ask, str(case.asked.body.get("model")), streams)

    def _situation(self, case: _Case, candidate: _Candidate, sent: str) -> Situation:
        profile, checked = case.options.policy.profile, candidate.checked
        bound = case.spending.allows()
        if bound is None and checked.answer.same in case.seen:
            bound = "the same answer again"
        standing = checked.standing
        if bound is None and standing:
            rate = max(self.rates.rate(code) for code in standing)
            expected = candidate.usage[1] + 40 * len(standing)
            if not case.spending.is_worth(rate, profile.loss_ratio, expected):
                bound = "not worth its cost"
        if bound is None and sent and any(one.rejects and one.call is None for one in checked.findings):
            bound = "its text was already sent"
        return Situation(
            case.options.mode,
            checked.findings,
            case.copy_misses,
            bound,
            candidate.p,
            profile.threshold,
            self._retriever is not None and not case.has_retrieved,
            case.was_mended,
        )

    async def _first(self, case: _Case) -> Answer:
        """Rule 1: once more after a failure, then the fall-back models."""
        body = dict(case.asked.body)
        for attempt in range(2 + len(self._fallbacks)):
            if attempt >= 2:
                body["model"] = self._fallbacks[attempt - 2]
                case.next_model = attempt - 1
            try:
                answer = await _with_fields(case, body)
                if answer.finish not in INTERRUPTED:
                    if attempt:
                        case.extra.append(Finding("upstream_failed", "the upstream had failed before", "repaired"))
                    return answer
                error = RequestError(
                    f"The upstream cut its answer short ({answer.finish}).", status=502, type="upstream_error"
                )
            except RequestError as refusal:
                if refusal.status < 500 and refusal.status not in (408, 429):
                    raise
                error = refusal
            case.actions.append({"rule": 1, "action": "RETRY", "codes": ["upstream_failed"], "because": error.message})
            if error.status == 429:
                break  # its own bound; asking at once makes it worse
        raise error

    async def _again(
        self, case: _Case, candidate: _Candidate, action: Action, first: tuple[int, int]
    ) -> tuple[Answer, tuple[int, int]] | None:
        """One more round; None when it came to nothing."""
        checked = candidate.checked
        case.seen.add(checked.answer.same)
        if action.kind == "RETRIEVE" and self._retriever is not None:
            case.has_retrieved = True
            case.evidence = await self._retriever.retrieve(case.asked, checked.answer)
            if not case.evidence:
                case.actions.append({**action.to_dict(), "because": "nothing was found"})
                return None
        if action.rule == 5:
            case.copy_misses += 1
        if action.rule == 7:
            return await self._mended(case, candidate, action, first)
        model = None
        if case.spending.rounds >= 1 and case.next_model < len(self._fallbacks):
            model = self._fallbacks[case.next_model]  # the model had its second chance
            case.next_model += 1
        thinks = any("reasoning_content" in one for one in case.asked.messages) or bool(checked.answer.reasoning)
        made = ask_again(
            case.asked, checked.answer, checked.findings, model=model, constrain=self._constrain,
            evidence=case.evidence, thinks=thinks,
        )  # fmt: skip
        case.actions.append(action.to_dict() | ({"model": model} if model else {}))
        answer = await self._ask_within(case, made)
        if answer is None:
            case.spending.rounds += 1
            return None
        usage = _tokens(case.asked, answer)
        case.spending.spend(usage, first[0])
        case.usage = add_usage(case.usage, answer.usage)
        return answer, usage

    async def _mended(
        self, case: _Case, candidate: _Candidate, action: Action, first: tuple[int, int]
    ) -> tuple[Answer, tuple[int, int]] | None:
        """The answer with other sentences in place of those at fault; None when none came."""
        case.was_mended = True
        checked = candidate.checked
        body = ask_for_sentences(case.asked, checked.answer, checked.findings, case.options.evidence, case.evidence)
        case.actions.append(action.to_dict())
        reply = await self._ask_within(case, body)
        if reply is None:
            case.spending.rounds += 1
            return None
        usage = _tokens(case.asked, reply)
        case.spending.spend(usage, 0)
        case.usage = add_usage(case.usage, reply.usage)
        answer = with_sentences(checked.answer, checked.findings, reply)
        return None if answer is None else (answer, usage)

    async def _ask_within(self, case: _Case, body: dict[str, Any]) -> Answer | None:
        """The answer to a round; None when time ran out or the upstream did not give one."""
        plain = body if "tools" not in body else {**body, "tools": case.asked.body["tools"]}
        for trial in (body, plain):
            try:
                async with asyncio.timeout(max(0.0, case.spending.left_s)):
                    return await _with_fields(case, trial)
            except TimeoutError:
                return None
            except RequestError as error:
                # `strict` is not taken everywhere; whatever else fails ends the round
                if error.status not in (400, 422) or body == plain:
                    return None
        return None

    def _end(self, case: _Case, candidate: _Candidate, action: Action, sent: str) -> Verdict:
        checked, mode = candidate.checked, case.options.mode
        if action.kind == "PASS":
            changed = checked.is_repaired or len(case.candidates) > 1
            return self._verdict(case, candidate, "repaired" if changed else "pass", checked.answer)
        if action.kind == "BLOCK":
            return self._verdict(case, candidate, "blocked", _blocked(checked, sent))
        if action.kind == "REJECT-DONE" and mode == "enforce":
            text = "This is not accepted as done. " + _list(checked.findings)
            return self._verdict(case, candidate, "blocked", replace(checked.answer, content=text, raw={}, deltas=()))
        if action.kind == "REMOVE":
            left = without_claims(checked.answer, checked.findings)
            if left is None:
                return self._verdict(case, candidate, "abstained", _abstention(checked, case.asked))
            return self._verdict(case, candidate, "repaired", left)
        if action.kind == "ABSTAIN" and mode == "enforce":
            return self._verdict(case, candidate, "abstained", _abstention(checked, case.asked))
        if action.kind == "ERROR":
            return self._verdict(case, candidate, "rejected", None)
        best = max(case.candidates, key=lambda one: one.rank)
        if action.kind == "ABSTAIN":  # annotate tells, and withholds nothing
            best = candidate
            low = failed("low_confidence", f"p = {candidate.p}, not above the profile's threshold")
            case.extra += [low] if candidate.p is not None else []
        return self._verdict(case, best, "flagged", best.checked.answer)

    def _verdict(self, case: _Case, candidate: _Candidate, word: Word, answer: Answer | None) -> Verdict:
        costs = dict(candidate.checked.costs_ms)
        if answer is not None and "logprobs" in case.fields:
            answer = replace(answer, logprobs=None)  # the client did not ask for them
        ran = list(costs)
        if "abstain" in case.options.checks and candidate.p is not None:
            ran.append("abstain")
        return Verdict(
            word,
            answer,
            (*case.extra, *candidate.checked.findings),
            ran,
            case.options.policy.id,
            candidate.p,
            case.spending.rounds,
            {"prompt_tokens": case.spending.prompt_tokens, "completion_tokens": case.spending.completion_tokens},
            case.usage,
            case.actions,
            costs,
            case.rounds,
            case.memory.tally.to_dict() if case.memory.tally.calls else None,
        )


def _without(checks: Sequence[str], name: str) -> tuple[str, ...]:
    return tuple(check for check in checks if check != name)


async def _with_fields(case: _Case, body: dict[str, Any]) -> Answer:
    """Ask with what the estimate needs, or without it where the upstream refuses that (and then there is none)."""
    if case.fields:
        try:
            return await case.ask({**body, **case.fields})
        except RequestError as error:
            if error.status not in (400, 422):
                raise
    return await case.ask(body)


async def _nobody(body: dict[str, Any]) -> Answer:
    raise RequestError("nobody can be asked here")


def _plain_usage(answer: Answer) -> dict[str, Any] | None:
    return None if answer.usage is None else dict(answer.usage)


def _tokens(asked: Asked, answer: Answer) -> tuple[int, int]:
    """Prompt and completion tokens, as told, or about a token for every four characters."""
    usage = answer.usage or {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    written = (
        len(answer.content or "") + len(answer.reasoning or "") + sum(len(call.arguments) for call in answer.calls)
    )
    return (
        prompt if isinstance(prompt, int) else len(asked.context) // 4,
        completion if isinstance(completion, int) else written // 4,
    )


def _blocked(checked: Checked, sent: str) -> Answer:
    """The answer without the calls at fault, and why, for the agent to read."""
    bad = {one.call for one in checked.findings if one.rejects and one.call is not None}
    left = [call for index, call in enumerate(checked.answer.calls) if index not in bad]
    says = "A tool call was blocked and has not been made. " + _list(checked.findings)
    content = "\n\n".join(filter(None, [sent or checked.answer.content, says]))
    finish = "tool_calls" if left else "stop"
    return replace(checked.answer, content=content, calls=tuple(left), finish=finish)


def _list(findings: Sequence[Finding]) -> str:
    return " ".join(f"{one.says}." for one in findings if one.rejects)


def _abstention(checked: Checked, asked: Asked) -> Answer:
    """Says what is missing and what to do next; never a guess."""
    faults = [one for one in checked.findings if one.rejects]
    missing = (
        f"What I had worked out did not hold ({len(faults)} of its statements failed a check)."
        if faults
        else "I do not know this surely enough: nothing in what I was given supports an answer."
    )
    text = f"{missing} Send a source that answers it, or ask for one part of it at a time."
    # nothing of the answer goes out with it, sound or annotations neither
    return replace(checked.answer, content=text, calls=(), finish="stop", logprobs=None, raw={}, deltas=())
