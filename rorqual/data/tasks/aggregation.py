"""S-AGG: answers that no single line holds: frequencies, counts, differences of lists, sums of scattered rows.

Source: evaluation specification, section 4.5. Grading is exact, numbers with tolerance 0.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rorqual.data.tasks import words
from rorqual.data.tasks.answers import (
    IDK,
    candidates_in,
    final_answer,
    grade_closed_set,
    grade_code_value,
    is_abstention,
    is_hedged,
)
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
from rorqual.data.tasks.needle import estimate_tokens

KINDS = ("most-frequent", "count", "difference", "sum")
LENGTHS = (128, 256, 512)
MAX_WORDS = 60


@dataclass(frozen=True)
class Problem:
    """Lines to scatter, the question, and the value: a word, a number as text, or a list of words."""

    lines: tuple[str, ...]
    question: str
    answer: str
    value: str | list[str]
    reasoning: str
    candidates: tuple[str, ...] = ()


class AggregationFamily(TaskFamily):
    """Questions about a whole text."""

    name = "aggregation"
    version = "1"

    def __init__(
        self, *, lengths: tuple[int, ...] = LENGTHS, count_tokens: Callable[[str], int] = estimate_tokens
    ) -> None:
        self.lengths, self.count_tokens = lengths, count_tokens

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "kinds": KINDS, "lengths": self.lengths}

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        length = rng.choice([n for n in self.lengths if n <= 320] or self.lengths[:1])
        turn, _ = self.draw(rng, "train", rng.choice(KINDS), length)
        return render_document(turns_to_messages([turn], mode=mode, system=maybe_system(rng)), mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode, kind = random_mode(rng), KINDS[index % len(KINDS)]
        length = self.lengths[index // len(KINDS) % len(self.lengths)]
        turn, problem = self.draw(rng, split, kind, length)
        stratum = {"kind": kind, "length": length, "lines": len(problem.lines), "mode": mode}
        meta = {"value": problem.value, "candidates": list(problem.candidates), "reasoning": turn.reasoning}
        return self.chat_item(rng, split, index, mode, turn, stratum, meta)

    def draw(self, rng: random.Random, split: Split, kind: str, length: int) -> tuple[Turn, Problem]:
        """A text of about `length` tokens with its question: half of it is what the question is about."""
        problem = _MAKERS[kind](rng, _tag(rng, split), max(6, length // 24))
        used = self.count_tokens("\n".join(problem.lines))
        lines = list(problem.lines)
        while used < length:
            line = " ".join(rng.choices(words.FILLER, k=rng.randint(6, 12)))
            lines.insert(rng.randint(0, len(lines)), line)
            used += self.count_tokens(line)
        text = "\n".join(lines)
        return Turn(f"{text}\n\n{problem.question}", problem.reasoning, problem.answer), problem

    def grade(self, item: Item, output_text: str) -> Grade:
        """The exact number, the one word, or the exact set of words in any order; P for a part of a set."""
        answer, value = final_answer(output_text, item.thinking_mode), item.meta["value"]
        if isinstance(value, list):
            return _grade_set(answer, value, item.meta["candidates"])
        if item.stratum["kind"] == "most-frequent":
            return grade_closed_set(answer, value, item.meta["candidates"])
        return grade_code_value(answer, value)

    def adversary(self, item: Item) -> list[str]:
        value, mode = item.meta["value"], item.thinking_mode

        def say(text: str) -> str:
            return completion(mode, item.meta["reasoning"], text)

        outputs = [
            say(""),
            say(IDK),
            say(str(item.messages[-1]["content"]).rsplit("\n", 1)[-1]),
            say(str(item.messages[-1]["content"])),
        ]
        if isinstance(value, list):
            others = [c for c in item.meta["candidates"] if c not in value]
            outputs += [say(value[0]), say(", ".join([*value, others[0]])), say("Not " + ", ".join(value))]
            outputs += [say(" or ".join(value)), say(", ".join(others[:2]))]
        elif item.stratum["kind"] == "most-frequent":
            others = [c for c in item.meta["candidates"] if c != value]
            outputs += [
                say(others[0]),
                say(f"{value} or {others[0]}"),
                say(f"{value}, {others[0]}"),
                say(f"not {value}"),
            ]
        else:
            number = int(value)
            outputs += [say(str(number + 1)), say(str(number - 1)), say(f"{value}0"), say(f"{value} or {number + 1}")]
            outputs += [say(f"It is not {value}."), say(f"{value}.5")]
        said = ", ".join(value) if isinstance(value, list) else value
        return outputs + ([f"It is {said}"] if mode == "thinking" else [])


def _grade_set(answer: str, value: list[str], candidates: list[str]) -> Grade:
    if is_abstention(answer, candidates):
        return Grade("A", 0.0, None, "abstained on a known answer")
    found = candidates_in(answer, candidates)
    if len(answer.split()) > MAX_WORDS:
        return wrong(sorted(found), f"longer than {MAX_WORDS} words")
    if is_hedged(answer):
        return wrong(sorted(found), "hedged or negated")
    if found == set(value):
        return correct(sorted(found))
    if found and found < set(value):
        return Grade("P", len(found) / len(value) / 2, sorted(found), f"{len(found)} of {len(value)}")
    return wrong(sorted(found), f"expected {sorted(value)}")


def _tag(rng: random.Random, split: Split) -> str:
    """A name for what is counted: its hash decides the split."""
    while True:
        tag = words.invented_word(rng)
        if split_of("aggregation", tag) == split:
            return tag


def _most_frequent(rng: random.Random, tag: str, count: int) -> Problem:
    """A word planted more often than any other."""
    kinds = rng.sample(words.NOUNS, min(6, max(3, count // 3)))
    most = max(3, count // 3)
    drawn = [kinds[0]] * most
    others = kinds[1:]
    while len(drawn) < count:
        usable = [w for w in others if drawn.count(w) < most - 1]
        if not usable:
            break
        drawn.append(rng.choice(usable))
    rng.shuffle(drawn)
    lines = tuple(f"{tag.capitalize()} bought a {word}." for word in drawn)
    table = Counter(drawn)
    counted = ", ".join(f"{word} {number}" for word, number in table.most_common())
    question = f"What did {tag.capitalize()} buy most often?"
    answer = f"{tag.capitalize()} bought a {kinds[0]} most often."
    return Problem(lines, question, answer, kinds[0], counted, tuple(sorted(table)))


def _count(rng: random.Random, tag: str, count: int) -> Problem:
    """How many events carry a tag, among others that do not."""
    colour, *other = rng.sample(words.COLOURS, 4)
    hits = rng.randrange(2, max(3, count - 2))
    drawn = [colour] * hits + [rng.choice(other) for _ in range(count - hits)]
    rng.shuffle(drawn)
    lines = tuple(f"{tag.capitalize()} saw a {c} {rng.choice(words.NOUNS)}." for c in drawn)
    question = f"How many {colour} things did {tag.capitalize()} see? Answer with a number."
    running = " ".join(str(i + 1) for i in range(hits))
    return Problem(lines, question, f"{tag.capitalize()} saw {hits}.", str(hits), f"{colour}: {running}.")


def _difference(rng: random.Random, tag: str, count: int) -> Problem:
    """What stands in the first list and not in the second."""
    things = rng.sample(words.NOUNS, min(count, 24))
    missing = sorted(rng.sample(things, rng.randint(2, 4)))
    first = [f"{tag.capitalize()} packed the {thing}." for thing in things]
    second = [f"{tag.capitalize()} unpacked the {thing}." for thing in things if thing not in missing]
    rng.shuffle(first)
    rng.shuffle(second)
    question = f"What did {tag.capitalize()} pack but leave in the bag? Name all."
    listed = ", ".join(missing[:-1]) + " and " + missing[-1]
    reasoning = f"Packed and never unpacked: {listed}."
    return Problem((*first, *second), question, f"It is {listed}.", missing, reasoning, tuple(sorted(things)))


def _sum(rng: random.Random, tag: str, count: int) -> Problem:
    """The sum of the rows of one owner."""
    other = words.invented_word(rng)
    owners = [tag] * rng.randrange(2, max(3, count // 2)) + [other] * (count // 3 + 1)
    rng.shuffle(owners)
    rows = [(owner, rng.choice(words.NOUNS), rng.randrange(1, 100)) for owner in owners]
    lines = tuple(f"{owner.capitalize()} paid {price} for the {thing}." for owner, thing, price in rows)
    prices = [price for owner, _, price in rows if owner == tag]
    total, steps = 0, []
    for price in prices:
        total += price
        steps.append(str(total))
    question = f"How much did {tag.capitalize()} pay in all? Answer with a number."
    reasoning = f"{' + '.join(map(str, prices))}: {', '.join(steps)}."
    return Problem(lines, question, f"{tag.capitalize()} paid {total}.", str(total), reasoning)


_MAKERS: dict[str, Callable[[random.Random, str, int], Problem]] = {
    "most-frequent": _most_frequent,
    "count": _count,
    "difference": _difference,
    "sum": _sum,
}
