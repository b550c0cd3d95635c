"""Where the end of a text stood before, for drafts from the text itself.

Token ids lie in an `array("i")`, which grows by a token for little; C reads it where it is.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import lru_cache

from rorqual.ops import registry
from rorqual.ops.native import library

SHORTEST = 2
"""Tokens that have to match."""


def last_match(ids: array[int], most: int) -> tuple[int, int]:
    """The length of the longest earlier match of the last tokens (up to `most` of them; 0: none of two or more) and the
    place behind it, in the latest of equal ones. A match may overlap the end: `a b a b` has one of length 2 at 2.
    """
    native = _native() if registry.allows("native") else None
    if native is None:
        return reference(ids, most)
    found = (ctypes.c_int64 * 2)()
    native(ids.buffer_info()[0], len(ids), most, found)
    return found[0], found[1]


@lru_cache(maxsize=1)
def _native() -> Callable[..., None] | None:
    return None if library.load() is None else library.kernel("last_match", bf16=False)[0]


def reference(ids: array[int], most: int) -> tuple[int, int]:
    """The same in plain Python."""
    best, place, end = 0, 0, len(ids) - 1
    for i in range(end - 1, 0, -1):
        length = 0
        while length < most and length <= i and ids[i - length] == ids[end - length]:
            length += 1
        if length >= SHORTEST and length > best:
            best, place = length, i + 1
            if best == most:
                break
    return best, place
