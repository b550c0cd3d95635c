"""S-NEEDLE: find a value by its key in a long text, or say that it is not there.

A haystack of one of six kinds is filled to a length in (estimated) tokens, key-value lines are planted at
chosen depths, and questions are asked about it. One haystack can be asked many questions (`probes`), so a
long prefill can be shared. Source: evaluation specification, section 4.2. Left out for now: tool catalogues
as haystacks (H6), paraphrased and one-hop keys (L1, L2), multi-value answers. Token phases need a tokenizer
and are set by the runner.
"""

from __future__ import annotations

import random
import re
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
from rorqual.data.tasks.world import ATTRIBUTES, World

HAYSTACKS = ("uniform", "zipf", "biographies", "code", "all-needles", "boilerplate")
TASKS = ("single", "multi-key", "newest", "absent")
VALUE_KINDS = ("number", "word", "hex", "date")
LENGTHS = (48, 64, 96, 128, 192, 256, 320)  # estimated tokens, trained lengths
_PIECES = re.compile(r"[A-Za-z]+|\d|[^A-Za-z\d ]")
_LABELS = ("code", "secret", "key", "password", "label")


def estimate_tokens(text: str) -> int:
    """A rough count for a small vocabulary with one digit a token, for sizing without a tokenizer."""
    return sum(max(1, round(len(piece) / 4.5)) for piece in _PIECES.findall(text))


@dataclass(frozen=True)
class Needle:
    """One planted pair. `updates` are older values, stated earlier in the text."""

    key: str
    value: str
    label: str
    updates: tuple[str, ...] = ()

    def line(self, value: str | None = None, *, again: bool = False) -> str:
        return f"The {self.label} of {self.key} is {'now ' if again else ''}{value or self.value}."

    def question(self) -> str:
        return f"What is the {self.label} of {self.key}?"

    def answer(self) -> str:
        return f"The {self.label} of {self.key} is {self.value}."


@dataclass(frozen=True)
class Haystack:
    """A text with needles in it; `depths` are their places, 0 at the start and 1 at the end."""

    kind: str
    text: str
    needles: tuple[Needle, ...]
    depths: tuple[float, ...]
    value_kind: str
    tokens: int


