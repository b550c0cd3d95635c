"""Asking a model whether claims are supported by sources, blind and confirmed.

The judge sees the question, the claims and the sentences they could rest on; not who wrote them, not the reasoning, the
citations or the quotations. One line a claim comes back: `2 contradicted "words of the source"`. The second opinion is
asked with sources, claims and the names of the verdicts in the opposite order and another seed, so that what hangs on
an order does not repeat itself. A negative verdict counts only when the span it names exists. Source: the
specification, 8.4.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rorqual.referee.answer import Answer
from rorqual.referee.claims import Claim, Support
from rorqual.referee.sources import Sentence

Ask = Callable[[dict[str, Any]], Awaitable[Answer]]
CLAIMS_A_CALL: Final = 5
_VERDICTS: Final[tuple[Support, ...]] = ("supported", "contradicted", "not found")
_MEANS: Final[Mapping[Support, str]] = {
    "supported": "the sources say it, in whatever words",
    "contradicted": "the sources say something that cannot be true together with it",
    "not found": "the sources do not say it",
}
_RULES = (
    "You check claims against sources. Go by the sources alone, not by what you know.\n"
    "Write one line for each claim and nothing else: its number and one verdict.\n{verdicts}\n"
    "After contradicted, quote the words of the source that contradict it; after not found, quote the words of the "
    'claim that the sources do not have. For example: 1 {example} "words"'
)
_LINE = re.compile(r"(?im)^\W{0,4}(\d{1,3})\W{1,8}(supported|contradicted|not[ _-]found)\b[^\n\"“]{0,40}(.*)$")
_SPAN = re.compile(r'"([^"\n]+)"?|“([^”\n]+)”?')
_MOST_CHARACTERS = 8000


@dataclass(frozen=True)
class Opinion:
    """One verdict on one claim. span: the words it names."""

    support: Support
    span: str = ""


@dataclass
class Tally:
    """What judging took. dropped: negative verdicts that nothing confirmed. unread: claims without a verdict."""

    calls: int = 0
    claims: int = 0
    negative: int = 0
    dropped: int = 0
    unread: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


@dataclass(frozen=True)
class Question:
    """A claim with the sentences it could rest on."""

    claim: Claim
    sentences: Sequence[Sentence]


@dataclass(frozen=True)
class Judge:
    """A model that is asked. ask: sends a chat request and reads the answer. fields: for every request of it."""

    ask: Ask
    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    async def opinions(
        self, asked: str, questions: Sequence[Question], tally: Tally, *, turn: int = 0
    ) -> list[Opinion | None]:
        """A verdict each, None where the judge gave none that can be read. turn: odd ones see everything reversed.

        At most `CLAIMS_A_CALL` questions. Raises: RequestError when the judge cannot be asked.
        """
        order = list(range(len(questions)))
        if turn % 2:
            order.reverse()
        body = self._body(asked, [questions[place] for place in order], turn)
        answer = await self.ask(body)
        usage = answer.usage or {}
        tally.calls += 1
        tally.claims += len(questions)
        tally.prompt_tokens += _count(usage, "prompt_tokens", sum(len(m["content"]) for m in body["messages"]))
        tally.completion_tokens += _count(usage, "completion_tokens", len(answer.content or ""))
        read = read_verdicts(answer.content or "", len(questions))
        found: list[Opinion | None] = [None] * len(questions)
        for number, place in enumerate(order, 1):
            found[place] = read.get(number)
        tally.unread += sum(one is None for one in found)
        return found

    def _body(self, asked: str, questions: Sequence[Question], turn: int) -> dict[str, Any]:
        verdicts = list(_VERDICTS)
        sentences = list(dict.fromkeys(one.text for question in questions for one in question.sentences))
        if turn % 2:
            verdicts.reverse()
            sentences.reverse()
        listed = "\n".join(f"- {one}: {_MEANS[one]}" for one in verdicts)
        example = next(one for one in verdicts if one != "supported")
        claims = "\n".join(f"{number}. {question.claim.said}" for number, question in enumerate(questions, 1))
        sources = _cut("\n".join(sentences), _MOST_CHARACTERS) or "(there are none)"
        text = f"Sources:\n{sources}\n\nThe question was: {_cut(asked, 1000)}\n\nClaims:\n{claims}"
        return {
            "model": self.model,
            "messages": [
                {"role": "system", "content": _RULES.format(verdicts=listed, example=example)},
                {"role": "user", "content": text},
            ],
            "temperature": 0 if turn < 2 else 1,
            "seed": 1 + turn,
            **self.fields,
        }


def read_verdicts(text: str, count: int) -> dict[int, Opinion]:
    """The verdicts of a judge's answer by the claim's number; the first of a number counts."""
    found: dict[int, Opinion] = {}
    for match in _LINE.finditer(text):
        number, word = int(match[1]), re.sub(r"[ _-]", " ", match[2].lower())
        if not 1 <= number <= count or number in found:
            continue
        span = _SPAN.search(match[3])
        support = next(one for one in _VERDICTS if one == word)
        found[number] = Opinion(support, (span[1] or span[2]).strip() if span else "")
    return found


def exists(opinion: Opinion, claim: Claim, sentences: Sequence[Sentence]) -> bool:
    """The meta-check: the words that a negative verdict names stand where it says.

    sentences: all that the judge was shown. Of a contradiction the words stand in one of them and are not the claim's
    own; of a claim that was not found they are the claim's, and no sentence is the claim.
    """
    span = plain(opinion.span)
    if not span:
        return False
    shown = [plain(one.text) for one in sentences]
    if opinion.support == "contradicted":
        return any(span in one for one in shown) and span not in plain(claim.said)
    return span in plain(claim.said) and plain(claim.said) not in shown


def plain(text: str) -> str:
    """A text to be compared: case, spaces and the kind of quotation marks do not count."""
    return " ".join(text.replace("“", '"').replace("”", '"').replace("’", "'").casefold().split()).strip(" .")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + " ..."


def _count(usage: Mapping[str, Any], name: str, characters: int) -> int:
    told = usage.get(name)
    return told if isinstance(told, int) else characters // 4
