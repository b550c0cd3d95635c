"""Questions of the abstention study: every known fact of a split in several wordings, and three kinds of unknown."""

from __future__ import annotations

import random
from itertools import count

from rorqual.data.tasks import CensusFamily, Item
from rorqual.data.tasks.census_world import BY_NAME, TRAITS, CensusSplit, questions
from rorqual.seeds import derive

TRAINED, NEW = 3, 2  # wordings of each known fact and of each withheld one
NEAR_NAMES = 3  # unknown names made from each person
NOVEL_SHARE = 2.5  # unknown names that resemble nobody, per person of the split


def exam(family: CensusFamily, split: CensusSplit, seed: int, *, share: float = 1.0) -> list[Item]:
    """All items of `split` in a fixed order; `share` takes that part of the people only (for quick runs)."""
    people = [p for p in family.world.people if p.split == split]
    people = people[: max(10, int(share * len(people)))]
    items: list[Item] = []
    numbers = count()

    def ask(
        stratum: str, name: str, trait_name: str, value: str | None, new: bool, rng: random.Random, **more: object
    ) -> None:
        items.append(
            family.question(rng, split, next(numbers), stratum, name, BY_NAME[trait_name], value, new, **more)  # type: ignore[arg-type]
        )

    for person in people:
        rng = random.Random(derive(seed, "exam", split, person.name))
        known = "K-clean" if person.grade is None else "K-graded"
        asked = [(known, trait, value) for trait, value in person.facts.items()]
        if person.withheld is not None:
            asked.append(("U-attr", person.withheld, None))  # type: ignore[arg-type]
        for stratum, trait, value in asked:
            for new in [False] * TRAINED + [True] * NEW:
                ask(stratum, person.name, trait, value, new, rng, like=person)
        for i in range(NEAR_NAMES):
            name, kind = family.world.near_name(rng, person)
            trait = rng.choice(TRAITS).name
            ask("U-near", name, trait, None, i % 2 == 1, rng, entity=person.name, kind=kind, like=person)
    rng = random.Random(derive(seed, "exam", split, "novel"))
    for i in range(int(NOVEL_SHARE * len(people))):
        name = family.world.novel_name(rng, split)
        ask("U-novel", name, rng.choice(TRAITS).name, None, i % 2 == 1, rng)
    return items


def statement(item: Item, answer: str) -> str:
    """A sentence of the trained kind that states `answer` first and the person behind it."""
    trait = BY_NAME[item.meta["attribute"]]
    return f"{answer.strip().rstrip('.')} is the {trait.nouns[0]} of {item.meta['name']}."


def other_wordings(item: Item, how_many: int) -> list[str]:
    """Trained wordings of the item's question other than its own; the same choice for the same wording.

    The first ones name the person before what is asked, so that reading them tells whether the two go together.
    """
    trait, asked = BY_NAME[item.meta["attribute"]], str(item.messages[-1]["content"])
    order = random.Random(derive(0, "paraphrases", trait.name, asked.replace(item.meta["name"], "")))
    words = list(questions(trait, is_new=False))
    order.shuffle(words)
    nouns_behind = [word for word in words if any(noun in word.split("{name}")[1] for noun in trait.nouns)]
    chosen = [*nouns_behind[:2], *(word for word in words if word not in nouns_behind), *nouns_behind[2:]]
    texts = [word.format(name=item.meta["name"]) for word in chosen]
    return [text for text in texts if text != asked][:how_many]
