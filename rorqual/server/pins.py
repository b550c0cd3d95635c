"""Spans of the prompt that the retrieval guard shows every query: a request's `rorqual.pin`.

A span is a pair of places among the prompt's tokens, or a text: then every place where the rendered prompt holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from rorqual.engine import Engine
from rorqual.engine.guard import sources_of
from rorqual.engine.params import MOST_PINS
from rorqual.errors import ConfigError, RequestError
from rorqual.server.schema import Extension
from rorqual.tokenizer import Tokenizer

FIELD = "rorqual.pin"


def spans_of(more: Extension | None, tokens: Sequence[int], engine: Any, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """The request's pins as spans [begin, end) of `tokens`, in order, what touches joined.

    Raises: RequestError where a span is beyond the prompt, a text is not in it, there are too many, or no guard would
    show them.
    """
    if more is None or not more.pin:
        return []
    if isinstance(engine, Engine):
        setting = engine.guards.setting if more.guard is None else more.guard
        try:
            sources = sources_of(setting)
        except ConfigError as error:
            raise RequestError(str(error), param="rorqual.guard") from None
        if "pinned" not in sources:
            raise RequestError(
                f"{FIELD} names spans that are to be shown always, and the guard is {setting!r}, which shows none. Ask "
                "for rorqual.guard `default`, or one with the source `pinned`.",
                param=FIELD,
            )
    found: list[tuple[int, int]] = []
    ends = raw = None
    for number, pin in enumerate(more.pin):
        where = f"{FIELD}[{number}]"
        if not isinstance(pin, str):
            found.append(_checked(pin, len(tokens), where))
            continue
        if ends is None or raw is None:
            if any(not 0 <= token < tokenizer.vocab_size for token in tokens):
                raise RequestError("The prompt holds ids that are no tokens, so no text is in it.", param="prompt")
            pieces = [tokenizer.token_bytes(token) for token in tokens]
            raw, ends = b"".join(pieces), np.fromiter(accumulate(map(len, pieces)), np.int64, len(pieces))
        found += _places(pin, raw, ends, where)
    merged = _merged(found)
    if len(merged) > MOST_PINS:
        raise RequestError(
            f"{FIELD} comes to {len(merged)} spans, and a request takes {MOST_PINS}. Pin fewer, or longer texts.",
            param=FIELD,
        )
    return merged


def _checked(pin: Sequence[int], length: int, where: str) -> tuple[int, int]:
    begin, end = pin
    if not 0 <= begin < end <= length:
        raise RequestError(
            f"{where} is [{begin}, {end}], and the prompt has {length} tokens: a span begins at 0 or later and ends "
            "behind its beginning, within the prompt.",
            param=where,
        )
    return begin, end


def _places(text: str, raw: bytes, ends: np.ndarray[Any, np.dtype[np.int64]], where: str) -> list[tuple[int, int]]:
    sought, found, at = text.encode("utf-8", "replace"), list[tuple[int, int]](), -1
    while sought and (at := raw.find(sought, at + 1)) >= 0:
        first, last = np.searchsorted(ends, [at, at + len(sought) - 1], side="right").tolist()
        found.append((first, last + 1))
        at += len(sought) - 1
    if not found:
        raise RequestError(
            f"{where} is a text that the prompt does not hold: {text[:80]!r}. Give it as it stands there.", param=where
        )
    return found


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((begin, end))
    return out
