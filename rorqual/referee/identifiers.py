"""Identifiers of a text: paths, file names, hashes, UUIDs, long numbers; and the one that a copy was probably made of.

A text's identifiers are found once, in one pass, and those near a word by the pieces that two edits must leave alone
(of three pieces of a name, two edits spare one), so neither grows with the product of answer and conversation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property
from typing import Final

MAX_DISTANCE: Final = 2
_UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_HASH = r"(?=[0-9a-fA-F]*[0-9])(?=[0-9a-fA-F]*[a-fA-F])[0-9a-fA-F]{12,128}"
_PATH = r"(?:[A-Za-z]:)?[\w.@~+-]*(?:[/\\][\w.@~+-]+)+/?"
_FILE = r"[\w@~+-][\w.@~+-]*\.[A-Za-z][A-Za-z0-9]{0,7}"
_ID = r"(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)+|[A-Za-z]{1,6}\d{4,}"
_NUMBER = r"\d{4,}"
IDENTIFIER: Final = re.compile(
    rf"(?<![\w./\\@~+-])(?:(?P<uuid>{_UUID})|(?P<hash>{_HASH})|(?P<path>{_PATH})|(?P<file>{_FILE})|(?P<id>{_ID})"
    rf"|(?P<number>{_NUMBER}))(?![\w/\\-])"
)
_MOST_NEAR = 4000
_MOST_COMPARED = 50_000
_FEW, _MOST_LOOKED = 64, 4000
_SHORT_RUNS = re.compile(r"\d{1,3}(?!\d)")


class Identifiers:
    """Those of one text, found when first needed; the last `_MOST_NEAR` can be what a copy was made of."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._pieces: dict[tuple[int, int, str], list[str]] | None = None
        self._order: dict[str, int] = {}
        self._compared = self._looked = 0

    @cached_property
    def _words(self) -> dict[str, None]:
        return dict.fromkeys(match[0] for match in IDENTIFIER.finditer(self._text))

    def __contains__(self, word: str) -> bool:
        """Whether the text has the word. After `_MOST_LOOKED` looks into it, only as an identifier of its own."""
        self._looked += 1
        if self._looked > _FEW and word in self._words:
            return True
        return self._looked <= _MOST_LOOKED and word in self._text

    def nearest(self, word: str, kind: str) -> str | None:
        """The identifier that this one was probably copied from; None when it is another one.

        A sibling is no copy: `chapter-2.md` beside `chapter-1.md`, 4713 beside 4712, 10.0.0.2 beside 10.0.0.1. Once
        `_MOST_COMPARED` pairs were compared in all, no more are.
        """
        if len(word) < 6:
            return None
        most = MAX_DISTANCE if len(word) >= 8 else 1
        best: tuple[int, str] | None = None
        for other in self._candidates(word, most):
            self._compared += 1
            if self._compared > _MOST_COMPARED:
                break
            distance = edit_distance(word, other, most)
            if distance <= most and not _siblings(word, other, kind) and (best is None or distance < best[0]):
                best = distance, other
        return None if best is None else best[1]

    def _candidates(self, word: str, most: int) -> list[str]:
        """Those that share a piece with the word, in the text's order; none that is within `most` edits is missing."""
        pieces = self._pieces if self._pieces is not None else self._cut()
        found: dict[str, None] = {}
        for length in range(len(word) - most, len(word) + most + 1):
            for number, (start, end) in enumerate(_cuts(length)):
                for shift in range(-most, most + 1):
                    if start + shift >= 0:
                        piece = word[start + shift : end + shift]
                        found.update(dict.fromkeys(pieces.get((length, number, piece), ())))
        found.pop(word, None)
        return sorted(found, key=self._order.__getitem__)

    def _cut(self) -> dict[tuple[int, int, str], list[str]]:
        pieces: dict[tuple[int, int, str], list[str]] = defaultdict(list)
        for place, word in enumerate(list(self._words)[-_MOST_NEAR:]):
            self._order[word] = place
            for number, (start, end) in enumerate(_cuts(len(word))):
                pieces[len(word), number, word[start:end]].append(word)
        self._pieces = dict(pieces)
        return self._pieces


def _cuts(length: int) -> list[tuple[int, int]]:
    """Three pieces of a word of that length."""
    parts = MAX_DISTANCE + 1
    ends = [length * part // parts for part in range(parts + 1)]
    return list(zip(ends, ends[1:], strict=False))


def _siblings(word: str, other: str, kind: str) -> bool:
    """Whether the two differ in a short run of digits, an ending or capitals alone."""
    if kind in ("uuid", "hash"):
        return False
    if kind == "number":
        return abs(int(word) - int(other)) <= 1 if other.isdigit() else False
    if _SHORT_RUNS.sub("#", word) == _SHORT_RUNS.sub("#", other):
        return True
    stem, _, ending = word.rpartition(".")
    stem_of_other, _, ending_of_other = other.rpartition(".")
    return bool(stem) and stem == stem_of_other and ending != ending_of_other


def edit_distance(a: str, b: str, most: int) -> int:
    """Levenshtein distance; `most` + 1 for anything above `most`.

    What both begin with is passed at once, and only what differs branches: texts made to be alike cost no more.
    """
    if abs(len(a) - len(b)) > most:
        return most + 1
    same = _common_prefix(a, b)
    a, b = a[same:], b[same:]
    if not a or not b:
        return len(a) + len(b)
    best = most + 1
    for left, right in ((a[1:], b[1:]), (a[1:], b), (a, b[1:])):
        if best < 2:
            break
        best = min(best, 1 + edit_distance(left, right, best - 2))
    return best


def _common_prefix(a: str, b: str) -> int:
    """By halving, so that the characters are compared many at a time."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
