"""S-CODE: write a Python function from one sentence, judged by an oracle on inputs that catch near misses.

The answer is a single fenced block. It is never executed: `interpreter.py` evaluates its syntax tree. Code
outside the interpreter's small language gets the grade X (could not be decided). Source: evaluation
specification, section 4.11. Left out for now: running in a sandbox, larger specifications.
"""

from __future__ import annotations

import random
import re
from typing import Any

from rorqual.data.tasks.answers import IDK, final_answer
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Piece,
    Split,
    TaskFamily,
    Turn,
    completion,
    correct,
    maybe_system,
    random_mode,
    render_document,
    split_of,
    turns_to_messages,
    wrong,
)
from rorqual.data.tasks.code_spec import KINDS, Spec, draw_tests, passes
from rorqual.data.tasks.interpreter import Unsupported

_FENCE = re.compile(r"```[a-z]*\n(.*?)\n?```", re.DOTALL)
_ASKS = (
    "Write a Python function {s}. {d}",
    "Write {s} in Python. {d}",
    "Define a function {s}. {d}",
    "Please write the Python function {s}. {d}",
    "Python function {s}: {d}",
)


def draw_spec(rng: random.Random, split: Split, kind: str | None = None) -> Spec:
    """A specification whose sentence belongs to `split` (shared by the code and fill-in families)."""
    while True:
        spec = KINDS[kind or rng.choices(tuple(KINDS), (4, 3, 2))[0]](rng)
        if split_of("code", f"{spec.name} {spec.sentence}") == split:
            return spec


def grade_by_tests(source: str, item: Item, written: str) -> Grade:
    """Grade `written` by whether `source` passes the tests of `item`; X when it needs more than the interpreter."""
    try:
        right, reason = passes(source, item.meta["name"], item.meta["tests"])
    except Unsupported as error:
        return Grade("X", 0.0, written, f"outside the interpreter's language: {error}")
    return correct(written) if right else wrong(written, reason)


def extract_code(answer: str) -> str | None:
    """The only fenced block of `answer`, or the whole text when it is bare code; None when there are
    several.
    """
    blocks = _FENCE.findall(answer)
    if len(blocks) > 1:
        return None
    if blocks:
        return str(blocks[0])
    return answer if answer.lstrip().startswith("def ") else None


class CodeFamily(TaskFamily):
    """Short functions over numbers, lists of integers, and strings."""

    name = "code"
    version = "1"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "kinds": list(KINDS)}

    def turn(self, rng: random.Random, spec: Spec) -> Turn:
        user = rng.choice(_ASKS).format(s=spec.signature, d=spec.sentence)
        source = spec.source()
        plan = f"{spec.name} gives {spec.expression}."
        return Turn(user, plan, f"```python\n{source}\n```")

    def train_turn(self, rng: random.Random) -> Turn:
        return self.turn(rng, draw_spec(rng, "train"))

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        turns = [self.train_turn(rng) for _ in range(rng.choice((1, 1, 2)))]
        return render_document(turns_to_messages(turns, mode=mode, system=maybe_system(rng)), mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode = random_mode(rng)
        spec = draw_spec(rng, split, list(KINDS)[index % len(KINDS)])
        tests, caught, escaped = draw_tests(rng, spec)
        turn = self.turn(rng, spec)
        stratum = {"kind": spec.kind, "function": spec.name, "mode": mode}
        meta = {
            "name": spec.name,
            "tests": tests,
            "mutants": caught,
            "mutation_score": len(caught) / max(1, len(caught) + escaped),
            "reasoning": turn.reasoning,
            "source": spec.source(),
        }
        return self.chat_item(rng, split, index, mode, turn, stratum, meta)

    def grade(self, item: Item, output_text: str) -> Grade:
        """All tests must hold, result types included. X when the code needs more than the interpreter."""
        code = extract_code(final_answer(output_text, item.thinking_mode))
        if code is None:
            return wrong(None, "the answer is not exactly one block of code")
        return grade_by_tests(code, item, code)

    def adversary(self, item: Item) -> list[str]:
        mode, source, name = item.thinking_mode, item.meta["source"], item.meta["name"]
        tests: list[list[Any]] = item.meta["tests"]

        def say(text: str) -> str:
            return completion(mode, item.meta["reasoning"], text)

        head = source.split("\n")[0]
        table = repr(tests[0][1])
        codes = [
            *item.meta["mutants"],
            f"{head}\n    pass",
            f"{head}\n    return {table}" if any(t[1] != tests[0][1] for t in tests) else f"{head}\n    return",
            source.replace(f"def {name}", f"def {name}_two"),
            f"import os\n{source}",
            f"{head}\n    while True:\n        pass",
            f"{head}\n    return {name}({head.split('(')[1][:-2]})",
            source + " +",
            f"{head}\n    return ({source.split('return ')[1]},)",
        ]
        outputs = [say(f"```python\n{code}\n```") for code in codes]
        outputs += [
            say(""),
            say(IDK),
            say(str(item.messages[-1]["content"])),
            say(f"```python\n{source}\n```\nor\n```python\n{source}\n```"),
            say(f"The function is `{source}`"),
        ]
        if mode == "thinking":
            outputs += [f"```python\n{source}\n```", f"```python\n{source}\n```</think>"]
        return outputs
