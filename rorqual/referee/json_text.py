"""JSON as models write it: read strictly, or else read for what was plainly meant, with a note of each liberty.

Liberties: code fences, a byte order mark, single quotes, bare keys, Python's literals, trailing and doubled commas,
comments, raw line breaks in strings, escapes JSON does not have, brackets that are missing at the end or too many
there. Never guessed: the rest of a string that was cut off, numbers that are none (NaN), text around the value, two
values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, Final

MAX_DEPTH: Final = 64
MAX_CHARACTERS: Final = 1 << 20
_FENCE_OPEN = re.compile(r"```[A-Za-z0-9_-]*[ \t]*\r?\n")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z_$][A-Za-z0-9_$-]*")
_SPACE = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)+", re.DOTALL)
_WORDS: Final = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_ESCAPES: Final = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_MISSING = object()


class NotJson(ValueError):
    """Text that cannot be read without guessing. `duplicate`: because one key has two values."""

    def __init__(self, why: str, duplicate: str | None = None) -> None:
        super().__init__(why)
        self.duplicate = duplicate


def read_strictly(text: str) -> Any:
    """The value of JSON that any reader reads alike.

    Raises: NotJson for anything else, also for what Python's own reader lets pass: NaN, a key with two values, a number
    beyond a double's range, nesting over `MAX_DEPTH`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
    except NotJson:
        raise
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        raise NotJson(f"it is nested over {MAX_DEPTH} deep")
    return value


def read_leniently(text: str) -> tuple[Any, list[str]]:
    """The value that was plainly meant, and the liberties taken. Raises: NotJson."""
    if len(text) > MAX_CHARACTERS:
        raise NotJson(f"it has over {MAX_CHARACTERS:,} characters")
    reader = _Reader(text)
    value = reader.read()
    return value, reader.notes


def depth(value: Any) -> int:
    """How deep a JSON value is nested; 0 for one that holds no others."""
    level, layer = 0, [value]
    while layer:
        inner: list[Any] = []
        for one in layer:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not any(isinstance(one, dict | list) for one in layer):
            return level
        level, layer = level + 1, inner
    return level


