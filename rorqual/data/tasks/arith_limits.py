"""S-ARITH at its limits: questions without an answer, with data that does not matter, and solvable ones of their form.

Kinds: `missing` (a story in which one amount is never told) and `contradictory` (two equations that exclude each
other) have no answer, and to say so is right; `irrelevant` (the story with all amounts, and things nobody asks about),
`linear` (two equations) and `modular` (a chain of operations, taken modulo a number) have one. `d` is the number of
operations of the shortest derivation. Source: evaluation specification, section 4.6.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from rorqual.data.tasks import words
from rorqual.data.tasks.answers import IDK, MAX_ANSWER_WORDS, final_answer, grade_code_value, is_abstention, normalise
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Piece,
    Split,
    TaskFamily,
    Turn,
    completion,
    random_mode,
    render_document,
    split_of,
    turns_to_messages,
    wrong,
)

KINDS = ("missing", "irrelevant", "contradictory", "linear", "modular")
UNSOLVABLE = ("missing", "contradictory")
STEPS = (1, 2, 4, 8, 16, 32, 64)
TRAIN_STEPS = 8
_DECLINES = re.compile(
    r"(?:\w+ ){0,6}?(?:cannot|can't|can not|could not) be (?:answered|known|told|determined|solved|computed)"
    r"|(?:it |this |that |there |the question |the system |they )?(?:has|have|is|are) no (?:solution|answer)"
    r"|no (?:solution|answer)|(?:there is )?not enough (?:information|data)"
)


@dataclass(frozen=True)
class Riddle:
    """A question with its value (None: there is none), the least derivation, and how many operations that has."""

    kind: str
    text: str
    value: int | None
    lines: tuple[str, ...]
    d: int

    @property
    def turn(self) -> Turn:
        return Turn(self.text, "\n".join(self.lines), IDK if self.value is None else str(self.value))


def draw_riddle(rng: random.Random, kind: str, steps: int) -> Riddle:
    """A riddle of a kind; `steps` is the number of operations of stories and chains."""
    if kind in ("missing", "irrelevant"):
        return _story(rng, kind, steps)
    return _modular(rng, steps) if kind == "modular" else _system(rng, kind)


def _story(rng: random.Random, kind: str, steps: int) -> Riddle:
    """Somebody has things, gets some and gives some away; one amount is missing, or other things are in the way."""
    name = words.invented_word(rng).capitalize()
    thing, other = rng.sample(words.NOUNS, 2)
    total = rng.randrange(5, 40)
    told, lines = [f"{name} has {total} pieces of {thing}."], list[str]()
    lost = rng.randrange(steps) if kind == "missing" else None
    for step in range(steps):
        amount = rng.randrange(1, 20)
        gets = total < amount or rng.random() < 0.5
        verb = f"{name} {'gets' if gets else 'gives away'}"
        if step == lost:
            told.append(f"{verb} some of {thing}.")
            lines.append(f"How many of {thing} is not told.")
            continue
        after = total + amount if gets else total - amount
        told.append(f"{verb} {amount} pieces of {thing}.")
        if lost is None or step < lost:
            lines.append(f"{total}{'+' if gets else '-'}{amount}={after}")
        total = after
        if kind == "irrelevant" and (step == 0 or rng.random() < 0.3):
            told.append(f"{verb} {rng.randrange(1, 20)} pieces of {other}.")
    text = " ".join(told) + f" How many pieces of {thing} does {name} have now?"
    return Riddle(kind, text, None if kind == "missing" else total, tuple(lines), steps)


def _system(rng: random.Random, kind: str) -> Riddle:
    """ax + y = s and bx + y = t with whole numbers; contradictory: the second left side is a multiple of the first."""
    x, y, a = rng.randrange(1, 30), rng.randrange(1, 30), rng.randrange(2, 6)
    s = a * x + y
    if kind == "contradictory":
        n = rng.randrange(2, 5)
        t = n * s + rng.choice((-3, -2, -1, 1, 2, 3))
        lines = (f"{n}*({a}x+y)={n}*{s}={n * s}", f"{n * s} is not {t}.")
        return Riddle(kind, f"{a}x + y = {s} and {n * a}x + {n}y = {t}. What is x?", None, lines, 2)
    b = rng.choice([n for n in range(1, 7) if n != a])
    t = b * x + y
    lines = (f"{a - b}x={s}-{t}={s - t}", f"x={x}")
    first = "x" if b == 1 else f"{b}x"
    return Riddle(kind, f"{a}x + y = {s} and {first} + y = {t}. What is x?", x, lines, 2)


def _modular(rng: random.Random, steps: int) -> Riddle:
    """A number, then additions and products, each taken modulo m."""
    m = rng.randrange(7, 30)
    value = rng.randrange(m)
    told, lines = [f"Start with {value}."], list[str]()
    for _ in range(steps):
        sign, n = rng.choice((("+", rng.randrange(1, m)), ("*", rng.randrange(2, 10))))
        after = (value + n if sign == "+" else value * n) % m
        told.append(f"{'Add' if sign == '+' else 'Multiply by'} {n}.")
        lines.append(f"{value}{sign}{n}={after}")
        value = after
    return Riddle("modular", " ".join(told) + f" What is the result modulo {m}?", value, tuple(lines), steps)


class ArithLimitsFamily(TaskFamily):
    """Riddles that can or cannot be answered, in turns."""

    name = "arith-limits"
    version = "1"
    abstains_in_reasoning = (r"How many of \w+ is not told", r"(?<=\n)-?\d+ is not -?\d+")

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "kinds": KINDS, "steps": STEPS}

    def _draw(self, rng: random.Random, split: Split, kind: str, steps: int) -> Riddle:
        while True:
            riddle = draw_riddle(rng, kind, steps)
            if split_of(self.name, riddle.text) == split:
                return riddle

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode, kind = random_mode(rng), rng.choice(KINDS)
        riddle = self._draw(rng, "train", kind, rng.choice([n for n in STEPS if n <= TRAIN_STEPS]))
        return render_document(turns_to_messages([riddle.turn], mode=mode), mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode, kind = random_mode(rng), KINDS[index % len(KINDS)]
        steps = [n for n in STEPS if split != "train" or n <= TRAIN_STEPS]
        riddle = self._draw(rng, split, kind, steps[index // len(KINDS) % len(steps)])
        stratum = {"kind": kind, "d": riddle.d, "beyond_training": riddle.d > TRAIN_STEPS, "mode": mode}
        meta = {"value": riddle.value, "reasoning": riddle.turn.reasoning}
        return self.chat_item(rng, split, index, mode, riddle.turn, stratum, meta)

    def grade(self, item: Item, output_text: str) -> Grade:
        """The only number, or where there is none, that it cannot be answered: an abstention, with no number in it."""
        answer, value = final_answer(output_text, item.thinking_mode), item.meta["value"]
        if is_abstention(answer) or declines(answer):
            return Grade("A", float(value is None), None, "" if value is None else "declined what can be answered")
        if value is None:
            return wrong(answer, "answered a question that has no answer")
        return grade_code_value(answer.removeprefix("x = ").removeprefix("x="), str(value))

    def adversary(self, item: Item) -> list[str]:
        value = item.meta["value"]

        def say(text: str) -> str:
            return completion(item.thinking_mode, item.meta["reasoning"], text)

        texts = ["", str(item.messages[-1]["content"]), "7 or 8", "x = y", "No.", "It has no solution but 4."]
        if value is None:
            texts += ["0", "12", "Perhaps 12.", f"{IDK} Perhaps 12.", "It is not 12.", "The answer is known."]
        else:
            texts += [
                IDK, "It cannot be answered.", "No solution.", str(value + 1), f"{value}0", f"1{value}", f"{value}.5",
                f"{value} or {value + 1}", f"not {value}", f"{value}, {value + 1}", f"{value}a",
            ]  # fmt: skip
        outputs = [say(text) for text in texts]
        if item.thinking_mode == "thinking":
            outputs.append(f"{item.meta['reasoning']}\n{IDK if value is None else value}")
        return outputs


def declines(answer: str) -> bool:
    """Whether the whole answer says that there is no answer; no number, and no more words than answers may have."""
    text = normalise(answer)
    return bool(_DECLINES.match(text)) and not re.search(r"\d", text) and len(text.split()) <= MAX_ANSWER_WORDS
