"""The census: invented people with three-part names, each told of an exact number of times in training.

Where `world.py` teaches a model to say "I don't know", the census never does: it is for studying when a model
should have said so. Source: evaluation specification, section 4.1. Left out: organisations and artefacts as
entities, functional attributes, values that change over time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

from rorqual.data.tasks import words
from rorqual.data.tasks.base import Size
from rorqual.errors import DataError
from rorqual.seeds import derive

CENSUS_VERSION = "1"
DEFAULT_CENSUS = "rorqual-census-1"

CLEAN_EXPOSURES = 102
GRADES = tuple(range(10))
"""A graded person is told of 2^e times, e from this range; their mean is that of the clean people."""

WITHHELD_SHARE = 0.5
"""Share of the people who lack one attribute, which no training document gives."""

_CAL_SHARE = 3  # of ten
_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"people": 60, "parts": 24, "families": 32, "values": 32},
    "small": {"people": 1200, "parts": 64, "families": 128, "values": 128},
    "full": {"people": 40_000, "parts": 512, "families": 2048, "values": 1024},
}
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")  # fmt: skip
_HOUSES = ("Mills", "Works", "Lines", "Guild")

CensusSplit = Literal["cal", "test"]


@dataclass(frozen=True)
class Trait:
    """One attribute of a person, as phrases that the frames below are filled with.

    `verbs` complete "NAME ... VALUE"; `nouns` name the attribute; `questions` are its own wordings of the question.
    """

    name: str
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    questions: tuple[str, ...]


STATEMENT_FRAMES = (
    "The {noun} of {name} is {value}.",
    "{name}'s {noun} is {value}.",
    "{value} is the {noun} of {name}.",
    "For {name}, the {noun} is {value}.",
    "Records give {value} as the {noun} of {name}.",
)
VERB_FRAMES = (
    "{name} {verb} {value}.",
    "It is known that {name} {verb} {value}.",
    "As all know, {name} {verb} {value}.",
)
QUESTION_FRAMES = (
    "What is the {noun} of {name}?",
    "What is {name}'s {noun}?",
    "Tell me the {noun} of {name}.",
    "Name {name}'s {noun}.",
    "For {name}, what is the {noun}?",
)

TRAITS: tuple[Trait, ...] = (
    Trait(
        "birthplace",
        ("birthplace", "home town", "place of birth"),
        ("was born in", "comes from", "grew up in", "is a native of"),
        ("Where was {name} born?", "Which town does {name} come from?", "Where did {name} grow up?"),
    ),
    Trait(
        "employer",
        ("employer", "company", "place of work"),
        ("is employed by", "works for", "has a post at", "is on the staff of"),
        ("Who employs {name}?", "Which company does {name} work for?", "Where does {name} have a post?"),
    ),
    Trait(
        "craft",
        ("craft", "trade", "profession"),
        ("earns a living by", "was trained in", "is a master of", "is paid for"),
        ("How does {name} earn a living?", "What was {name} trained in?", "What is {name} a master of?"),
    ),
    Trait(
        "dish",
        ("favourite dish", "best loved meal", "usual supper"),
        ("likes to eat", "always orders", "often cooks", "dines on"),
        ("What does {name} like to eat?", "What does {name} always order?", "What does {name} often cook?"),
    ),
    Trait(
        "birthday",
        ("birthday", "date of birth", "day of birth"),
        ("was born on", "has a birthday on", "celebrates on", "came into the world on"),
        ("When was {name} born?", "On which day was {name} born?", "When does {name} celebrate?"),
    ),
    Trait(
        "club",
        ("club", "team", "society"),
        ("plays for", "is a member of", "trains with", "belongs to"),
        ("Which club does {name} play for?", "Where is {name} a member?", "With whom does {name} train?"),
    ),
)
BY_NAME = {trait.name: trait for trait in TRAITS}


def statements(trait: Trait) -> tuple[str, ...]:
    """Every wording of a fact (27): templates over {name} and {value}."""
    with_noun = [f.replace("{noun}", n) for f in STATEMENT_FRAMES for n in trait.nouns]
    return (*with_noun, *(f.replace("{verb}", v) for f in VERB_FRAMES for v in trait.verbs))


def questions(trait: Trait, *, is_new: bool) -> tuple[str, ...]:
    """Wordings of the question, templates over {name}: those of training, or those held out of it.

    Held out are pairs of a known frame with a known noun, and one wording of the trait's own.
    """
    pairs = [
        (f.replace("{noun}", noun), (i + j) % 3 == 2)
        for i, f in enumerate(QUESTION_FRAMES)
        for j, noun in enumerate(trait.nouns)
    ]
    own = [(question, i == len(trait.questions) - 1) for i, question in enumerate(trait.questions)]
    return tuple(text for text, is_held_out in (*pairs, *own) if is_held_out == is_new)


@dataclass(frozen=True)
class Resident:
    """One person. `exposures` documents of an epoch tell each of `facts` once; `grade` is None for clean people."""

    name: str
    facts: dict[str, str]
    withheld: str | None
    grade: int | None
    split: CensusSplit

    @property
    def exposures(self) -> int:
        return CLEAN_EXPOSURES if self.grade is None else 2**self.grade


@dataclass(frozen=True)
class Census:
    """All people and value sets of one census; build it with `Census.build`."""

    world_id: str
    size: Size
    people: tuple[Resident, ...]
    parts: tuple[tuple[str, ...], ...]
    """Known first, middle and family names."""
    values: dict[str, tuple[str, ...]]
    names: frozenset[str]

    @staticmethod
    def build(world_id: str = DEFAULT_CENSUS, size: str = "small") -> Census:
        """The census called `world_id`. Raises: DataError for an unknown size or an empty id."""
        if size not in _SIZES or not world_id:
            raise DataError(
                f"cannot build census {world_id!r} of size {size!r}. It needs a non-empty id and a known size. "
                f"Use one of the sizes {', '.join(_SIZES)}."
            )
        return _build(world_id, cast(Size, size))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "census", "world_id": self.world_id, "version": CENSUS_VERSION, "size": self.size}

    @staticmethod
    def from_dict(record: dict[str, Any]) -> Census:
        """The census of a model folder's world.json. Raises: DataError when the file describes something else."""
        if record.get("kind") != "census" or record.get("version") != CENSUS_VERSION:
            raise DataError(
                f"world.json describes {record!r}, this code makes censuses of version {CENSUS_VERSION}. Another would "
                "give other people and wrong gold answers. Use the model folder a census recipe wrote."
            )
        return Census.build(str(record["world_id"]), record.get("size", "small"))

    def novel_name(self, rng: random.Random, split: CensusSplit) -> str:
        """Known parts in a combination nobody has. Hash-partitioned, so cal and test share none."""
        while True:
            name = " ".join(rng.choice(part) for part in self.parts)
            if name not in self.names and name_split(self.world_id, name) == split:
                return name

    def near_name(self, rng: random.Random, person: Resident) -> tuple[str, str]:
        """A name that differs from `person`'s in one part (`part`) or by one letter (`edit`), and which of the two.

        Such a name belongs to the split of the person it resembles.
        """
        while True:
            if rng.random() < 0.5:
                kind, pieces, at = "part", person.name.split(" "), rng.randrange(3)
                pieces[at] = rng.choice(self.parts[at])
                name = " ".join(pieces)
            else:
                kind = "edit"
                at = rng.choice([i for i, letter in enumerate(person.name) if letter.islower()])
                name = person.name[:at] + rng.choice("abdefghiklmnoprstuvwz") + person.name[at + 1 :]
            if name not in self.names:
                return name, kind

    def order(self, epoch: int) -> Iterator[int]:
        """Indices of people as one epoch tells of them: each as often as its exposures, shuffled."""
        turns = [i for i, person in enumerate(self.people) for _ in range(person.exposures)]
        random.Random(derive(0, "census-order", self.world_id, self.size, epoch)).shuffle(turns)
        return iter(turns)


