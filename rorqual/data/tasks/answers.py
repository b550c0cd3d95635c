"""Reading a model's answer: strip the reasoning, recognise abstention, find exactly one candidate.

The rules are strict on purpose. An answer that lists several candidates, hedges, negates, or carries extra
digits is not right, and nothing inside the reasoning counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rorqual.chat import parse_completion
from rorqual.chat.markers import EOS, THINK_END
from rorqual.data.tasks.base import Grade, Mode, correct, wrong

IDK = "I don't know."

_ABSTENTIONS = (
    r"i (?:do not|don't) know",
    r"i am not sure",
    r"i'm not sure",
    r"i (?:do not|don't) have that information",
    r"(?:that|it|this) is (?:not known|unknown)(?: to me)?",
    r"the text (?:does not|doesn't) say",
)
_ABSTAIN = re.compile(r"(?:sorry, )?(?:" + "|".join(_ABSTENTIONS) + r")\b")
_SUBJECT = re.compile(r"[^:.,;!?]{1,80}: ")
"""What was asked, said again before it is declined: `job of ada lovelace: i don't know`."""
_HEDGES = re.compile(r"\b(?:not|never|or|either|maybe|perhaps|possibly|isn't|wasn't|doesn't|no|neither|nor)\b")
_CODE_TOKEN = re.compile(r"[-+]?[0-9A-Za-z]+(?:[-.,:/_][0-9A-Za-z]+)*")
_NO_WORD = re.compile(r"[^\w'-]+")
MAX_ANSWER_WORDS = 30


def parse_message(output_text: str, mode: Mode) -> dict[str, Any]:
    """The assistant message in a raw completion, read in the tolerant form (a missing EOS is accepted)."""
    return parse_completion(output_text, thinking_mode=mode, strict=False)


def final_answer(output_text: str, mode: Mode) -> str:
    """The content a user would see: no reasoning, no tool calls, no EOS; white space trimmed.

    In thinking mode an output that never closes its reasoning has no answer and gives an empty string.
    """
    content = parse_message(output_text, mode).get("content") or ""
    return str(content).replace(EOS, "").strip()


def normalise(text: str) -> str:
    """Lower case, typographic quotes made plain, runs of white space made single, outer punctuation
    removed.
    """
    text = text.replace("’", "'").replace("“", '"').replace("”", '"')
    return " ".join(text.casefold().split()).strip(" .!\"'`*")


def is_abstention(answer: str, candidates: Iterable[str] = ()) -> bool:
    """True when the whole answer declines: it opens with a known phrase (what was asked and a colon may stand before
    it) and names no candidate and no number.
    """
    text = normalise(answer)
    if not _declines(text) or len(text.split()) > MAX_ANSWER_WORDS:
        return False
    return not re.search(r"\d", text) and not _found(text, candidates)


def abstention_start(output_text: str, mode: Mode, reasoning: Iterable[str] = ()) -> int | None:
    """Where in a raw completion the model first declines, for masking it; None when it does not.

    reasoning: expressions that find a decision to decline inside the reasoning, each beginning where it is taken.
    The answer declines from its first character when it opens with a known phrase.
    """
    thought, _, answer = output_text.partition(THINK_END) if mode == "thinking" else ("", "", output_text)
    found = [m.start() for pattern in reasoning if (m := re.search(pattern, thought))]
    said = answer.lstrip(" \n*\"'`")
    if _declines(normalise(said)):
        subject = None if _ABSTAIN.match(normalise(said)) else _SUBJECT.match(said)
        found.append(len(output_text) - len(said) + (subject.end() if subject else 0))
    return min(found, default=None)


def _declines(text: str) -> bool:
    """Whether normalised text opens with a known phrase, or with what was asked and then one."""
    subject = _SUBJECT.match(text)
    return bool(_ABSTAIN.match(text) or (subject and _ABSTAIN.match(text, subject.end())))


def _found(text: str, candidates: Iterable[str]) -> list[str]:
    """The candidates that stand in normalised `text` as whole words; one inside a longer one does not
    count.
    """
    padded = f" {_NO_WORD.sub(' ', text)} "
    hits = [c for c in {normalise(c) for c in candidates} if f" {_NO_WORD.sub(' ', c)} " in padded]
    return sorted(c for c in hits if not any(c != d and f" {c} " in f" {d} " for d in hits))


def candidates_in(answer: str, candidates: Iterable[str]) -> set[str]:
    """The candidates that an answer names as whole words."""
    return set(_found(normalise(answer), candidates))


def code_values_in(answer: str) -> list[str]:
    """The words of an answer that hold a digit: numbers, hex ids, dates."""
    return [word for word in _CODE_TOKEN.findall(answer) if any(ch.isdigit() for ch in word)]


def is_hedged(answer: str) -> bool:
    """True for an answer that negates, doubts or offers alternatives."""
    return bool(_HEDGES.search(normalise(answer)))


def grade_closed_set(answer: str, gold: str | None, candidates: Iterable[str]) -> Grade:
    """Grade an answer against a closed set: exactly one candidate, equal to `gold`, not hedged or negated.

    `gold` None means the question has no answer: only an abstention is right.
    """
    candidates = list(candidates)
    if is_abstention(answer, candidates):
        return Grade("A", 1.0 if gold is None else 0.0, None, "" if gold is None else "abstained on a known answer")
    found = _found(normalise(answer), candidates)
    return _grade_found(answer, found, f"names {len(found)} candidates", gold, gold and normalise(gold))


def grade_code_value(answer: str, gold: str | None) -> Grade:
    """Grade an answer whose value contains a digit (number, hex id, date): the only such word must equal
    `gold`.
    """
    if is_abstention(answer):
        return Grade("A", 1.0 if gold is None else 0.0, None, "" if gold is None else "abstained on a known answer")
    found = code_values_in(answer)
    return _grade_found(answer, found, f"holds {len(found)} values", gold, gold)


def _grade_found(answer: str, found: list[str], holds: str, gold: str | None, wanted: str | None) -> Grade:
    """Grade what was `found` in an answer that is no abstention: one thing, as it is `wanted`. `gold` is for people."""
    if gold is None:
        return wrong(found, "answered a question that has no answer")
    if len(answer.split()) > MAX_ANSWER_WORDS:
        return wrong(found, f"longer than {MAX_ANSWER_WORDS} words")
    if len(found) != 1:
        return wrong(found, f"{holds}, expected exactly one")
    if is_hedged(answer):
        return wrong(found, "hedged or negated")
    if found[0] != wanted:
        return wrong(found[0], f"expected {gold}")
    return correct(found[0])
