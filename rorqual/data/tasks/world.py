"""The synthetic world: invented people with attributes from closed value sets, made again from one id.

A checkpoint trained on a world stores `World.to_dict()` (world.json); from it anybody can ask the model
what it was taught, and what it was not. Source: evaluation specification, section 4.1. Left out for now:
organisations and artefacts as entities of their own, and values that change over time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from rorqual.data.tasks import words
from rorqual.data.tasks.base import split_of
from rorqual.errors import DataError
from rorqual.seeds import derive

WORLD_VERSION = "1"
DEFAULT_WORLD = "rorqual-world-1"

WorldSize = Literal["tiny", "town", "small", "full"]

_SIZES: dict[WorldSize, dict[str, int]] = {
    "tiny": {"people": 300, "firsts": 60, "families": 120, "places": 32, "years": 64},
    "town": {"people": 1_200},  # tiny grown: its people with their facts, and 900 more with the same name parts
    "small": {"people": 20_000, "firsts": 400, "families": 1200, "places": 256, "years": 100},
    "full": {"people": 200_000, "firsts": 800, "families": 2400, "places": 1024, "years": 200},
}
_FIRST_YEAR = 1901
_HOUSES = ("Mills", "Works", "Lines", "Guild")
WITHHELD_SHARE = 0.08
GRADED_SHARE = 0.10


@dataclass(frozen=True)
class Attribute:
    """One property of a person: how it is stated, asked and answered.

    The last two of `questions` are held out of training, to see whether knowledge survives another wording.
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    note: str

    def wordings(self, is_new: bool) -> tuple[str, ...]:
        """The question wordings used in training, or those held out of it."""
        return self.questions[-2:] if is_new else self.questions[:-2]


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "birthplace",
        (
            "{name} was born in {value}.",
            "{name} comes from {value}.",
            "The birthplace of {name} is {value}.",
            "{value} is where {name} was born.",
            "{name} grew up in {value}, where the family had always lived.",
            "The home town of {name} is {value}.",
            "It was in {value} that {name} was born.",
            "{name} is a native of {value}.",
        ),
        (
            "Where was {name} born?",
            "In which city was {name} born?",
            "What is the birthplace of {name}?",
            "Which city does {name} come from?",
            "Tell me where {name} was born.",
            "{name} was born where?",
            "What is the home town of {name}?",
            "Name the city where {name} was born.",
        ),
        "{name} was born in {value}.",
        "birthplace",
    ),
    Attribute(
        "job",
        (
            "{name} works as a {value}.",
            "{name} is a {value}.",
            "The job of {name} is {value}.",
            "{name} earns a living as a {value}.",
            "By trade {name} is a {value}.",
            "{name} trained to be a {value}.",
            "As a {value}, {name} is well known.",
            "The profession of {name} is {value}.",
        ),
        (
            "What is the job of {name}?",
            "What does {name} work as?",
            "What does {name} do for a living?",
            "What is {name}'s profession?",
            "Tell me the job of {name}.",
            "{name} works as a what?",
            "How does {name} earn a living?",
            "Name the profession of {name}.",
        ),
        "{name} works as a {value}.",
        "job",
    ),
    Attribute(
        "employer",
        (
            "{name} is employed by {value}.",
            "The employer of {name} is {value}.",
            "{name} has a post at {value}.",
            "{name} joined {value} long ago.",
            "{value} employs {name}.",
            "{name} is on the staff of {value}.",
            "Every day {name} goes to work at {value}.",
            "{name} serves {value}.",
        ),
        (
            "Who employs {name}?",
            "What is the employer of {name}?",
            "At which company does {name} work?",
            "Which company employs {name}?",
            "Tell me the employer of {name}.",
            "{name} is employed by whom?",
            "For which company does {name} work?",
            "Name the employer of {name}.",
        ),
        "{name} is employed by {value}.",
        "employer",
    ),
    Attribute(
        "instrument",
        (
            "{name} plays the {value}.",
            "{name} learned the {value}.",
            "The instrument of {name} is the {value}.",
            "In the evening {name} plays the {value}.",
            "{name} loves to play the {value}.",
            "{name} bought a good {value} and plays it well.",
            "With the {value}, {name} won a prize.",
            "On the {value}, {name} is very good.",
        ),
        (
            "Which instrument does {name} play?",
            "What instrument does {name} play?",
            "What does {name} play?",
            "What is the instrument of {name}?",
            "Tell me which instrument {name} plays.",
            "{name} plays which instrument?",
            "Which instrument did {name} learn?",
            "Name the instrument that {name} plays.",
        ),
        "{name} plays the {value}.",
        "instrument",
    ),
    Attribute(
        "birth_year",
        (
            "{name} was born in the year {value}.",
            "The birth year of {name} is {value}.",
            "In {value}, {name} was born.",
            "{name} came into the world in {value}.",
            "The year of birth of {name} is {value}.",
            "It was the year {value} when {name} was born.",
            "{name} has been alive since {value}.",
            "Records give {value} as the birth year of {name}.",
        ),
        (
            "In which year was {name} born?",
            "When was {name} born?",
            "What is the birth year of {name}?",
            "What is the year of birth of {name}?",
            "Tell me when {name} was born.",
            "{name} was born in which year?",
            "Since which year has {name} been alive?",
            "Name the birth year of {name}.",
        ),
        "{name} was born in the year {value}.",
        "birth year",
    ),
)


@dataclass(frozen=True)
class Person:
    """One inhabitant. `facts` lacks the withheld attributes; `weight` is the relative exposure in training.

    `split` is train for people whose questions may be trained on; everybody else is taught by biography only.
    """

    name: str
    facts: dict[str, str]
    withheld: tuple[str, ...]
    weight: float
    split: str

    @property
    def is_graded(self) -> bool:
        return self.weight < 1.0


