"""Fill in the middle of short Python functions whose middle is fixed by the docstring and the rest of the
code.

An exact middle is right; another middle is right when the completed function passes the oracle's tests in
the interpreter of `interpreter.py` (nothing is executed). The prompt is DeepSeek's prefix-suffix-middle
form.
"""

from __future__ import annotations

import random
import re
from typing import Any

from rorqual.chat import fim_prompt
from rorqual.chat.markers import EOS
from rorqual.data.tasks.base import Grade, Item, Piece, Split, TaskFamily, correct, wrong
from rorqual.data.tasks.code import draw_spec, grade_by_tests
from rorqual.data.tasks.code_spec import Spec, draw_tests

HOLES = ("expression", "tail", "line", "body", "name")


def cut(rng: random.Random, spec: Spec, hole: str) -> tuple[str, str, str]:
    """(prefix, middle, suffix) of the function of `spec`.

    expression: what is returned. tail: from somewhere within the expression to its end. line: one line of
    the loop form. body: everything after the docstring. name: the function's name in a second function that
    calls it.
    """
    source = spec.source(style="loop" if hole == "line" else "expression", docstring=True)
    if hole == "name":
        call = f"{spec.name}({', '.join(spec.parameters)})"
        follow = f"\n\n\ndef twice({', '.join(spec.parameters)}):\n    return ({call}, {call})\n"
        source += follow
        start = source.index(f"({call}") + 1
        return source[:start], spec.name, source[start + len(spec.name) :]
    body = source.index('."""\n') + len('."""\n')
    end = len(source)
    if hole == "body":
        start = body
    elif hole == "line" and spec.loop is not None:
        lines = source[body:].split("\n")
        at = rng.randrange(1, len(lines))
        start = body + sum(len(line) + 1 for line in lines[:at])
        start += len(lines[at]) - len(lines[at].lstrip())
        end = body + sum(len(line) + 1 for line in lines[: at + 1]) - 1
    else:
        start = source.rindex("return ") + len("return ")
        if hole == "tail":
            start += rng.randrange(1, max(2, len(spec.expression) - 3))
    return source[:start], source[start:end], source[end:] + "\n"


class FimFamily(TaskFamily):
    """Short fill-in items in Python."""

    name = "fim"
    version = "1"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "holes": HOLES}

    def train_document(self, rng: random.Random) -> list[Piece]:
        prefix, middle, suffix = cut(rng, draw_spec(rng, "train"), rng.choice(HOLES))
        return [(fim_prompt(prefix, suffix), False), (middle + EOS, True)]

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        hole = HOLES[index % len(HOLES)]
        spec = draw_spec(rng, split, "list" if hole == "line" else None)
        while hole == "line" and spec.loop is None:
            spec = draw_spec(rng, split, "list")
        prefix, middle, suffix = cut(rng, spec, hole)
        tests, caught, _ = draw_tests(rng, spec)
        return Item(
            family=self.name,
            id=self.item_id(split, index, rng),
            messages=[],
            tools=None,
            thinking_mode="chat",
            gold=middle,
            stratum={"hole": hole, "kind": spec.kind, "middle_chars": len(middle)},
            meta={
                "prefix": prefix,
                "suffix": suffix,
                "name": spec.name,
                "tests": tests,
                "mutants": len(caught),
            },
            prompt=fim_prompt(prefix, suffix),
            split=split,
        )

    def grade(self, item: Item, output_text: str) -> Grade:
        """Right when equal to the middle (trailing white space aside) or when the whole passes the tests."""
        middle = output_text.split(EOS, 1)[0]
        if middle.rstrip() == item.gold.rstrip():
            return correct(middle)
        if item.stratum["hole"] == "name":
            return wrong(middle, f"expected the name {item.gold}")
        if re.search(r"^(def|import|from) ", middle, re.MULTILINE):
            return wrong(middle, "starts another definition instead of filling the gap")
        source = item.meta["prefix"] + middle + item.meta["suffix"]
        return grade_by_tests(source, item, middle)

    def adversary(self, item: Item) -> list[str]:
        gold = item.gold
        return [
            "",
            gold + "9z",
            "9z" + gold,
            gold[:-1] + "$",
            f"{gold} 1 {gold}",
            "None if True else " + gold if item.stratum["hole"] in ("expression", "name") else "1 1",
            item.meta["prefix"] + gold,
            gold + item.meta["suffix"] + "$",
            "import os",
        ]
