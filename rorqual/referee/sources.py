"""The texts that an answer may rest on, cut into sentences and searched by their rare words.

Sources are the evidence given, results of tools, and numbered lines of the conversation (`[3] By trade ...`). The rest
of the conversation supports what repeats it, but is no evidence that something is missing from.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Final

from rorqual.referee.answer import Asked
from rorqual.referee.policy import Evidence

CONVERSATION: Final = "conversation"
MOST_SENTENCES: Final = 20_000
"""Sentences of all sources that are looked at; a text is read no further."""
_MOST_CANDIDATES = 400
_NUMBERED = re.compile(r"^[ \t]*\[([A-Za-z0-9][\w.:-]{0,63})\][ \t]+(\S.*)$", re.MULTILINE)
# No possessive quantifiers over groups: Python before 3.11.5 drops what a repetition that failed had begun to take.
_SENTENCE = re.compile(r"[^\n.!?]+(?:[.!?]+(?![\s\"'”)\]]|\Z)[^\n.!?]*)*[.!?]*[\"'”)\]]*")
_WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\W_]+")
_ISO = re.compile(r"\b(\d{4})-(\d{1,2})-(\d{1,2})\b")
_MONTH_NAMES = "january february march april may june july august september october november december"
_MONTHS = tuple(_MONTH_NAMES.split())
_NUMBER_NAMES = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_NAMES.split())}
_MONTH_OF = {name[:3]: name for name in _MONTHS} | {name: name for name in _MONTHS}
_EMPTY_WORDS = """
a about above after again all also although am an and any are aren't as at be because been before being below between
both but by can cannot could did do does doing done down during each either else every few for from further had has have
having he her here hers him his how however i if in indeed into is it its itself just like may me might more most much
must my no nor not now of off on once only onto or other others our out over own per quite rather same she should since
so some still such than that the their theirs them then there these they this those though through thus to too under
until up upon us very was we well were what when where whether which while who whom whose why will with within without
would yes yet you your said says say according answer question source sources text document named called known name show
shows shown state stated states tell tells told mention mentions mentioned given
"""
EMPTY: Final = frozenset(_EMPTY_WORDS.split())
"""Words that carry no claim of their own."""
_NEGATION_WORDS = "not no never neither nor none without cannot nobody nothing"
_NEGATIONS = frozenset(_NEGATION_WORDS.split())


@dataclass(frozen=True)
class Sentence:
    """A sentence of a source: where it stands, its words in order, and whether it denies something."""

    source: str
    text: str
    words: tuple[str, ...]
    denies: bool

    @cached_property
    def stems(self) -> frozenset[str]:
        return frozenset(self.words)


def sources_of(asked: Asked, evidence: Sequence[Evidence], more: Sequence[Evidence] = ()) -> list[Evidence]:
    """What the answer can cite: evidence given and found, results of tools, and numbered lines of the conversation."""
    found = [*evidence, *more]
    if not evidence:
        for message in asked.messages:
            if message.get("role") in ("user", "system"):
                for match in _NUMBERED.finditer(text_of(message.get("content"))):
                    found.append(Evidence(match[1], match[2]))
    for index, message in enumerate(asked.messages):
        if message.get("role") == "tool":
            found.append(Evidence(str(message.get("tool_call_id") or f"tool-{index}"), text_of(message.get("content"))))
    return found


def text_of(content: object) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return ""


class SourceIndex:
    """Sentences of the sources, found by their words. Built in time linear in the texts. most: sentences in all."""

    def __init__(self, sources: Sequence[Evidence], most: int = MOST_SENTENCES) -> None:
        self.sources = {one.id: one.text for one in sources}
        self.sentences: list[Sentence] = []
        self._holders: dict[str, list[int]] = defaultdict(list)
        for one in sources:
            for text in islice(sentences_in(one.text), most - len(self.sentences)):
                sentence = Sentence(one.id, text, tuple(words_of(text)), denies(text))
                for word in sentence.stems:
                    self._holders[word].append(len(self.sentences))
                self.sentences.append(sentence)

    def has(self, word: str, within: Sequence[str] | None = None) -> bool:
        """Whether any sentence holds the word. within: of these sources."""
        holders = self._holders.get(word, ())
        if within is None:
            return bool(holders)
        return any(self.sentences[number].source in within for number in holders)

    def weight(self, word: str) -> float:
        """How rare a word is (idf); the more sentences hold it, the less it says."""
        return math.log((len(self.sentences) + 1) / (len(self._holders.get(word, ())) + 1)) + 0.1

    def nearest(self, words: Iterable[str], within: Sequence[str] | None = None, count: int = 3) -> list[Sentence]:
        """The sentences that hold most of the words, by weight; the earlier of equals. within: ids of sources."""
        allowed = None if within is None else set(within)
        scores: dict[int, float] = defaultdict(float)
        for word in sorted(set(words), key=lambda one: (len(self._holders.get(one, ())), one)):
            holders = self._holders.get(word, ())
            if len(scores) >= _MOST_CANDIDATES and len(holders) > _MOST_CANDIDATES:
                continue  # a word of every sentence chooses none
            for number in holders:
                if allowed is None or self.sentences[number].source in allowed:
                    scores[number] += self.weight(word)
        best = sorted(scores, key=lambda number: (-scores[number], number))[:count]
        return [self.sentences[number] for number in best]


def sentences_in(text: str) -> Iterable[str]:
    """The sentences of a text, line by line."""
    for match in _SENTENCE.finditer(text):
        if sentence := match[0].strip():
            yield sentence


def words_of(text: str) -> list[str]:
    """The words that carry something: stems in order, numbers and dates in one spelling."""
    text = _ISO.sub(_spelt_date, text.replace("’", "'"))
    return [stem(word) for word in map(str.casefold, _WORD.findall(text)) if word not in EMPTY]


def denies(text: str) -> bool:
    """Whether a sentence says that something is not so: an odd number of negations."""
    words = text.replace("’", "'").casefold().split()
    return sum(word.strip('.,;:!?"()') in _NEGATIONS or "n't" in word for word in words) % 2 == 1


@lru_cache(maxsize=1 << 14)
def stem(word: str) -> str:
    """One spelling for a word's forms; numbers without separators, small ones and months by their names' value."""
    word = word.removesuffix("'s")
    if word[:1].isdigit():
        plain = word.replace(",", "") if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", word) else word
        return plain.lstrip("0") or "0" if plain.isdigit() else plain
    if word in _NUMBERS:
        return _NUMBERS[word]
    if word in _MONTH_OF:
        return _MONTH_OF[word]
    for suffix in ("ing", "ers", "ies", "ed", "er", "or", "es", "s", "e", "y"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 4:
            return word[: -len(suffix)]
    return word


def is_number(word: str) -> bool:
    """Whether a word of `words_of` is a number."""
    return word[:1].isdigit()


def _spelt_date(match: re.Match[str]) -> str:
    month = int(match[2])
    return f"{int(match[3])} {_MONTHS[month - 1]} {match[1]}" if 1 <= month <= 12 else match[0]