def dump(value: Any) -> str:
    """Compact JSON text, not escaped beyond need."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _constant(text: str) -> Any:
    raise NotJson(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise NotJson(f"{text} is beyond what a number can hold")
    return number


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            # bools are ints in Python, and 1 is no true
            if found[key] != value or type(found[key]) is not type(value):
                raise NotJson(f"{key!r} stands there twice with different values", key)
    return found


class _Reader:
    """Recursive descent over what models write."""

    def __init__(self, text: str) -> None:
        self.notes: list[str] = []
        opening = _FENCE_OPEN.match(text.lstrip())
        if opening is not None and text.rstrip().endswith("```"):
            text = text.strip()[opening.end() : -3]
            self._note("a code fence removed")
        if text.startswith("\ufeff"):
            text = text[1:]
            self._note("a byte order mark removed")
        self._text, self._at = text, 0

    def read(self) -> Any:
        self._space()
        if self._at == len(self._text):
            raise NotJson("it is empty")
        value = self._value(0)
        self._space()
        rest = self._text[self._at :]
        if rest and set(rest) <= set("]}) \t\r\n;,") and isinstance(value, dict | list):
            self._note("surplus brackets at the end removed")
        elif rest:
            raise NotJson(f"there is text after the value: {rest[:40]!r}")
        return value

    def _note(self, what: str) -> None:
        if what not in self.notes:
            self.notes.append(what)

    def _space(self) -> None:
        found = _SPACE.match(self._text, self._at)
        if found is not None:
            if "/" in found[0]:
                self._note("comments removed")
            self._at = found.end()

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _value(self, level: int) -> Any:
        if level > MAX_DEPTH:
            raise NotJson(f"it is nested over {MAX_DEPTH} deep")
        self._space()
        first = self._peek()
        if first == "{":
            return self._members(level)
        if first == "[":
            return self._items(level)
        if first in ('"', "'"):
            return self._string()
        number = _NUMBER.match(self._text, self._at)
        if number is not None:
            self._at = number.end()
            if self._peek().isalnum() or self._peek() in (".", "_", "+", "-"):
                raise NotJson(f"{self._text[number.start() : self._at + 8]!r} is no number")
            return self._number(number[0])
        word = _WORD.match(self._text, self._at)
        if word is not None and word[0] in _WORDS:
            if word[0][0].isupper():
                self._note("Python's literals read as JSON's")
            self._at = word.end()
            return _WORDS[word[0]]
        raise NotJson(f"no value begins at character {self._at}: {self._text[self._at : self._at + 20]!r}")

    @staticmethod
    def _number(text: str) -> int | float:
        if set(text) & set(".eE"):
            return _finite(text)
        try:
            return int(text)
        except ValueError:
            raise NotJson("a number has too many digits") from None

    def _members(self, level: int) -> dict[str, Any]:
        self._at += 1
        pairs: list[tuple[str, Any]] = []
        while self._goes_on("}", bool(pairs)):
            pairs.append(self._member(level))
        return _object(pairs)

    def _member(self, level: int) -> tuple[str, Any]:
        if self._peek() in ('"', "'"):
            key = self._string()
        else:
            word = _WORD.match(self._text, self._at)
            if word is None:
                raise NotJson(f"no key begins at character {self._at}: {self._text[self._at : self._at + 20]!r}")
            key, self._at = word[0], word.end()
            self._note("bare keys quoted")
        self._space()
        if self._peek() != ":":
            raise NotJson(f"key {key!r} has no value")
        self._at += 1
        return key, self._value(level + 1)

    def _items(self, level: int) -> list[Any]:
        self._at += 1
        items: list[Any] = []
        while self._goes_on("]", bool(items)):
            items.append(self._value(level + 1))
        return items

    def _goes_on(self, close: str, has_some: bool) -> bool:
        """Whether another member follows; passes the comma before it, or the closing bracket."""
        self._space()
        commas = 0
        while self._peek() == ",":
            commas += 1
            self._at += 1
            self._space()
        if self._at == len(self._text):
            self._note("a missing closing bracket added")
            return False
        if self._peek() == close:
            if commas:
                self._note("trailing commas removed")
            self._at += 1
            return False
        if self._peek() in ("}", "]"):
            # the other bracket: this one was forgotten, and an outer value ends here
            self._note("a missing closing bracket added")
            return False
        if commas > 1 or (commas and not has_some):
            self._note("surplus commas removed")
        if has_some and not commas:
            raise NotJson(f"a comma is missing before character {self._at}")
        return True

    def _string(self) -> str:
        quote, start = self._peek(), self._at
        if quote == "'":
            self._note("single quotes replaced")
        self._at += 1
        out: list[str] = []
        while True:
            if self._at >= len(self._text):
                raise NotJson(f"the string that begins at character {start} is cut off")
            char = self._text[self._at]
            self._at += 1
            if char == quote:
                return "".join(out)
            if char == "\\":
                out.append(self._escape())
                continue
            if char < " ":
                self._note("raw control characters in strings escaped")
            out.append(char)

    def _escape(self) -> str:
        char = self._peek()
        self._at += 1
        if char == "u":
            digits = self._text[self._at : self._at + 4]
            if re.fullmatch(r"[0-9a-fA-F]{4}", digits):
                self._at += 4
                code = int(digits, 16)
                if 0xD800 <= code < 0xDC00 and self._text.startswith("\\u", self._at):
                    low = self._text[self._at + 2 : self._at + 6]
                    if re.fullmatch(r"[dD][c-fC-F][0-9a-fA-F]{2}", low):
                        self._at += 6
                        return chr(0x10000 + ((code - 0xD800) << 10) + int(low, 16) - 0xDC00)
                return chr(code)
        if char in _ESCAPES and char:
            if char == "'":
                self._note("escapes JSON does not have removed")
            return _ESCAPES[char]
        self._note("a backslash that escapes nothing kept as one")
        return "\\" + char
