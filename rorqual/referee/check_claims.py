"""The claims of an answer against its sources: by their words, and by a judge's verdicts where words cannot tell.

Votes decide, two of three. Words that speak against a claim are one vote (another number in the same sentence is two);
the judge has one, and a second one, asked the other way round, where the first two differ. Two votes against a claim
confirm the fault; with one it is dropped, and counted. A careful profile asks the judge three times, and words have no
vote. Source: the specification, 8.3 to 8.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from rorqual import log
from rorqual.errors import RequestError
from rorqual.referee.answer import Answer, Asked
from rorqual.referee.claims import Claim, Reading, Support, read_claim, split_claims
from rorqual.referee.judge import CLAIMS_A_CALL, Judge, Opinion, Question, Tally, exists
from rorqual.referee.policy import Evidence, Options
from rorqual.referee.reasons import Finding, failed
from rorqual.referee.sources import Sentence, SourceIndex, sources_of, words_of

SENTENCES_SHOWN: Final = 3
logger = log.get(__name__)


@dataclass
class Memory:
    """What was found of claims of one request, so that a sentence that stayed is not judged twice."""

    verdicts: dict[tuple[str, tuple[str, ...]], tuple[Support, str]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class Sheet:
    """The claims of an answer with what the words say of each. is_required: there are sources to be found in."""

    question: str
    claims: Sequence[Claim]
    readings: Sequence[Reading]
    index: SourceIndex
    is_required: bool

    def shown(self, place: int) -> list[Sentence]:
        """The sentences that claim could rest on: of the sources it cites, and of any."""
        claim = self.claims[place]
        words = words_of(claim.said)
        within = [one for one in claim.cited if one in self.index.sources]
        found = self.index.nearest(words, within, SENTENCES_SHOWN) if within else []
        return list(dict.fromkeys([*found, *self.index.nearest(words, None, SENTENCES_SHOWN)]))


def read_claims(asked: Asked, answer: Answer, evidence: Sequence[Evidence], more: Sequence[Evidence] = ()) -> Sheet:
    """The claims of the content; none for calls and JSON, and where there is no source to hold them to."""
    sources = sources_of(asked, evidence, more)
    question = asked.question
    if answer.calls or asked.schema[0] or not answer.content or not sources:
        return Sheet(question, (), (), SourceIndex(()), False)
    index = SourceIndex(sources)
    claims = split_claims(answer.content)
    known = frozenset(words_of(question.rpartition("\n\n")[2][-2000:]))
    return Sheet(question, claims, [read_claim(one, index, known) for one in claims], index, True)


def check_claims_alone(asked: Asked, answer: Answer, evidence: Sequence[Evidence]) -> list[Finding]:
    """What the words alone say; no model is asked. Another number is a contradiction, the rest a suspicion."""
    sheet = read_claims(asked, answer, evidence)
    found = []
    for claim, reading in zip(sheet.claims, sheet.readings, strict=True):
        if reading.support == "contradicted":
            found.append(_finding(claim, "contradicted", _quoted(reading.best), sheet.index, "mark"))
        elif reading.is_suspected:
            found.append(_suspected(claim, reading))
    return found


async def check_claims(
    asked: Asked,
    answer: Answer,
    options: Options,
    judge: Judge,
    memory: Memory,
    *,
    more: Sequence[Evidence] = (),
    may_ask: Callable[[], bool] = lambda: True,
) -> list[Finding]:
    """What is confirmed against the claims. may_ask: whether the budget still has room for a call of the judge."""
    sheet = read_claims(asked, answer, options.evidence, more)
    profile = options.policy.profile
    keys = [(claim.said, claim.cited) for claim in sheet.claims]
    todo = [place for place, one in enumerate(sheet.readings) if one.support != "supported"]
    todo = [place for place in todo if more or keys[place] not in memory.verdicts]
    failure, skipped = "", 0
    for at in range(0, len(todo), CLAIMS_A_CALL):
        batch = todo[at : at + CLAIMS_A_CALL]
        if not may_ask():
            skipped += len(batch)
            continue
        panel = _Panel(sheet, batch, judge, memory.tally, profile.votes, may_ask)
        try:
            for place, verdict in (await panel.decide()).items():
                memory.verdicts[keys[place]] = verdict
        except RequestError as error:
            logger.warning("the judge could not be asked: %s", error)
            failure = error.message
            break
    found = []
    for claim, reading, key in zip(sheet.claims, sheet.readings, keys, strict=True):
        if key not in memory.verdicts and reading.support != "supported":
            found += [_suspected(claim, reading)] if reading.is_suspected else []
            continue
        support, span = memory.verdicts.get(key, ("supported", ""))
        if support != "supported":
            found.append(_finding(claim, support, span, sheet.index, profile.claims))
    if failure or skipped:
        why = f"the judge could not be asked ({failure[:200]})" if failure else "the budget had no room for it"
        hard = profile.claims == "remove" and bool(failure)
        found.append(Finding("judge_failed", f"claims were not judged: {why}", "fail" if hard else "warn", hard=hard))
    return found


@dataclass
class _Panel:
    """Up to five claims before the judge, until each has its votes."""

    sheet: Sheet
    places: Sequence[int]
    judge: Judge
    tally: Tally
    votes: int
    may_ask: Callable[[], bool]

    async def decide(self) -> Mapping[int, tuple[Support, str]]:
        """Each claim's verdict with the words named against it; none of a claim that the judge said nothing of."""
        heard = {place: list[Opinion]() for place in self.places}
        await self._ask(heard, list(self.places), 0)
        turns = (1,) if self.votes == 1 else range(1, self.votes)
        for turn in turns:
            open_ones = [place for place in self.places if self._is_open(place, heard[place])]
            if open_ones and self.may_ask():
                await self._ask(heard, open_ones, turn)
        told = [place for place in self.places if heard[place] or self._own(place) >= 2]
        return {place: self._verdict(place, heard[place]) for place in told}

    async def _ask(self, heard: Mapping[int, list[Opinion]], places: Sequence[int], turn: int) -> None:
        questions = [Question(self.sheet.claims[place], self.sheet.shown(place)) for place in places]
        opinions = await self.judge.opinions(self.sheet.question, questions, self.tally, turn=turn)
        shown = [one for question in questions for one in question.sentences]
        for place, question, opinion in zip(places, questions, opinions, strict=True):
            if opinion is None:
                continue
            if opinion.support != "supported":
                self.tally.negative += 1
                if not exists(opinion, question.claim, shown):
                    self.tally.dropped += 1
                    opinion = Opinion("supported")
            heard[place].append(opinion)

    def _own(self, place: int) -> int:
        """Votes of the words."""
        reading = self.sheet.readings[place]
        if reading.support == "contradicted":
            return 2
        return int(reading.is_suspected) if self.votes == 1 else 0

    def _against(self, place: int, opinions: Sequence[Opinion]) -> int:
        return self._own(place) + sum(one.support != "supported" for one in opinions)

    def _is_open(self, place: int, opinions: Sequence[Opinion]) -> bool:
        """Whether one more vote could change the outcome: two of three decide."""
        against = self._against(place, opinions)
        cast = len(opinions) + (1 if self.votes == 1 else 0)
        return against < 2 and cast - against < 2

    def _verdict(self, place: int, opinions: Sequence[Opinion]) -> tuple[Support, str]:
        against = [one for one in opinions if one.support != "supported"]
        if self._against(place, opinions) < 2:
            self.tally.dropped += len(against)
            return "supported", ""
        reading = self.sheet.readings[place]
        if reading.support == "contradicted":
            return "contradicted", _quoted(reading.best)
        # the weaker of two negative verdicts: only what nobody doubts is called a contradiction
        weaker = next((one for one in against if one.support == "not found"), None)
        chosen = weaker or against[0]
        return chosen.support, chosen.span


def _finding(
    claim: Claim, support: Support, span: str, index: SourceIndex, missing: Literal["mark", "remove"]
) -> Finding:
    ids = tuple(one for one in claim.cited if one in index.sources)
    if support == "contradicted":
        says = f"{claim.said[:200]!r} is contradicted by the sources" + (f": {span[:200]!r}" if span else "")
        return failed("claim_contradicted", says, span=claim.span, candidate=span or None, evidence_ids=ids)
    says = f"the sources do not say {claim.said[:200]!r}"
    hard = missing == "remove"
    return Finding(
        "claim_not_found", says, "fail" if hard else "warn", span=claim.span, evidence_ids=ids, hard=hard
    )  # fmt: skip


def _suspected(claim: Claim, reading: Reading) -> Finding:
    says = f"nothing in the sources has {_listed(reading)} of {claim.said[:200]!r}; no judge has looked at it"
    return failed("claim_suspected", says, span=claim.span)


def _quoted(sentence: Sentence | None) -> str:
    return "" if sentence is None else sentence.text[:300]


def _listed(reading: Reading) -> str:
    return ", ".join(f"`{word}`" for word in reading.missing[:5]) or "a word"
