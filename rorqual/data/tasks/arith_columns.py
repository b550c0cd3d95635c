"""S-ARITH with effort: the same questions as `arith`, operands of up to 8 digits, answered at once, by a column
procedure (high), or by the procedure with a check and, where the check fails, once more (max).

The traces are those of `columns.py`. Training documents of effort max hold passes with a slip in them, which carry no
loss: the model learns to notice a slip and to begin again, not to make one. Questions are drawn and split as those of
`arith`, so no test item of either is trained on by the other. Products have one factor of one digit.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import count
from typing import Any

from rorqual.chat import encode_messages
from rorqual.chat.markers import EOS, THINK_END
from rorqual.data.tasks import columns
from rorqual.data.tasks.arith import KINDS, ArithFamily, Problem, draw_problem
from rorqual.data.tasks.base import Item, Mode, Piece, Split, completion, maybe_system, split_of
from rorqual.data.tasks.columns import AGAIN, CHECK, LABELS, Slip

MAX_DIGITS = 8
EFFORTS = ("none", "high", "max")
_KIND_WEIGHTS = (4, 4, 4, 4)
_SIZE_WEIGHTS = (1, 1, 2, 2, 3, 3, 4, 4)
_NUMBERS = re.compile(r"\d+")
SWAP = "\nSwap:\n"


@dataclass(frozen=True)
class Trace:
    """A reasoning in parts: what went wrong first (empty without a slip), and what is right."""

    slipped: str
    right: str

    @property
    def text(self) -> str:
        return self.slipped + self.right


class ColumnArithFamily(ArithFamily):
    """Arithmetic by columns at three efforts.

    long_share: share of the high-effort training documents that check themselves as those of max do; what length
    training starts from.
    """

    name = "arith-columns"
    version = "1"
    top_digits = MAX_DIGITS

    def __init__(self, *, name: str = "arith-columns", long_share: float = 0.0) -> None:
        self.name = name
        self.long_share = long_share

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "train_digits": MAX_DIGITS, "efforts": EFFORTS, "long_share": self.long_share}

    def draw(self, rng: random.Random, split: Split, *, kind: str | None = None, digits: int | None = None) -> Problem:
        """A problem of `split`, long ones more often; see `ArithFamily.draw`."""
        for attempt in count():
            chosen = kind or rng.choices(KINDS, _KIND_WEIGHTS)[0]
            size = digits or rng.choices(range(1, MAX_DIGITS + 1), _SIZE_WEIGHTS)[0]
            problem = draw_problem(rng, chosen, min(MAX_DIGITS, size + attempt // 300))
            if split_of(self.partition, problem.key) == split:
                return problem
        raise AssertionError("unreachable")

    def train_document(self, rng: random.Random) -> list[Piece]:
        """One question at one effort, the prompt without loss, and a slipped pass without loss too."""
        effort = rng.choices(EFFORTS, (10, 40, 50))[0]
        problem = self.draw(rng, "train")
        messages: list[dict[str, Any]] = []
        if (system := maybe_system(rng)) is not None:
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": self.turn(rng, problem).user})
        mode, word = _mode_of(effort)
        head = encode_messages(messages, thinking_mode=mode, reasoning_effort=word, add_default_bos_token=False)
        if effort == "none":
            return [(head, False), (f"{problem.value}{EOS}", True)]
        checks = effort == "max" or rng.random() < self.long_share
        made = trace(problem, checks=checks, slip=slip_for(rng, problem) if checks and rng.random() < 0.35 else None)
        pieces = [(head, False), (made.slipped, False), (f"{made.right}{THINK_END}{problem.value}{EOS}", True)]
        return [piece for piece in pieces if piece[0]]

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        """Items walk through efforts, kinds and lengths; one question is asked at each of the three efforts in turn."""
        effort = EFFORTS[index % len(EFFORTS)]
        step = index // len(EFFORTS)
        problem = self.draw(rng, split, kind=KINDS[step % len(KINDS)], digits=step // len(KINDS) % MAX_DIGITS + 1)
        return self.item(rng, split, index, problem, effort)

    def item(self, rng: random.Random, split: Split, index: int, problem: Problem, effort: str) -> Item:
        """The item that asks for `problem` at `effort`."""
        mode, word = _mode_of(effort)
        reasoning = "" if effort == "none" else trace(problem, checks=effort == "max").text
        stratum = {
            "kind": problem.kind,
            "digits": problem.digits,
            "d": problem.d,
            "beyond_training": False,
            "mode": mode,
            "effort": effort,
        }
        return Item(
            family=self.name,
            id=self.item_id(split, index, rng),
            messages=[{"role": "user", "content": self.turn(rng, problem).user}],
            tools=None,
            thinking_mode=mode,
            gold=completion(mode, reasoning, str(problem.value)),
            stratum=stratum,
            meta={"value": problem.value, "expression": problem.expression, "reasoning": reasoning},
            split=split,
            effort=word,
        )


def _mode_of(effort: str) -> tuple[Mode, str | None]:
    """Thinking mode and effort word of the chat format."""
    return ("chat", None) if effort == "none" else ("thinking", "max" if effort == "max" else None)


def trace(problem: Problem, *, checks: bool, slip: Slip | None = None) -> Trace:
    """The procedure for `problem`; with `slip` (and `checks`) a pass with it comes first and is found out.

    A slip that changes nothing of the result is left out.
    """
    right = _solution(problem, None)
    if not checks:
        return Trace("", right)
    right += CHECK + _check(problem, problem.value)[0]
    if slip is None:
        return Trace("", right)
    value = _value(problem, slip)
    found, agrees = _check(problem, value)
    if agrees or value < 0 <= problem.value:
        return Trace("", right)
    # The verdict and what follows from it are learned; the slip before them is not.
    return Trace(f"{_solution(problem, slip)}{CHECK}{found[: -len(columns.DIFFER)]}", columns.DIFFER + AGAIN + right)


def slip_for(rng: random.Random, problem: Problem) -> Slip:
    """A random slip that fits the problem."""
    width = len(_NUMBERS.findall(problem.expression)) - 1 if problem.kind == "chain" else problem.digits
    return columns.draw_slip(rng, width)


_RUN = {"add": columns.add_columns, "subtract": columns.subtract_columns, "multiply": columns.multiply_columns}
_SIGN = {"add": "+", "subtract": "-", "multiply": "*"}


def _solution(problem: Problem, slip: Slip | None) -> str:
    if problem.kind == "chain":
        return _chain(problem, slip)[0]
    a, b = map(int, _NUMBERS.findall(problem.expression))
    if problem.kind == "subtract" and b > a:
        run = columns.subtract_columns(b, a, slip)
        return columns.subtract_columns(a, b).text + SWAP + run.text + run.result_line.replace(";", ";-", 1)
    run = _RUN[problem.kind](a, b, slip)
    return run.text + run.result_line


def _value(problem: Problem, slip: Slip) -> int:
    """What the procedure with `slip` ends with."""
    if problem.kind == "chain":
        return _chain(problem, slip)[1]
    a, b = map(int, _NUMBERS.findall(problem.expression))
    if problem.kind == "subtract" and b > a:
        return -columns.subtract_columns(b, a, slip).value
    return _RUN[problem.kind](a, b, slip).value


def _check(problem: Problem, value: int) -> tuple[str, bool]:
    if problem.kind == "chain":
        return _check_chain(problem, value)
    a, b = map(int, _NUMBERS.findall(problem.expression))
    if problem.kind == "subtract" and b > a:
        a, b = b, a
    return columns.check_columns(abs(value), b, _SIGN[problem.kind], a)


def _operations(problem: Problem) -> tuple[int, list[tuple[str, int]]]:
    first, *rest = problem.expression.split()
    return int(first), [(sign, int(number)) for sign, number in zip(rest[::2], rest[1::2], strict=True)]


def _chain(problem: Problem, slip: Slip | None) -> tuple[str, int]:
    """`A5+12=17B17-3=14;14`: operations in order, each with its label."""
    total, operations = _operations(problem)
    out = ""
    for i, (sign, number) in enumerate(operations):
        after = total + number if sign == "+" else total - number
        if slip is not None and slip.column == i:
            after += slip.by
        out += f"{LABELS[i]}{total}{sign}{number}={after}"
        total = after
    return f"{out};{total}", total


def _check_chain(problem: Problem, value: int) -> tuple[str, bool]:
    """Back from the result to the first number."""
    first, operations = _operations(problem)
    out, total = "", value
    for i, (sign, number) in reversed(list(enumerate(operations))):
        before = total - number if sign == "+" else total + number
        out += f"{LABELS[i]}{total}{'-' if sign == '+' else '+'}{number}={before}"
        total = before
    return f"{out}:{first}{columns.AGREE if total == first else columns.DIFFER}", total == first
