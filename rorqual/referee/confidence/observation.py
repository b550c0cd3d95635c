"""What was seen while a question was answered: the raw material of the signals, whichever source gave it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_OPENERS = set(
    re.findall(
        r"\w+",
        """a an and as at by can could describe did do does explain find for from give had has have how i if in is list
        my name of on please say since show state tell that the then these this those to was were what when where which
        who whom whose why will with would you your""",
    )
)  # capitalised because a sentence begins with them


@dataclass(frozen=True, slots=True)
class Token:
    """One token as read or written by the model.

    text: its characters (a piece of one may be replaced). logprob: of the token itself, None where nothing precedes
    it. top: log probabilities of the likeliest tokens at its place, best first; empty where they were not asked for.
    """

    text: str
    logprob: float | None
    top: tuple[float, ...] = ()


@dataclass(frozen=True)
class Observation:
    """One forced answer and what is known about how it came.

    answer_tokens: of the answer alone, without reasoning and end marks. question_tokens: of the question as the model
    read it, None where the source cannot score prompts. entity: whom or what the question is about; guessed from
    capitals, quotes and digits when None. other_answers: to paraphrases of the question, in their order.
    other_logprobs: the mean log probability per token of `answer` as the answer to each of those paraphrases.
    other_questions: the tokens of the paraphrases as read, None where the source cannot score prompts.
    statement_tokens: of a sentence that states the answer first and the entity behind it, as the model read it.
    samples: answers at temperature 1. p_true: probability of "yes" against "no" when asked whether the answer is
    right. abstain_mass: probability of an abstention under the abstention prompt. support: how well a given text
    supports the answer, 0 to 1. What was not measured is None, and no signal is made of it.
    """

    question: str
    answer: str
    answer_tokens: tuple[Token, ...] = ()
    question_tokens: tuple[Token, ...] | None = None
    entity: str | None = None
    other_answers: tuple[str, ...] | None = None
    other_logprobs: tuple[float, ...] | None = None
    other_questions: tuple[tuple[Token, ...], ...] | None = None
    statement_tokens: tuple[Token, ...] | None = None
    samples: tuple[str, ...] | None = None
    p_true: float | None = None
    abstain_mass: float | None = None
    support: float | None = None


def entities(question: str) -> list[str]:
    """What a question is about, judged by its spelling: quoted text, else runs of capitalised words and of digits.

    >>> entities("Where was Ada Maria Byron born?")
    ['Ada Maria Byron']
    >>> entities("Tell me Orlo Pisk's trade.")
    ['Orlo Pisk']
    """
    quoted = re.findall(r"[\"“«']([^\"”»']{2,})[\"”»'](?![^\W_])", question)
    if quoted:
        return [str(q) for q in quoted]
    runs: list[list[str]] = []
    end = -1
    for match in _WORD.finditer(question):
        word = re.sub(r"['’]s$", "", match.group())
        begins = match.start() == 0 or question[: match.start()].rstrip()[-1:] in (".", "?", "!", ":", "\n")
        is_name = (word[:1].isupper() or word[:1].isdigit()) and not (begins and word.lower() in _OPENERS)
        if is_name and word != "I":
            if runs and question[end : match.start()] in (" ", "-", " the ", " of "):
                runs[-1].append(word)
            else:
                runs.append([word])
            end = match.start() + len(word)
    return [" ".join(run) for run in runs]


def tokens_of(text_tokens: tuple[Token, ...], part: str) -> list[Token]:
    """The tokens that hold any of the last occurrence of `part` in the joined text; none when it does not occur."""
    joined = "".join(token.text for token in text_tokens)
    at = joined.rfind(part)
    if at < 0 or not part:
        return []
    found, start = [], 0
    for token in text_tokens:
        stop = start + len(token.text)
        if start < at + len(part) and stop > at:
            found.append(token)
        start = stop
    return found


def from_chat_logprobs(logprobs: Any) -> tuple[Token, ...]:
    """Tokens of a chat completion's `logprobs` (its `content` list); none where the server sent none.

    Any: whatever JSON holds. End marks and entries that are no number are left out.
    """
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    tokens: list[Token] = []
    for entry in content if isinstance(content, list) else ():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("logprob"), int | float):
            continue
        top = entry.get("top_logprobs")
        numbers = [
            float(one["logprob"])
            for one in (top if isinstance(top, list) else ())
            if isinstance(one, Mapping) and isinstance(one.get("logprob"), int | float)
        ]
        text = str(entry.get("token", ""))
        if not text.startswith("<｜"):
            tokens.append(Token(text, float(entry["logprob"]), tuple(sorted(numbers, reverse=True))))
    return tuple(tokens)
