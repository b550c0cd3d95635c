"""An answer cut into atomic claims, and what can be said of each from the words of the sources alone.

A claim is a sentence, or a part of one that is joined by `;` or by a conjunction and has a verb of its own. Citations
`[id]` and quotations that follow a sentence belong to it. Questions, headings, code, greetings and what the speaker
says of itself claim nothing. The words decide only what they can: a claim all of whose words stand in one sentence, in
their order, is supported; a number or a name where the same sentence has another is contradicted; the rest is
suspected or open, and a judge's to decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rorqual.referee.sources import Sentence, SourceIndex, denies, is_number, words_of

Support = Literal["supported", "contradicted", "not found"]
MOST_CLAIMS: Final = 100
"""Claims of one answer that are looked at."""
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_LINE = re.compile(r"[^\n]+")
_MARK = re.compile(r"[ \t]*(?:[-*+•]|\d{1,3}[.)])?[ \t]*")
_NOT_SAID = re.compile(r"\[[A-Za-z0-9][\w.:-]{0,63}\]|\"[^\"\n]{0,600}\"|“[^”\n]{0,600}”")
CITED: Final = re.compile(r"\[([A-Za-z0-9][\w.:-]{0,63})\]")
QUOTED: Final = re.compile(r'"([^"\n]{1,600})"|“([^”\n]{1,600})”')
_END = re.compile(r"[.!?]+[\"'”)*_]*(?=\s|$)")
_ABBREVIATION = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|No|vs|etc|e\.g|i\.e|ca|approx|Inc|Ltd|Jr|Sr))\.$")
_JOINT = re.compile(
    r";\s+|,?\s+(?:and|but|while|whereas)\s+(?=(?:he|she|it|they|is|was|are|were|has|had|works?|lives?|plays?|owns?|"
    r"comes?|became|wrote|won|died|joined|studied|moved|speaks?|costs?|weighs?|measures?)\b)"
)
_PRONOUN = re.compile(r"^(?:he|she|it|they)\b")
_META = re.compile(
    r"(?i)\s*(?:i\b(?!\.)|i'm|i’m|sorry|sure\b|of course|certainly|please|let me|let's|here (?:is|are)|hope|thanks?\b|"
    r"the (?:sources?|texts?|documents?|context|evidence|passages?) (?:do(?:es)? not|don't|doesn't|gives? no|"
    r"says? nothing)|"
    r"in (?:summary|short)[,:]?$|note that$|yes[.!]?$|no[.!]?$|none of the )"
)
_ONE_ALONE = re.compile(r"(?:The|Its|His|Her|Their) [^,;]{1,200}? (?:is|was)(?! (?:in|at|on|a|an|among|one|near)\b) ")
_NAME = re.compile(r"(?<![.!?\n]\s)(?<!^)\b[A-ZÀ-Þ][\w'’-]*")


@dataclass(frozen=True)
class Claim:
    """One thing an answer says. span: its sentence in the content, with marks, citations and quotations.

    said: the claim alone. names: capitalised words within it.
    """

    said: str
    span: tuple[int, int]
    cited: tuple[str, ...] = ()
    quotes: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(word for found in _NAME.findall(self.said) for word in words_of(found))


@dataclass(frozen=True)
class Reading:
    """What the words say of a claim. support: None where they cannot tell. is_suspected: they speak against it.

    best: the sentence nearest to it. missing: its words that no source has.
    """

    support: Support | None
    is_suspected: bool = False
    best: Sentence | None = None
    missing: tuple[str, ...] = ()


def split_claims(content: str) -> list[Claim]:
    """The claims of a text, in order, at most `MOST_CLAIMS`."""
    text = without_code(content)
    claims: list[Claim] = []
    for start, end in _sentences(text):
        whole = text[start:end]
        said = _NOT_SAID.sub(" ", whole)
        said = " ".join(said.replace("**", "").split())
        if not _is_claim(said):
            continue
        cited = tuple(dict.fromkeys(CITED.findall(whole)))
        quotes = tuple(one or other for one, other in QUOTED.findall(whole))
        for part in _atoms(said):
            claims.append(Claim(part, (start, end), cited, quotes))
            if len(claims) >= MOST_CLAIMS:
                return claims
    return claims


def without_code(content: str) -> str:
    """The text with spaces in place of its code."""
    return _CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), content)


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where sentences stand; what is cited and quoted behind one belongs to it."""
    for line in _LINE.finditer(text):
        raw, offset = line[0], line.start()
        if raw.lstrip().startswith(("#", "|", ">")) or raw.rstrip().endswith(":"):
            continue
        hidden = _NOT_SAID.sub(lambda found: "\x00" * len(found[0]), raw)
        mark = _MARK.match(hidden)
        at = mark.end() if mark else 0
        for found in _END.finditer(hidden, at):
            if _ABBREVIATION.search(hidden, max(0, found.start() - 8), found.end()):
                continue
            end = _behind(hidden, found.end())
            if end > at:
                yield offset + at, offset + end
                at = _skip(hidden, end)
        if hidden[at:].strip(" \x00\t.*_"):
            yield offset + at, offset + len(raw.rstrip())