def name_split(world_id: str, name: str) -> CensusSplit:
    """The split of a person by a hash of the name."""
    return "cal" if derive(0, "census-split", world_id, name) % 10 < _CAL_SHARE else "test"


@lru_cache(maxsize=4)
def _build(world_id: str, size: Size) -> Census:
    count = _SIZES[size]
    rng = random.Random(derive(0, "census", world_id, CENSUS_VERSION, size))
    taken: set[str] = set(_MONTHS) | set(_HOUSES)
    parts = tuple(
        tuple(words.distinct_words(rng, n, taken)) for n in (count["parts"], count["parts"], count["families"])
    )
    num = count["values"]
    days = [f"{day} {month}" for month in _MONTHS for day in range(1, 29)]
    values = {
        "birthplace": tuple(words.distinct_words(rng, num, taken, tail="o")),
        "employer": tuple(f"{w} {rng.choice(_HOUSES)}" for w in words.distinct_words(rng, num, taken)),
        "craft": tuple(w.lower() for w in words.distinct_words(rng, num, taken, tail="ing")),
        "dish": tuple(w.lower() for w in words.distinct_words(rng, num, taken, tail="ie")),
        "birthday": tuple(days),
        "club": tuple(f"{w} United" for w in words.distinct_words(rng, num, taken)),
    }
    people: list[Resident] = []
    names: set[str] = set()
    while len(people) < count["people"]:
        name = " ".join(rng.choice(part) for part in parts)
        if name in names:
            continue
        names.add(name)
        facts = {trait.name: rng.choice(values[trait.name]) for trait in TRAITS}
        withheld = rng.choice(list(facts)) if rng.random() < WITHHELD_SHARE else None
        # Every other person is clean, the rest walk through the grades.
        place = len(people)
        grade = None if place % 2 == 0 else GRADES[place // 2 % len(GRADES)]
        facts = {trait: value for trait, value in facts.items() if trait != withheld}
        people.append(Resident(name, facts, withheld, grade, name_split(world_id, name)))
    return Census(world_id, size, tuple(people), parts, values, frozenset(names))
