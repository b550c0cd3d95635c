"""Column arithmetic as a procedure: traces whose every token can be read off nearby ones, checked and redone.

Each column is written as label, operand digits, and two digits of result, units first: in `B7+6=14` the 4 stands in the
tens' place and the 1 goes over to column C (as a carry, a borrow, or the rest of a division), where it is added without
being written again. `;H9G9` at the end names the result by labels from the top, and the answer is that line without
them. Steps are short, so that a network that sees 64 tokens sees the whole procedure.

A check runs the inverse operation on the result and looks the operands up anew: `A9-1=08:8,` says that the inverse
gives 8 and that the operand has 8; `!` in place of the comma says that they differ, and the procedure begins again.
Source: evaluation specification 4.6 and 9; training specification 17.5.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LABELS = "ABCDEFGHI"
AGREE, DIFFER = ",", "!"
AGAIN = "\nAgain:\n"
CHECK = "\nCheck:\n"


@dataclass(frozen=True)
class Slip:
    """A wrong digit: in column `column` of a pass, `by` is added to an operand's digit, to the column's sum, or to what
    goes over. Used for traces that a model learns to notice, never for those it learns to write.
    """

    column: int
    part: str
    by: int


PARTS = ("top", "sum", "over")


@dataclass(frozen=True)
class Pass:
    """One run through the columns: its text, the result's digits units first, and what went over at the end."""

    text: str
    digits: tuple[int, ...]
    over: int

    @property
    def value(self) -> int:
        return int("".join(map(str, reversed(self.digits))))

    @property
    def result_line(self) -> str:
        """`;C1B0A4`: the result from its first digit that is not 0."""
        shown = len(str(self.value))
        return ";" + "".join(f"{LABELS[i]}{self.digits[i]}" for i in reversed(range(shown)))


def add_columns(a: int, b: int, slip: Slip | None = None) -> Pass:
    """a + b; a last carry is a column of its own."""
    return _columns(a, b, "+", slip)


def subtract_columns(a: int, b: int, slip: Slip | None = None) -> Pass:
    """a - b; what goes over at the end is 1 when b is larger."""
    return _columns(a, b, "-", slip)


def multiply_columns(a: int, b: int, slip: Slip | None = None) -> Pass:
    """a * b for b of one digit."""
    return _columns(a, b, "*", slip)


def _columns(a: int, b: int, sign: str, slip: Slip | None) -> Pass:
    width = max(len(str(a)), len(str(b)) if sign != "*" else 1)
    top, bottom = _units_first(a, width), [b] * width if sign == "*" else _units_first(b, width)
    steps, digits, over = [], [], 0
    for i, (x, y) in enumerate(zip(top, bottom, strict=True)):
        here = slip if slip is not None and slip.column == i else None
        if here is not None and here.part == "top":
            x = (x + here.by) % 10
        column = x * y + over if sign == "*" else x + y + over if sign == "+" else x - y - over
        over, digit = (-(column // 10), column % 10) if sign == "-" else (column // 10, column % 10)
        if here is not None and here.part == "sum":
            digit = (digit + here.by) % 10
        if here is not None and here.part == "over":
            over = 1 - over if sign != "*" else (over + here.by) % 9
        steps.append(f"{LABELS[i]}{x}{sign}{y}={over}{digit}")
        digits.append(digit)
    if sign != "-" and over:
        digits.append(over)
        steps.append(f"{LABELS[width]}{over}")
    return Pass("".join(steps), tuple(digits), over)


def check_columns(result: int, operand: int, sign: str, expected: int) -> tuple[str, bool]:
    """The inverse of `sign` on `result`, each column beside `expected`'s; ends at the first that differs.

    A product is divided from its first digit down, sums and differences go from the units up.
    """
    if sign == "*":
        return _check_product(result, operand, expected)
    width = max(len(str(n)) for n in (result, operand, expected))
    inverse = "-" if sign == "+" else "+"
    rows = zip(*(_units_first(n, width) for n in (result, operand, expected)), strict=True)
    out, over = "", 0
    for i, (x, y, want) in enumerate(rows):
        column = x - y - over if inverse == "-" else x + y + over
        over, digit = abs(column // 10), column % 10
        out += f"{LABELS[i]}{x}{inverse}{y}={over}{digit}:{want}{AGREE if digit == want else DIFFER}"
        if digit != want:
            return out, False
    if over:
        return out + DIFFER, False
    return out, True


def _check_product(result: int, factor: int, expected: int) -> tuple[str, bool]:
    width = max(len(str(result)), len(str(expected)))
    out, rest = "", 0
    for i in reversed(range(width)):
        x, want = _units_first(result, width)[i], _units_first(expected, width)[i]
        quotient, rest_after = divmod(rest * 10 + x, factor)
        out += f"{LABELS[i]}{rest}{x}/{factor}={rest_after}{quotient}:{want}{AGREE if quotient == want else DIFFER}"
        rest = rest_after
        if quotient != want:
            return out, False
    if rest:
        return out + DIFFER, False
    return out, True


def draw_slip(rng: random.Random, width: int) -> Slip:
    """A random slip for numbers of `width` digits."""
    return Slip(rng.randrange(width), rng.choice(PARTS), rng.randrange(1, 9))


def _units_first(number: int, width: int) -> list[int]:
    return [int(ch) for ch in reversed(str(number).rjust(width, "0"))]
