"""Identifiers in an answer against the context: paths, file names, hashes, UUIDs, long numbers.

An identifier that the context has passes. One that differs from the context's by one or two characters was copied
wrong; one that nobody makes up (a UUID, a hash) and that the context does not have was invented. Both reject a call; in
prose they are told. Any other new identifier may be new on purpose (a file to be written), which only the profile
`strict` takes for an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

from rorqual.referee.answer import Answer, Asked
from rorqual.referee.json_text import NotJson, read_strictly
from rorqual.referee.policy import Policy
from rorqual.referee.reasons import Finding, failed

MAX_DISTANCE: Final = 2
_UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_HASH = r"(?=[0-9a-fA-F]*[0-9])(?=[0-9a-fA-F]*[a-fA-F])[0-9a-fA-F]{12,128}"
_PATH = r"(?:[A-Za-z]:)?[\w.@~+-]*(?:[/\\][\w.@~+-]+)+/?"
_FILE = r"[\w@~+-][\w.@~+-]*\.[A-Za-z][A-Za-z0-9]{0,7}"
_ID = r"(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)+|[A-Za-z]{1,6}\d{4,}"
_NUMBER = r"\d{4,}"
_IDENTIFIER = re.compile(
    rf"(?<![\w./\\@~+-])(?:(?P<uuid>{_UUID})|(?P<hash>{_HASH})|(?P<path>{_PATH})|(?P<file>{_FILE})|(?P<id>{_ID})"
    rf"|(?P<number>{_NUMBER}))(?![\w/\\-])"
)
_DATE = re.compile(r"\d{4}-\d{1,2}(?:-\d{1,2})?(?:[T ].*)?|(?:19|20)\d\d")
_LONGEST, _MOST = 256, 200
_MOST_NEAR = 4000
_SHORT_RUNS = re.compile(r"\d{1,3}(?!\d)")


def check_copy(asked: Asked, answer: Answer, policy: Policy) -> list[Finding]:
    """What stands in the answer and almost, or not at all, in the context."""
    if not answer.calls and not answer.content:
        return []
    context = asked.context
    if answer.reasoning and answer.calls:
        pass  # reasoning is the model's own and proves nothing
    found: list[Finding] = []
    for index, call in enumerate(answer.calls):
        try:
            value = read_strictly(call.arguments or "{}")
        except NotJson:
            continue
        for path, text in _leaves(value):
            found += _argument(text, path, index, call.name or "", context, policy)
    if answer.content and not asked.schema[0]:
        found += _prose(answer.content, context)
    return found


def _argument(text: str, path: str, index: int, name: str, context: str, policy: Policy) -> Iterator[Finding]:
    match = _IDENTIFIER.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None or match[0] in context or _DATE.fullmatch(match[0]):
        return
    kind, word = match.lastgroup or "", match[0]
    near = nearest(word, kind, context)
    at = f"call {index + 1} (`{name}`): `{path}`"
    if near is not None:
        says = f"{at} is `{word}`, which the context does not have; it has `{near}`. Copy it exactly"
        yield failed("copy_altered", says, call=index, path=path, candidate=near)
    elif kind in ("uuid", "hash") or policy.profile.copy == "strict":
        says = f"{at} is `{word}`, which stands nowhere in the context. Take it from there, or ask for it"
        yield failed("copy_unknown", says, call=index, path=path)
    else:
        yield failed("copy_new", f"{at} is `{word}`, which the context does not have", call=index, path=path)


def _prose(content: str, context: str) -> Iterator[Finding]:
    """Near misses in the text, told and never rejecting."""
    seen: set[str] = set()
    for count, match in enumerate(_IDENTIFIER.finditer(content)):
        word, kind = match[0], match.lastgroup or ""
        if count >= _MOST:
            return
        if word in seen or kind == "number" or word in context or _DATE.fullmatch(word):
            continue
        seen.add(word)
        near = nearest(word, kind, context)
        if near is not None:
            says = f"`{word}` is almost `{near}` of the context"
            yield Finding("copy_altered", says, "warn", span=match.span(), candidate=near, hard=False)


def nearest(word: str, kind: str, context: str) -> str | None:
    """The identifier of the context that this one was probably copied from; None when it is another one.

    A sibling is no copy: `chapter-2.md` beside `chapter-1.md`, 4713 beside 4712, 10.0.0.2 beside 10.0.0.1.
    """
    if len(word) < 6 or (kind == "number" and len(word) < 6):
        return None
    most = MAX_DISTANCE if len(word) >= 8 else 1
    best: tuple[int, str] | None = None
    for other in _identifiers(context):
        if abs(len(other) - len(word)) > most or other == word:
            continue
        distance = edit_distance(word, other, most)
        if distance <= most and not _siblings(word, other, kind) and (best is None or distance < best[0]):
            best = distance, other
    return None if best is None else best[1]


@lru_cache(maxsize=64)
def _identifiers(context: str) -> tuple[str, ...]:
    found = dict.fromkeys(match[0] for match in _IDENTIFIER.finditer(context))
    return tuple(found)[-_MOST_NEAR:]


def _siblings(word: str, other: str, kind: str) -> bool:
    """Whether the two differ in a short run of digits, an ending or capitals alone."""
    if kind in ("uuid", "hash"):
        return False
    if kind == "number":
        return abs(int(word) - int(other)) <= 1
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


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Texts and whole numbers within arguments, by their place."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, str(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value[:_MOST]):
            yield from _leaves(inner, f"{path}[{i}]")


def excerpts(context: str, words: Sequence[str], *, around: int = 400, most_characters: int = 8192) -> str:
    """Where the words stand in the context, with what is around them and the offsets (spec 6.4: about 2,048 tokens)."""
    out, used = [], 0
    for word in words:
        at = context.find(word)
        if at < 0:
            continue
        start, end = max(0, at - around), min(len(context), at + len(word) + around)
        piece = f"[characters {start}-{end}] {context[start:end]}"
        if used + len(piece) > most_characters:
            break
        out.append(piece)
        used += len(piece)
    return "\n".join(out)