class NeedleFamily(TaskFamily):
    """Key-value recall within a haystack."""

    name = "needle"
    version = "1"
    partition = "needle"  # families over the same keys share their partition
    abstains_in_reasoning = (r" does not mention\b",)

    def __init__(
        self,
        world: World,
        *,
        lengths: tuple[int, ...] = LENGTHS,
        count_tokens: Callable[[str], int] = estimate_tokens,
    ) -> None:
        self.world = world
        self.lengths = lengths
        self.count_tokens = count_tokens

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "haystacks": HAYSTACKS, "tasks": TASKS, "lengths": self.lengths}

    def haystack(
        self,
        rng: random.Random,
        split: Split,
        *,
        kind: str,
        length: int,
        value_kind: str,
        num_needles: int = 1,
        depth: float | None = None,
        updates: int = 0,
    ) -> Haystack:
        """A text of about `length` tokens with `num_needles` pairs; `depth` fixes the first one's place.

        The first needle carries `updates` older values, all stated before the final one.
        """
        keys = self._keys(rng, split, num_needles)
        label = rng.choice(_LABELS)
        values = draw_values(rng, value_kind, num_needles + updates)
        needles = [
            Needle(key, values[i], label, tuple(values[num_needles:]) if i == 0 else ()) for i, key in enumerate(keys)
        ]
        spots = [rng.random() if depth is None or i else depth for i in range(num_needles)]
        older = sorted(rng.random() * spots[0] for _ in range(updates))
        planted = [(spot, n.line(again=bool(n.updates))) for spot, n in zip(spots, needles, strict=True)]
        planted += [
            (at, needles[0].line(value, again=i > 0))
            for i, (at, value) in enumerate(zip(older, needles[0].updates, strict=True))
        ]
        room = length - self.count_tokens("\n".join(line for _, line in planted))
        filler = self._filler(rng, kind, room, split, label, value_kind, set(keys))
        placed = [((i + 0.5) / len(filler), line) for i, line in enumerate(filler)] + planted
        text = "\n".join(line for _, line in sorted(placed, key=lambda pair: pair[0]))
        return Haystack(kind, text, tuple(needles), tuple(spots), value_kind, self.count_tokens(text))

    def _keys(self, rng: random.Random, split: Split, count: int) -> list[str]:
        keys: list[str] = []
        while len(keys) < count:
            key = words.invented_word(rng, rng.choice((2, 2, 3)))
            if key not in keys and split_of(self.partition, key) == split:
                keys.append(key)
        return keys

    def _filler(
        self,
        rng: random.Random,
        kind: str,
        room: int,
        split: Split,
        label: str,
        value_kind: str,
        taken: set[str],
    ) -> list[str]:
        lines: list[str] = []
        used = 0
        make = self._line_maker(rng, kind, split, label, value_kind, taken)
        while used < room:
            line = make()
            lines.append(line)
            used += self.count_tokens(line)
        return lines

    def _line_maker(
        self, rng: random.Random, kind: str, split: Split, label: str, value_kind: str, taken: set[str]
    ) -> Callable[[], str]:
        if kind == "uniform":
            return lambda: " ".join(rng.choices(words.FILLER, k=rng.randint(6, 12)))
        if kind == "zipf":
            return _zipf_lines(rng)
        if kind == "biographies":
            return lambda: self._biography_line(rng, split)
        if kind == "code":
            return lambda: _code_line(rng)
        if kind == "boilerplate":
            base = rng.choices(words.FILLER, k=9)
            return lambda: _edited(rng, base)
        assert kind == "all-needles", kind

        def distractor() -> str:
            while (key := self._keys(rng, split, 1)[0]) in taken:
                pass
            taken.add(key)
            return Needle(key, draw_values(rng, value_kind, 1)[0], label).line()

        return distractor

    def _biography_line(self, rng: random.Random, split: Split) -> str:
        attribute = rng.choice(ATTRIBUTES)
        value = rng.choice(self.world.values[attribute.name])
        return rng.choice(attribute.statements).format(name=self.world.fresh_name(rng, split), value=value)

    def turns(self, rng: random.Random, split: Split, hay: Haystack, task: str) -> tuple[Turn, Needle, str | None]:
        """The question of `task` about `hay`, the needle it is about, and the gold value (None: it is not
        there).
        """
        if task == "absent":
            while (key := self._keys(rng, split, 1)[0]) in hay.text:
                pass
            needle = Needle(key, "", hay.needles[0].label)
            turn = Turn(f"{hay.text}\n\n{needle.question()}", f"The text does not mention {key}.", IDK)
            return turn, needle, None
        needle = hay.needles[0]
        found = "The last line about it says" if needle.updates else "The text says"
        reasoning = f"{found}: {needle.line(again=bool(needle.updates))}"
        return Turn(f"{hay.text}\n\n{needle.question()}", reasoning, needle.answer()), needle, needle.value

    def _draw(
        self,
        rng: random.Random,
        split: Split,
        *,
        task: str,
        kind: str,
        length: int,
        depth: float | None = None,
    ) -> Haystack:
        return self.haystack(
            rng,
            split,
            kind=kind,
            length=length,
            value_kind=rng.choice(VALUE_KINDS),
            num_needles=1 if task in ("single", "newest") else rng.choice((2, 3)),
            depth=depth,
            updates=rng.choice((1, 1, 2)) if task == "newest" else 0,
        )

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        task = rng.choices(TASKS, (5, 4, 2, 1))[0]
        hay = self._draw(rng, "train", task=task, kind=rng.choice(HAYSTACKS), length=rng.choice(self.lengths))
        turns = [self.turns(rng, "train", hay, task)[0]]
        # Further questions about the same text cost few tokens and train recall at other depths.
        for needle in hay.needles[1:]:
            line = needle.line(again=bool(needle.updates))
            turns.append(Turn(needle.question(), f"The text says: {line}", needle.answer()))
        return render_document(turns_to_messages(turns, mode=mode, system=maybe_system(rng)), mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        """Items walk through tasks, haystacks, lengths and 16 depths; all cells are met in a few hundred
        steps.
        """
        mode = random_mode(rng)
        task, kind = TASKS[index % len(TASKS)], rng.choice(HAYSTACKS)
        length, depth = self.lengths[index % len(self.lengths)], rng.randrange(16) / 15
        return self.item(rng, split, index, mode=mode, task=task, kind=kind, length=length, depth=depth)

    def item(
        self,
        rng: random.Random,
        split: Split,
        index: int,
        *,
        mode: Any,
        task: str,
        kind: str,
        length: int,
        depth: float,
    ) -> Item:
        """One item of a chosen cell; `length` in estimated tokens may be as long as wanted."""
        hay = self._draw(rng, split, task=task, kind=kind, length=length, depth=depth)
        turn, needle, value = self.turns(rng, split, hay, task)
        probes = [{"question": n.question(), "value": n.value} for n in hay.needles]
        stratum = {
            "task": task,
            "haystack": kind,
            "value": hay.value_kind,
            "length": length,
            "depth": round(depth, 3),
            "mode": mode,
        }
        meta = {
            "value": value,
            "key": needle.key,
            "label": needle.label,
            "older": list(needle.updates),
            "others": [n.value for n in hay.needles if n.value != value],
            "reasoning": turn.reasoning,
            "probes": probes,
            "needle_offset": hay.text.find(needle.line(again=bool(needle.updates))) if value else None,
            "tokens_estimate": hay.tokens,
        }
        return self.chat_item(rng, split, index, mode, turn, stratum, meta)

    def grade(self, item: Item, output_text: str) -> Grade:
        """STRICT: the answer holds exactly one candidate and it equals the planted value."""
        answer = final_answer(output_text, item.thinking_mode)
        if item.stratum["value"] == "word":
            return grade_closed_set(answer, item.meta["value"], words.NOUNS)
        return grade_code_value(answer, item.meta["value"])

    def adversary(self, item: Item) -> list[str]:
        value, mode = item.meta["value"], item.thinking_mode
        question = str(item.messages[-1]["content"]).rsplit("\n", 1)[-1]
        rng = random.Random(item.id)
        others = [v for v in draw_values(rng, item.stratum["value"], 4) if v != value]

        def say(text: str) -> str:
            return completion(mode, item.meta["reasoning"], text)

        outputs = [
            say(""),
            say(question),
            say(others[0]),
            say(", ".join(others)),
            say(f"{others[0]} or {others[1]}"),
        ]
        outputs += [say(f"{IDK} Perhaps {others[0]}.")]
        outputs += [say(v) for v in (*item.meta["older"], *item.meta["others"])]
        if mode == "thinking":
            outputs += [f"{item.meta['reasoning']} {value or IDK}", f"The value is {value or IDK}</think>"]
        if value is None:
            return outputs
        return [
            *outputs,
            say(IDK),
            say(f"{value}7"),
            say(f"7{value}"),
            say(f"{value}, {others[0]}"),
            say(f"{value} or {others[0]}"),
            say(f"It is not {value}."),
            say(value[:-1]),
            say(str(item.messages[-1]["content"])),
        ]


def draw_values(rng: random.Random, kind: str, count: int) -> list[str]:
    """`count` different values of a kind; every kind but `word` holds a digit, which the grader relies on."""
    values: list[str] = []
    while len(values) < count:
        if kind == "number":
            value = str(rng.randrange(100, 10 ** rng.randint(3, 6)))
        elif kind == "hex":
            value = rng.choice("0123456789") + rng.choice("abcdef") + f"{rng.getrandbits(16):04x}"
        elif kind == "date":
            value = f"{rng.randrange(2000, 2100)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"
        else:
            value = rng.choice(words.NOUNS)
        if value not in values:
            values.append(value)
    return values


def _zipf_lines(rng: random.Random) -> Callable[[], str]:
    """Words with Zipf frequencies and an order-2 habit: the same two words tend to be followed by the same
    third.
    """
    vocabulary = rng.sample(words.FILLER, len(words.FILLER))
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]
    follow: dict[tuple[str, str], str] = {}

    def line() -> str:
        text = rng.choices(vocabulary, weights, k=2)
        for _ in range(rng.randint(5, 10)):
            pair = (text[-2], text[-1])
            if pair not in follow or rng.random() < 0.3:
                follow[pair] = rng.choices(vocabulary, weights)[0]
            text.append(follow[pair])
        return " ".join(text).capitalize() + "."

    return line


def _code_line(rng: random.Random) -> str:
    name, other = rng.choice(words.NOUNS), rng.choice(words.FILLER)
    form = rng.randrange(4)
    if form == 0:
        return f"{name}_{other} = {rng.randrange(100)}"
    if form == 1:
        return f"def get_{name}({other}):"
    if form == 2:
        return f"    return {other}.{name}({rng.randrange(10)})"
    return f"if {name} > {rng.randrange(100)}: {other} += 1"


def _edited(rng: random.Random, base: list[str]) -> str:
    line = list(base)
    line[rng.randrange(len(line))] = rng.choice(words.FILLER)
    return " ".join(line).capitalize() + "."