def _behind(hidden: str, at: int) -> int:
    """The end of the citations and quotations that follow."""
    end = at
    while at < len(hidden) and (hidden[at] in " \t\x00" or (end > at - 2 and hidden[at] in ".,")):
        at += 1
        if hidden[at - 1] == "\x00":
            end = at
    return end


def _skip(hidden: str, at: int) -> int:
    while at < len(hidden) and hidden[at] in " \t":
        at += 1
    return at


def _is_claim(said: str) -> bool:
    return len(said) >= 8 and not said.endswith("?") and _META.match(said) is None and len(words_of(said)) >= 2


def _atoms(said: str) -> Iterator[str]:
    """Parts that could be true or false each alone; a part without a name carries the first part's."""
    parts = [part.strip(" ,") for part in _JOINT.split(said)]
    names = re.findall(r"[A-ZÀ-Þ][\w'’-]*(?:\s+[A-ZÀ-Þ][\w'’-]*)*", parts[0])
    subject = names[0] if names else ""
    for index, part in enumerate(parts):
        if index and subject and not re.search(r"[A-ZÀ-Þ]", part):
            part = f"{subject} {_PRONOUN.sub('', part).strip()}"
        if part:
            yield part


def read_claim(claim: Claim, index: SourceIndex, known: frozenset[str]) -> Reading:
    """What the words say. known: words of the question and the conversation, which are no news.

    Suspected is a claim whose news (its names and numbers, and its last word, where English puts what is new) stands
    neither in the sources it cites (in any source, where it cites none) nor in the conversation.
    """
    words = words_of(claim.said)
    within = [one for one in claim.cited if one in index.sources] or None
    nearby = index.nearest(words, within)
    for sentence in nearby:
        if denies(claim.said) == sentence.denies and _says(words, sentence):
            return Reading("supported", best=sentence)
    best = nearby[0] if nearby else None
    news = [word for word in words if word in claim.names or is_number(word)] + words[-1:]
    missing = tuple(dict.fromkeys(word for word in news if word not in known and not index.has(word, within)))
    if best is not None and _has_other_value(words, best, claim, index):
        return Reading("contradicted", True, best, missing)
    return Reading(None, bool(missing) or best is None, best, missing)


def _says(words: Sequence[str], sentence: Sentence) -> bool:
    """Whether the sentence has every word, in the same order but for one that may stand elsewhere.

    `In Oslo Ann was born` says that Ann was born in Oslo; `Bob beat Ann` does not say that Ann beat Bob.
    """
    if not words or not all(word in sentence.stems for word in words):
        return False
    order = {word: place for place, word in reversed(list(enumerate(sentence.words)))}
    places = [order[word] for word in dict.fromkeys(words)]
    if places == sorted(places):
        return True
    return len(places) > 2 and any(
        places[:skip] + places[skip + 1 :] == sorted(places[:skip] + places[skip + 1 :]) for skip in range(len(places))
    )


def _has_other_value(words: Sequence[str], best: Sentence, claim: Claim, index: SourceIndex) -> bool:
    """Whether the claim is the sentence with another value, which no source has: a number, or who or what something is.

    All other words are the same, in the same order. Another name contradicts only where there can be one alone: `The
    capital of Norway is Bergen`.
    """
    if denies(claim.said) != best.denies:
        return False
    mine = [word for word in dict.fromkeys(words) if word not in best.stems]
    its = [word for word in dict.fromkeys(best.words) if word not in set(words)]
    if any(index.has(word) for word in mine):
        return False
    if len(mine) == 1 and is_number(mine[0]):
        return sum(map(is_number, its)) == 1 and len(its) <= 3
    names = frozenset(word for found in _NAME.findall(best.text) for word in words_of(found))
    are_names = 0 < len(mine) <= 2 and 0 < len(its) <= 2 and claim.names.issuperset(mine) and names.issuperset(its)
    same = [word for word in words if word not in mine] == [word for word in best.words if word not in its]
    return are_names and same and _ONE_ALONE.match(claim.said) is not None
