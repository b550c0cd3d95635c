"""Identifiers in an answer against the context: paths, file names, hashes, UUIDs, long numbers.

An identifier that the context has passes. One that differs from the context's by one or two characters was copied
wrong; one that nobody makes up (a UUID, a hash) and that the context does not have was invented. Both reject a call; in
prose they are told. Any other new identifier may be new on purpose (a file to be written), which only the profile
`strict` takes for an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rorqual.referee.answer import Answer, Asked
from rorqual.referee.identifiers import IDENTIFIER, Identifiers
from rorqual.referee.json_text import NotJson, read_strictly
from rorqual.referee.policy import Policy
from rorqual.referee.reasons import Finding, failed

_DATE = re.compile(r"\d{4}-\d{1,2}(?:-\d{1,2})?(?:[T ].*)?|(?:19|20)\d\d")
_LONGEST, _MOST, _MOST_NEW = 256, 200, 200


def check_copy(asked: Asked, answer: Answer, policy: Policy) -> list[Finding]:
    """What stands in the answer and almost, or not at all, in the context."""
    if not answer.calls and not answer.content:
        return []
    context = asked.identifiers  # reasoning is the model's own and proves nothing
    found: list[Finding] = []
    for index, call in enumerate(answer.calls):
        try:
            value = read_strictly(call.arguments or "{}")
        except NotJson:
            continue
        for path, text in _leaves(value):
            if len(found) >= _MOST_NEW:
                break
            found += _argument(text, path, index, call.name or "", context, policy)
    if answer.content and not asked.schema[0]:
        found += _prose(answer.content, context)
    return found


def _argument(text: str, path: str, index: int, name: str, context: Identifiers, policy: Policy) -> Iterator[Finding]:
    match = IDENTIFIER.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None or match[0] in context or _DATE.fullmatch(match[0]):
        return
    kind, word = match.lastgroup or "", match[0]
    near = context.nearest(word, kind)
    at = f"call {index + 1} (`{name}`): `{path}`"
    if near is not None:
        says = f"{at} is `{word}`, which the context does not have; it has `{near}`. Copy it exactly"
        yield failed("copy_altered", says, call=index, path=path, candidate=near)
    elif kind in ("uuid", "hash") or policy.profile.copy == "strict":
        says = f"{at} is `{word}`, which stands nowhere in the context. Take it from there, or ask for it"
        yield failed("copy_unknown", says, call=index, path=path)
    else:
        yield failed("copy_new", f"{at} is `{word}`, which the context does not have", call=index, path=path)


def _prose(content: str, context: Identifiers) -> Iterator[Finding]:
    """Near misses in the text, told and never rejecting."""
    seen: set[str] = set()
    for count, match in enumerate(IDENTIFIER.finditer(content)):
        word, kind = match[0], match.lastgroup or ""
        if count >= _MOST:
            return
        if word in seen or kind == "number" or word in context or _DATE.fullmatch(word):
            continue
        seen.add(word)
        near = context.nearest(word, kind)
        if near is not None:
            says = f"`{word}` is almost `{near}` of the context"
            yield Finding("copy_altered", says, "warn", span=match.span(), candidate=near, hard=False)


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
