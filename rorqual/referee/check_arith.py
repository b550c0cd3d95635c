"""Arithmetic in an answer: closed expressions and totals of tables, computed again exactly.

Only what is arithmetic beyond doubt is judged: numbers, operators, an equals sign and a number, not within code, not
next to letters or other operators, not called wrong or of another base by its own line, not quoted from the context. A
result written with fewer digits is right when it is the value rounded, or cut off, to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from typing import Final

from rorqual.referee.answer import Answer, Asked
from rorqual.referee.reasons import Finding, failed

_MOST_BITS: Final = 4096
# Possessive and bounded: a text made to be slow takes no longer than another of its length.
_GROUPS = r"(?:,\d{3})+(?!\d|,\d{3})"
# Whole numbers only, said by what may follow and not by possessive quantifiers, which Python before 3.11.5 gets wrong.
_NUM = rf"(?<![\d.,])(?:\d{{1,3}}{_GROUPS}|\d{{4,}}|\d{{1,3}}(?!{_GROUPS}))(?!\d)(?:\.\d+(?!\d)|(?!\.\d))"
_OPEN, _SHUT, _SIGN = r"[(]{0,8}", r"[)]{0,8}", r"(?:\*\*|[-+*/^×÷·−])"
_SIDE = rf"{_OPEN}(?:[+\-−] ?)?{_OPEN}{_NUM}{_SHUT}(?: ?{_SIGN} ?{_OPEN}[-−]?{_NUM}{_SHUT}){{0,64}}"
_EQUATION = re.compile(rf"(?P<first>{_SIDE})(?P<rest>(?: ?(?:=|≈) ?{_SIDE}){{1,16}})")
_MOST, _AROUND = 500, 300
_SPLIT = re.compile(r"\s*(=|≈)\s*")
_TOKEN = re.compile(rf"\s*(?:({_NUM})|(\*\*|[-+*/^×÷·−()]))")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_DOUBTFUL = re.compile(
    r"(?i)\b(?:mod(?:ulo)?|binary|hex(?:adecimal)?|octal|base|wrong|incorrect|false|not|isn't|mistake|error|instead|"
    r"impossible|suppose|assume|if|claim(?:s|ed)?|typo)\b|≡|≠|!="
)
_BEFORE_BAD = re.compile(r"(?:[\w.,]|[)\]}²³√^*/+×÷·=<>%°$€£|!-]\s*|\b(?:minus|plus|times|by|over|of|[b-zB-HJ-Z])\s+)$")
_DATE_LIKE = re.compile(r"\d-\d[^=≈]*\s[=≈]|\d/\d+/\d")
_LEADING_ZERO = re.compile(r"(?<![\d.,])0\d")
_AFTER_BAD = re.compile(
    r"\s*(?:[-+*/^×÷·=≈<>!²³°_({\[√]|%|\.\d|,\d)|[\w]|\s*(?:hundred|thousand|million|billion|percent|mod|x|r|R)\b|\s?\w\b(?!\s*[.,])"
)
_TABLE_ROW = re.compile(r"^\s*\|(.+)\|\s*$")
_RULE_ROW = re.compile(r"^[\s|:-]+$")
_CELL = re.compile(r"\**\s*[$€£]?\s*(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\s*\**")
_NO_SUM = re.compile(
    r"(?i)price|rate|avg|average|mean|%|percent|share|year|date|ratio|per\b|unit|age|score|rank|id|#|no\."
)


def check_arith(asked: Asked, answer: Answer) -> list[Finding]:
    """What is computed wrong in the content."""
    content = answer.content or ""
    if answer.calls or asked.schema[0] or ("=" not in content and "≈" not in content and "|" not in content):
        return []
    text = _CODE.sub(lambda found: " " * len(found[0]), content)
    return [*_equations(text, asked), *_tables(text)]


def _equations(text: str, asked: Asked) -> Iterator[Finding]:
    for match in islice(_EQUATION.finditer(text), _MOST):
        if _is_doubtful(text, match.start(), match.end()) or match[0].strip() in asked.context:
            continue
        parts = _SPLIT.split(match[0])
        sides, signs = parts[::2], parts[1::2]
        if not any(re.search(r"\d\s*(?:\*\*|[-+*/^×÷·−])\s*[\d(−-]", side) for side in sides):
            continue  # `a = 5 = 5` says nothing
        values = [evaluate(side) for side in sides]
        for i, sign in enumerate(signs):
            left, right = values[i], values[i + 1]
            if left is None or right is None:
                break
            if not _agree(left, sides[i], right, sides[i + 1], loose=sign == "≈"):
                value = _shown(left)
                says = f"`{sides[i].strip()} {sign} {sides[i + 1].strip()}` is wrong: {sides[i].strip()} is {value}"
                yield failed("arith_wrong", says, span=match.span(), candidate=value)
                break


def _is_doubtful(text: str, start: int, end: int) -> bool:
    line_start = max(text.rfind("\n", 0, start) + 1, start - _AROUND)
    line_end = text.find("\n", end, end + _AROUND)
    line = text[line_start : line_end if line_end >= 0 else end + _AROUND]
    before, after = text[max(line_start, start - 24) : start], text[end : end + 24]
    itself = text[start:end]
    if _DATE_LIKE.search(itself) or _LEADING_ZERO.search(itself):
        return True
    return bool(_DOUBTFUL.search(line) or _BEFORE_BAD.search(before) or _AFTER_BAD.match(after))


def _agree(left: Fraction, left_text: str, right: Fraction, right_text: str, *, loose: bool) -> bool:
    if left == right:
        return True
    digits = _decimals(right_text)
    if digits is None:
        return False
    step = Fraction(1, 10**digits)
    error = abs(left - right)
    inexact = (left / step).denominator != 1
    if loose or digits or (inexact and "/" in left_text.replace("÷", "/")):
        # rounded or cut off at the last digit written; binary fractions as computers print them
        return error < step or error <= abs(left) * Fraction(1, 10**12) or (loose and error * 20 <= abs(left))
    return False


def _decimals(text: str) -> int | None:
    """Digits behind the point of a plain number; None for an expression."""
    found = re.fullmatch(rf"\(*[+\-−]?\s*({_NUM})\)*", text.strip())
    return None if found is None else len(found[1].partition(".")[2])


def evaluate(text: str) -> Fraction | None:
    """The exact value of an expression; None when it has none, or a huge one.

    Usual precedence; `^` and `**` bind to the right. Nothing is ever executed.
    """
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            return None
        tokens.append(found[1] or found[2])
        at = found.end()
    reader = _Arithmetic(tokens)
    try:
        value = reader.sum()
        return value if reader.is_done else None
    except (ArithmeticError, IndexError, ValueError, RecursionError):
        return None


class _Arithmetic:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0

    @property
    def is_done(self) -> bool:
        return self._at == len(self._tokens)

    def _next(self, *wanted: str) -> str | None:
        if not self.is_done and self._tokens[self._at] in wanted:
            self._at += 1
            return self._tokens[self._at - 1]
        return None

    def sum(self) -> Fraction:
        value = self._product()
        while (sign := self._next("+", "-", "−")) is not None:
            other = self._product()
            value = value + other if sign == "+" else value - other
        return _bounded(value)

    def _product(self) -> Fraction:
        value = self._power()
        while (sign := self._next("*", "/", "×", "÷", "·")) is not None:
            other = self._power()
            value = value / other if sign in "/÷" else value * other
        return _bounded(value)

    def _power(self) -> Fraction:
        if self._next("-", "−"):
            return -self._power()
        if self._next("+"):
            return self._power()
        base = self._atom()
        if self._next("^", "**") is None:
            return base
        exponent = self._power()
        if exponent.denominator != 1 or abs(exponent) > 512 or base.numerator.bit_length() * abs(exponent) > _MOST_BITS:
            raise ValueError
        return base ** int(exponent)

    def _atom(self) -> Fraction:
        if self._next("("):
            value = self.sum()
            if self._next(")") is None:
                raise ValueError
            return value
        token = self._tokens[self._at]
        self._at += 1
        return Fraction(token.replace(",", ""))


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > 2 * _MOST_BITS:
        raise ValueError
    return value


def _shown(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    text = f"{float(value):.10g}"
    return text if Fraction(text) == value else f"about {text}"


def _tables(text: str) -> Iterator[Finding]:
    """Columns of numbers over a row called Total."""
    rows: list[tuple[int, list[str]]] = []
    at = 0
    for line in [*text.split("\n"), ""]:
        found = _TABLE_ROW.match(line)
        if found is not None and not _RULE_ROW.match(line):
            rows.append((at, [cell.strip() for cell in found[1].split("|")]))
        elif found is None:
            yield from _table(rows)
            rows = []
        at += len(line) + 1


def _table(rows: list[tuple[int, list[str]]]) -> Iterator[Finding]:
    if len(rows) < 4 or not re.fullmatch(r"(?i)\W*(?:grand )?(?:total|sum)\W*", rows[-1][1][0]):
        return
    header, body, (at, last) = rows[0][1], [cells for _, cells in rows[1:-1]], rows[-1]
    for column in range(1, len(last)):
        if column >= len(header) or _NO_SUM.search(header[column]) or any(len(cells) != len(last) for cells in body):
            continue
        cells = [_CELL.fullmatch(cells[column]) for cells in [*body, last]]
        if any(cell is None for cell in cells):
            continue
        numbers = [cell[1].replace(",", "") for cell in cells if cell is not None]
        value = sum((Fraction(number) for number in numbers[:-1]), Fraction(0))
        slack = Fraction(len(body), 2 * 10 ** max(len(number.partition(".")[2]) for number in numbers))
        off = abs(value - Fraction(numbers[-1]))
        if off > (slack if any("." in number for number in numbers) else 0):
            says = f"the column {header[column]!r} adds up to {_shown(value)}, not {numbers[-1]}"
            yield failed("sum_wrong", says, span=(at, at), candidate=_shown(value))
