"""S-ARITH: exact arithmetic, with a column-wise reasoning trace of known minimal length, or without
reasoning.

The trace first writes the operands backwards (units first), so that columns can be read in order; each line
is one column with its carry or borrow, and the result so far after the bar. The carry is the tens digit of
the line before. `d`, the number of trace lines, is the exact minimal derivation length and the stratum
results are reported by. Source: evaluation specification, section 4.6. Linear systems, modular chains, and
questions without an answer or with too much data are `arith_limits`.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import count
from typing import Any

from rorqual.data.tasks.answers import IDK, final_answer, grade_code_value
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Mode,
    Piece,
    Split,
    TaskFamily,
    Turn,
    completion,
    maybe_system,
    random_mode,
    render_document,
    split_of,
    turns_to_messages,
)

KINDS = ("add", "subtract", "multiply", "chain")
TRAIN_DIGITS = 5  # trained lengths; test items go two digits further, reported as their own strata
_ASKS = (
    "What is {e}?",
    "{e} = ?",
    "Calculate {e}.",
    "Compute {e}.",
    "How much is {e}?",
    "{e}",
    "What's {e}?",
    "What does {e} make?",
)


@dataclass(frozen=True)
class Problem:
    """An expression, its value, and the shortest derivation as lines."""

    kind: str
    expression: str
    value: int
    lines: tuple[str, ...]
    digits: int

    @property
    def d(self) -> int:
        """Number of derivation steps (columns, or operations of a chain)."""
        return len(self.lines) - (0 if self.kind == "chain" else 1)

    @property
    def reasoning(self) -> str:
        return "\n".join(self.lines)

    @property
    def key(self) -> str:
        """What the split is decided by: the same for both orders of a sum or product."""
        parts = self.expression.split()
        if len(parts) == 3 and parts[1] in "+*":
            parts = [min(parts[0], parts[2]), parts[1], max(parts[0], parts[2])]
        return "".join(parts)


def solve_add(a: int, b: int) -> Problem:
    """a + b, column by column from the units."""
    width = max(len(str(a)), len(str(b)))
    top, bottom = _backwards(a, width), _backwards(b, width)
    lines, done, carry = [f"{top}+{bottom}"], "", 0
    for x, y in zip(top, bottom, strict=True):
        column = int(x) + int(y) + carry
        step = f"{x}+{y}+{carry}={column}"
        carry, done = column // 10, str(column % 10) + done
        lines.append(f"{step}|{str(carry) if carry and len(lines) == width else ''}{done}")
    return Problem("add", f"{a} + {b}", a + b, tuple(lines), width)


def solve_subtract(a: int, b: int) -> Problem:
    """a - b by columns with borrows; when b is larger they change places and the sign is put back."""
    big, small = max(a, b), min(a, b)
    width = len(str(big))
    top, bottom = _backwards(big, width), _backwards(small, width)
    lines, done, borrow = [f"{top}-{bottom}" if a >= b else f"-({top}-{bottom})"], "", 0
    for x, y in zip(top, bottom, strict=True):
        lent = 10 if int(x) < int(y) + borrow else 0
        column = int(x) + lent - int(y) - borrow
        done = str(column) + done
        lines.append(f"{int(x) + lent}-{y}-{borrow}={column}|{done}")
        borrow = lent // 10
    return Problem("subtract", f"{a} - {b}", a - b, tuple(lines), width)


def solve_multiply(a: int, b: int) -> Problem:
    """a * b for a one-digit b, column by column."""
    width = len(str(a))
    top = _backwards(a, width)
    lines, done, carry = [f"{top}*{b}"], "", 0
    for x in top:
        column = int(x) * b + carry
        step = f"{x}*{b}+{carry}={column}"
        carry, done = column // 10, str(column % 10) + done
        lines.append(f"{step}|{str(carry) if carry and len(lines) == width else ''}{done}")
    return Problem("multiply", f"{a} * {b}", a * b, tuple(lines), width)


def solve_chain(numbers: list[int], signs: list[str]) -> Problem:
    """Additions and subtractions of small numbers from left to right."""
    total, expression, lines = numbers[0], str(numbers[0]), []
    for sign, number in zip(signs, numbers[1:], strict=True):
        after = total + number if sign == "+" else total - number
        lines.append(f"{total}{sign}{number}={after}")
        expression += f" {sign} {number}"
        total = after
    return Problem("chain", expression, total, tuple(lines), max(len(str(n)) for n in numbers))


def _backwards(number: int, width: int) -> str:
    return str(number).rjust(width, "0")[::-1]


class ArithFamily(TaskFamily):
    """Additions, subtractions, products with one digit, and chains."""

    name = "arith"
    version = "1"
    partition = "arith"  # families that ask the same questions share the partition of expressions

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "kinds": KINDS, "train_digits": TRAIN_DIGITS}

    def draw(self, rng: random.Random, split: Split, *, kind: str | None = None, digits: int | None = None) -> Problem:
        """A problem of `split`. `digits` is the longer operand's length, or the number of operations of a
        chain.
        """
        for attempt in count():
            chosen = kind or rng.choices(KINDS, (4, 3, 2, 2))[0]
            size = digits or rng.choices(range(1, TRAIN_DIGITS + 1), (3, 5, 5, 3, 2))[0]
            size += attempt // 300  # a split may hold no problem that small
            problem = draw_problem(rng, chosen, size)
            if split_of(self.partition, problem.key) == split:
                return problem
        raise AssertionError("unreachable")

    def turn(self, rng: random.Random, problem: Problem) -> Turn:
        """The problem as a request with its trace and answer; the spacing of the expression varies."""
        e = problem.expression if rng.random() < 0.7 else problem.expression.replace(" ", "")
        if problem.kind == "multiply" and rng.random() < 0.3:
            e = e.replace("*", rng.choice(("x", "times")) if " " in e else "x")
        return Turn(rng.choice(_ASKS).format(e=e), problem.reasoning, str(problem.value))

    def train_turn(self, rng: random.Random) -> Turn:
        return self.turn(rng, self.draw(rng, "train"))

    def train_document(self, rng: random.Random) -> list[Piece]:
        """One to three problems in one conversation; without reasoning they are kept short enough to be
        done at once.
        """
        mode: Mode = "thinking" if rng.random() < 0.7 else "chat"
        if mode == "thinking":
            turns = [self.train_turn(rng)]
        else:
            sizes = [rng.choice((1, 1, 2, 2, 2, 3)) for _ in range(rng.choice((1, 2, 3)))]
            turns = [self.turn(rng, self.draw(rng, "train", digits=size)) for size in sizes]
        return render_document(turns_to_messages(turns, mode=mode, system=maybe_system(rng)), mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode = random_mode(rng)
        top = TRAIN_DIGITS if split == "train" else TRAIN_DIGITS + 2
        kind, size = KINDS[index % len(KINDS)], index // len(KINDS) % top + 1
        problem = self.draw(rng, split, kind=kind, digits=size)
        turn = self.turn(rng, problem)
        stratum = {
            "kind": kind,
            "digits": problem.digits,
            "d": problem.d,
            "beyond_training": size > TRAIN_DIGITS,
            "mode": mode,
        }
        meta = {"value": problem.value, "expression": problem.expression, "reasoning": turn.reasoning}
        return self.chat_item(rng, split, index, mode, turn, stratum, meta)

    def grade(self, item: Item, output_text: str) -> Grade:
        """One number equal to the value; the asked expression may be repeated before an equals sign."""
        answer = final_answer(output_text, item.thinking_mode)
        left, equals, right = answer.partition("=")
        if equals and _bare(left) == _bare(item.meta["expression"]):
            answer = right
        return grade_code_value(answer, str(item.meta["value"]))

    def adversary(self, item: Item) -> list[str]:
        value, expression = item.meta["value"], item.meta["expression"]
        mode = item.thinking_mode

        def say(text: str) -> str:
            return completion(mode, item.meta["reasoning"], text)

        outputs = [
            say(text)
            for text in (
                "",
                str(item.messages[-1]["content"]),
                IDK,
                str(value + 1),
                str(-value) if value else "-1",
                f"{value}0",
                f"1{value}",
                f"{value}.5",
                f"{value}, {value + 1}",
                f"{value} or {value + 2}",
                f"not {value}",
                f"{expression} = {value + 1}",
                f"{expression} = {value} = {value + 1}",
                f"1 + 1 = {value}",
                f"{value}a",
            )
        ]
        if mode == "thinking":
            outputs += [
                f"{item.meta['reasoning']}\n{value}",
                f"{item.meta['reasoning']}\nAnswer: {value}</think>",
            ]
        return outputs


def _bare(expression: str) -> str:
    return re.sub(r"\s|What|is|'s", "", expression).replace("times", "*").replace("x", "*").replace("×", "*")


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def draw_problem(rng: random.Random, kind: str, size: int) -> Problem:
    """A random problem of a kind; `size` as in `ArithFamily.draw`."""
    if kind == "chain":
        numbers = [rng.randrange(1, 20) for _ in range(size + 1)]
        signs: list[str] = []
        total = numbers[0]
        for number in numbers[1:]:
            sign = "+" if total < number or (total < 80 and rng.random() < 0.6) else "-"
            total += number if sign == "+" else -number
            signs.append(sign)
        return solve_chain(numbers, signs)
    a, b = _number(rng, size), _number(rng, rng.randint(1, size))
    if kind == "multiply":
        return solve_multiply(a, rng.randrange(2, 10))
    if kind == "subtract":
        return solve_subtract(*((b, a) if rng.random() < 0.1 else (max(a, b), min(a, b))))
    return solve_add(*((b, a) if rng.random() < 0.5 else (a, b)))