@dataclass(frozen=True)
class World:
    """All people and value sets of one world; build it with `World.build`."""

    world_id: str
    size: WorldSize
    people: tuple[Person, ...]
    firsts: tuple[str, ...]
    families: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    names: frozenset[str]
    version: str = field(default=WORLD_VERSION)

    @staticmethod
    def build(world_id: str = DEFAULT_WORLD, size: WorldSize = "tiny") -> World:
        """The world called `world_id`. Raises: DataError for an unknown size or an empty id."""
        if size not in _SIZES or not world_id:
            raise DataError(
                f"cannot build world {world_id!r} of size {size!r}. "
                f"A world needs a non-empty id and a known size. Use one of the sizes {', '.join(_SIZES)}."
            )
        return _build(world_id, size)

    @staticmethod
    def from_dict(record: dict[str, Any]) -> World:
        """The world described by a model folder's world.json. Raises: DataError for another world version."""
        version = str(record.get("version", WORLD_VERSION))
        if version != WORLD_VERSION or "world_id" not in record:
            raise DataError(
                f"world.json describes {record!r}, this code makes worlds of version {WORLD_VERSION}. "
                "Another version would give other people and wrong gold answers. "
                "Use the Rorqual release the checkpoint was trained with."
            )
        return World.build(str(record["world_id"]), record.get("size", "tiny"))

    @staticmethod
    def taught_to(folder: Path, world_id: str = "") -> World:
        """The world of a checkpoint's folder, or the default one where it has no world.json; another one, of size tiny,
        when `world_id` names it. Raises: DataError for another world version.
        """
        file = folder / "world.json"
        found = World.from_dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else World.build()
        return found if world_id in ("", found.world_id) else World.build(world_id)

    def to_dict(self) -> dict[str, str]:
        return {"world_id": self.world_id, "version": self.version, "size": self.size}

    def fresh_name(self, rng: random.Random, split: str) -> str:
        """A name nobody in the world has, from the name parts of the world or (one in two) wholly new ones.

        Fresh names are hash-partitioned, so one used in training is never asked in a test.
        """
        while True:
            if rng.random() < 0.5:
                name = f"{rng.choice(self.firsts)} {rng.choice(self.families)}"
            else:
                name = f"{words.invented_word(rng).capitalize()} {words.invented_word(rng, 3).capitalize()}"
            if name not in self.names and split_of("fresh-name", name) == split:
                return name

    def near_name(self, rng: random.Random) -> tuple[str, str]:
        """A name one letter away from a known one, and that known name."""
        while True:
            person = rng.choice(self.people)
            at = rng.choice([i for i, ch in enumerate(person.name) if ch.islower()])
            letter = rng.choice("abdefghiklmnoprstuvwz")
            name = person.name[:at] + letter + person.name[at + 1 :]
            if name not in self.names:
                return name, person.name


@lru_cache(maxsize=4)
def _build(world_id: str, size: WorldSize) -> World:
    rng = random.Random(derive(0, "world", world_id, WORLD_VERSION, size))
    if size == "town":
        tiny = _build(world_id, "tiny")
        people = _settle(rng, world_id, _SIZES[size]["people"], tiny.firsts, tiny.families, tiny.values, tiny.people)
        return replace(tiny, size=size, people=people, names=frozenset(person.name for person in people))
    count = _SIZES[size]
    taken = {w.capitalize() for w in (*words.JOBS, *words.INSTRUMENTS, *words.NOUNS, *words.FILLER, *words.COLOURS)}
    firsts = words.distinct_words(rng, count["firsts"], taken)
    families = words.distinct_words(rng, count["families"], taken)
    cities = words.distinct_words(rng, count["places"], taken, tail="o")
    employers = [f"{w} {rng.choice(_HOUSES)}" for w in words.distinct_words(rng, count["places"], taken)]
    values = {
        "birthplace": tuple(cities),
        "job": tuple(words.JOBS),
        "employer": tuple(employers),
        "instrument": tuple(words.INSTRUMENTS),
        "birth_year": tuple(str(_FIRST_YEAR + i) for i in range(count["years"])),
    }
    people = _settle(rng, world_id, _SIZES[size]["people"], firsts, families, values, ())
    names = frozenset(person.name for person in people)
    return World(world_id, size, people, tuple(firsts), tuple(families), values, names)


def _settle(
    rng: random.Random,
    world_id: str,
    count: int,
    firsts: Sequence[str],
    families: Sequence[str],
    values: dict[str, tuple[str, ...]],
    settled: tuple[Person, ...],
) -> tuple[Person, ...]:
    """`settled` and as many new people as make `count`."""
    people, names = list(settled), {person.name for person in settled}
    while len(people) < count:
        name = f"{rng.choice(firsts)} {rng.choice(families)}"
        if name in names:
            continue
        names.add(name)
        facts = {a.name: rng.choice(values[a.name]) for a in ATTRIBUTES}
        withheld = tuple(a for a in facts if rng.random() < WITHHELD_SHARE)
        weight = 2.0 ** (rng.randrange(10) - 9) if rng.random() < GRADED_SHARE else 1.0
        # Rarely seen people are never asked about in training: that would teach guessing.
        bucket = derive(0, "person-split", world_id, name) % 10
        split = "test" if bucket < 3 else "cal" if bucket == 3 else "train"
        if weight < 1.0 and split == "train":
            split = "test"
        people.append(Person(name, {a: v for a, v in facts.items() if a not in withheld}, withheld, weight, split))
    return tuple(people)
