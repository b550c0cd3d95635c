"""S-HOP: several steps through a long text: chains of variables, pointers, who holds what, and orders of dates.

The lines of a question's chain stand adjacent, spread over the text, or in reversed order, among decoy chains and
filler. A step too few or too many leads to a value that exists, so near misses are told from right answers. Source:
evaluation specification, section 4.3.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rorqual.data.tasks import words
from rorqual.data.tasks.answers import IDK, final_answer, grade_closed_set, grade_code_value
from rorqual.data.tasks.base import (
    Grade,
    Item,
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
from rorqual.data.tasks.needle import estimate_tokens

KINDS = ("variables", "pointers", "moves", "dates")
SPREADS = ("adjacent", "spread", "reversed")
HOPS = (1, 2, 3, 4, 6, 8)
LENGTHS = (128, 256, 512)
DECOYS = 2


@dataclass(frozen=True)
class Trail:
    """The lines of one chain in order, its question, its value, and values that a wrong number of steps gives."""

    lines: tuple[str, ...]
    question: str
    answer: str
    value: str
    near: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    """Everything of the value's kind; empty where values are numbers."""
    ordered: bool = False
    """The lines tell events, whose order in the text is their order in time: they are never reversed."""


class HopFamily(TaskFamily):
    """Multi-hop questions over a text of a wanted length."""

    name = "hop"
    version = "1"
    abstains_in_reasoning = (r" does not (?:say|mention)\b",)

    def __init__(
        self,
        *,
        lengths: tuple[int, ...] = LENGTHS,
        hops: tuple[int, ...] = HOPS,
        count_tokens: Callable[[str], int] = estimate_tokens,
    ) -> None:
        self.lengths, self.hops, self.count_tokens = lengths, hops, count_tokens

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "kinds": KINDS, "spreads": SPREADS, "hops": self.hops, "lengths": self.lengths}

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        hops = rng.choice([h for h in self.hops if h <= 4] or self.hops)
        length = rng.choice([n for n in self.lengths if n <= 320] or self.lengths[:1])
        turn, *_ = self.draw(rng, "train", rng.choice(KINDS), hops, rng.choice(SPREADS), length)
        return render_document(turns_to_messages([turn], mode=mode, system=maybe_system(rng)), mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode = random_mode(rng)
        kind, hops = KINDS[index % len(KINDS)], self.hops[index // len(KINDS) % len(self.hops)]
        spread = SPREADS[index // (len(KINDS) * len(self.hops)) % len(SPREADS)]
        length = self.lengths[index // len(KINDS) % len(self.lengths)]
        turn, trail, spread, candidates = self.draw(rng, split, kind, hops, spread, length)
        stratum = {"kind": kind, "hops": hops, "spread": spread, "length": length, "mode": mode}
        others = [v for v in trail.near if v != trail.value]
        meta = {
            "value": trail.value,
            "near": others,
            "candidates": candidates,
            "reasoning": turn.reasoning,
        }
        return self.chat_item(rng, split, index, mode, turn, stratum, meta)

    def draw(
        self, rng: random.Random, split: Split, kind: str, hops: int, spread: str, length: int
    ) -> tuple[Turn, Trail, str, list[str]]:
        """A text of `length` tokens with its question; also the spread that the lines have, and what may be named."""
        names = _Names(rng, split)
        trail = _MAKERS[kind](rng, names, hops)
        decoys = [_MAKERS[kind](rng, names, hops) for _ in range(DECOYS)]
        if trail.ordered or (kind == "dates" and spread == "reversed"):
            spread = "spread" if spread == "reversed" else spread
        lines = list(reversed(trail.lines)) if spread == "reversed" else list(trail.lines)
        used = self.count_tokens("\n".join([*lines, *(line for d in decoys for line in d.lines)]))
        filler: list[str] = []
        while used < length:
            filler.append(" ".join(rng.choices(words.FILLER, k=rng.randint(6, 12))))
            used += self.count_tokens(filler[-1])
        at = sorted([rng.random()] * len(lines)) if spread == "adjacent" else sorted(rng.random() for _ in lines)
        placed = [(place, line) for place, line in zip(at, lines, strict=True)]
        for decoy in decoys:
            spots = sorted(rng.random() for _ in decoy.lines)
            placed += list(zip(spots, decoy.lines, strict=True))
        placed += [(rng.random(), line) for line in filler]
        text = "\n".join(line for _, line in sorted(placed, key=lambda pair: pair[0]))
        reasoning = " ".join(trail.lines)
        candidates = sorted({name for t in (trail, *decoys) for name in t.candidates})
        return Turn(f"{text}\n\n{trail.question}", reasoning, trail.answer), trail, spread, candidates

    def grade(self, item: Item, output_text: str) -> Grade:
        """Exactly one value and the right one: a noun of the word list, a number, or a name of the text."""
        answer, value = final_answer(output_text, item.thinking_mode), item.meta["value"]
        if item.meta["candidates"]:
            return grade_closed_set(answer, value, item.meta["candidates"])
        return grade_code_value(answer, value)

    def adversary(self, item: Item) -> list[str]:
        value, mode = item.meta["value"], item.thinking_mode
        near = item.meta["near"] or [n for n in words.NOUNS if n != value][:1]

        def say(text: str) -> str:
            return completion(mode, item.meta["reasoning"], text)

        outputs = [
            say(""),
            say(str(item.messages[-1]["content"]).rsplit("\n", 1)[-1]),
            say(IDK),
            say(f"It is not {value}."),
            say(f"{value} or {near[0]}"),
            say(f"{value}, {near[0]}"),
            say(f"{value}7"),
            say(str(item.messages[-1]["content"])),
            *(say(other) for other in near),
        ]
        return outputs + ([f"It is {value}"] if mode == "thinking" else [])


class _Names:
    """Invented names of one split, none twice in a text."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self._rng, self._split = rng, split
        self._taken: set[str] = set()

    def draw(self) -> str:
        while True:
            name = words.invented_word(self._rng, self._rng.choice((2, 2, 3)))
            if name not in self._taken and split_of("hop", name) == self._split:
                self._taken.add(name)
                return name


def _variables(rng: random.Random, names: _Names, hops: int) -> Trail:
    """x1 = 4821, x2 = x1, ...: what the last one is worth after `hops` assignments."""
    chain = [names.draw() for _ in range(hops)]
    value, other = rng.sample(range(1000, 10_000), 2)
    lines = [f"{chain[0]} = {value}"] + [f"{b} = {a}" for a, b in zip(chain, chain[1:], strict=False)]
    # a variable that looks like the chain's and holds something else
    lines.append(f"{names.draw()} = {other}")
    answer = f"{chain[-1]} is {value}."
    return Trail(tuple(lines), f"What is the value of {chain[-1]}?", answer, str(value), (str(other),))


def _pointers(rng: random.Random, names: _Names, hops: int) -> Trail:
    """Boxes that name the next box; the one after `hops` steps holds a word."""
    boxes = [names.draw() for _ in range(hops + 1)]
    near, value, beyond = rng.sample(words.NOUNS, 3)
    lines = [f"Box {a} points to box {b}." for a, b in zip(boxes, boxes[1:], strict=False)]
    lines += [f"Box {boxes[-1]} holds a {value}.", f"Box {boxes[-2]} holds a {near}."]
    outside = names.draw()
    lines.append(f"Box {outside} holds a {beyond}.")
    question = (
        f"Start at box {boxes[0]} and follow {hops} pointer{'s' if hops > 1 else ''}. What does the last box hold?"
    )
    return Trail(tuple(lines), question, f"It holds a {value}.", value, (near, beyond), words.NOUNS)


def _moves(rng: random.Random, names: _Names, hops: int) -> Trail:
    """A thing is handed on `hops` times; who has it at the end."""
    people = [names.draw().capitalize() for _ in range(hops + 1)]
    # the name in it tells the thing from that of any other chain
    thing = f"{rng.choice(words.COLOURS)} {rng.choice(words.NOUNS)} of {names.draw().capitalize()}"
    lines = [f"{people[0]} has the {thing}."]
    lines += [f"{a} gives the {thing} to {b}." for a, b in zip(people, people[1:], strict=False)]
    answer = f"{people[-1]} has the {thing}."
    near = tuple(people[max(0, hops - 2) : hops])
    question = f"Who has the {thing} at the end?"
    return Trail(tuple(lines), question, answer, people[-1], near, tuple(people), ordered=True)


def _dates(rng: random.Random, names: _Names, hops: int) -> Trail:
    """Events with dates; which is the `hops`-th of them in time."""
    count = max(hops + 1, 3)
    events = [names.draw().capitalize() for _ in range(count)]
    days = rng.sample(range(360), count)
    group = names.draw()
    year = rng.randrange(2000, 2100)
    lines = [
        f"The {group} meeting at {e} was on {year}-{d // 30 + 1:02d}-{d % 30 + 1:02d}."
        for e, d in zip(events, days, strict=True)
    ]
    order = [e for _, e in sorted(zip(days, events, strict=True))]
    value = order[hops - 1]
    near = tuple(order[i] for i in (hops - 2, hops) if 0 <= i < count)
    question = f"Sort the {group} meetings by date. Where was number {hops}?"
    return Trail(tuple(lines), question, f"Number {hops} was at {value}.", value, near, tuple(events))


_MAKERS: dict[str, Callable[[random.Random, _Names, int], Trail]] = {
    "variables": _variables,
    "pointers": _pointers,
    "moves": _moves,
    "dates": _dates,
}
