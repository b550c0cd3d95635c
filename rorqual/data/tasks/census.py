"""S-FACTS without abstention: documents about the people of a `Census`, and questions that some cannot be answered.

Training tells every fact an exact number of times, as biographies and as questions that always get an answer, so
what a model does about unknown people is its own doing. Test questions name their stratum: K-clean, K-graded,
U-novel, U-near, U-attr. Source: evaluation specification, section 4.1. Left out: U-cat, U-premise, U-stale, and the
open-book strata (see `facts.py`).
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

from rorqual.chat.markers import EOS
from rorqual.data.tasks.answers import IDK, final_answer, grade_closed_set
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Piece,
    Split,
    TaskFamily,
    Turn,
    completion,
    render_document,
    turns_to_messages,
)
from rorqual.data.tasks.census_world import BY_NAME, TRAITS, Census, CensusSplit, Resident, Trait, questions, statements
from rorqual.errors import DataError

STRATA = ("K-clean", "K-graded", "U-novel", "U-near", "U-attr")


class CensusFamily(TaskFamily):
    """Closed-book questions about the people of a census, answered always in training, in chat mode."""

    name = "census"
    version = "1"

    def __init__(self, world: Census) -> None:
        self.world = world
        self._order = lru_cache(maxsize=2)(lambda epoch: tuple(world.order(epoch)))
        self._epoch_documents = sum(person.exposures for person in world.people)
        self._clean = {s: [p for p in world.people if p.grade is None and p.split == s] for s in ("cal", "test")}
        self._graded = {s: [p for p in world.people if p.grade is not None and p.split == s] for s in ("cal", "test")}

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), **self.world.to_dict(), "people": len(self.world.people), "strata": STRATA}

    # -- training --

    @property
    def epoch_documents(self) -> int:
        """Documents of one epoch, after which every fact has had its exposures."""
        return self._epoch_documents

    def train_document(self, rng: random.Random) -> list[Piece]:
        """A document about somebody drawn by exposure; `document_at` gives the exact numbers."""
        return self.document_at(rng, rng.randrange(self._epoch_documents))

    def document_at(self, rng: random.Random, index: int) -> list[Piece]:
        """The `index`-th document of the training stream, in a wording that `rng` chooses.

        It tells each known fact of one person once: a biography (40 %), an entry of a register (30 %) or a
        conversation (30 %). Everything in it is learned, questions too, as in pre-training.
        """
        epoch, place = divmod(index, self._epoch_documents)
        person = self.world.people[self._order(epoch)[place]]
        facts = [(BY_NAME[trait], value) for trait, value in person.facts.items()]
        rng.shuffle(facts)
        roll = rng.random()
        if roll < 0.4:
            told = (rng.choice(statements(trait)).format(name=person.name, value=value) for trait, value in facts)
            return [(" ".join(told) + EOS, True)]
        if roll < 0.7:
            entries = "; ".join(f"{rng.choice(trait.nouns)} {value}" for trait, value in facts)
            return [(f"{person.name}: {entries}.{EOS}", True)]
        turns = [_turn(rng.choice(questions(trait, is_new=False)), person.name, value) for trait, value in facts]
        pieces = render_document(turns_to_messages(turns, mode="chat"), mode="chat")
        return [("".join(text for text, _ in pieces), True)]

    # -- items --

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        """Items walk through the strata, half of them in wordings held out of training.

        Raises: DataError for the split train, which a census does not have: everybody is trained on.
        """
        if split == "train":
            raise DataError(
                "A census has no train items: all its people are trained on, and asked about by entity in cal and "
                "test. Ask for one of those."
            )
        people = (*self._clean[split], *self._graded[split])
        stratum = STRATA[index % len(STRATA)]
        is_new = index // len(STRATA) % 2 == 1
        trait = rng.choice(TRAITS)
        if stratum == "U-novel":
            return self.question(rng, split, index, stratum, self.world.novel_name(rng, split), trait, None, is_new)
        if stratum == "U-near":
            base = rng.choice(people)
            name, kind = self.world.near_name(rng, base)
            return self.question(
                rng, split, index, stratum, name, trait, None, is_new, entity=base.name, kind=kind, like=base
            )
        if stratum == "U-attr":
            person = rng.choice([p for p in people if p.withheld])
            assert person.withheld is not None
            trait = BY_NAME[person.withheld]
            return self.question(rng, split, index, stratum, person.name, trait, None, is_new, like=person)
        person = rng.choice(self._clean[split] if stratum == "K-clean" else self._graded[split])
        trait = BY_NAME[rng.choice(list(person.facts))]
        value = person.facts[trait.name]
        return self.question(rng, split, index, stratum, person.name, trait, value, is_new, like=person)

    def question(
        self,
        rng: random.Random,
        split: CensusSplit,
        index: int,
        stratum: str,
        name: str,
        trait: Trait,
        value: str | None,
        is_new: bool,
        *,
        entity: str | None = None,
        kind: str | None = None,
        like: Resident | None = None,
    ) -> Item:
        """An item about `name`; `entity` is what splits and intervals go by (the name, unless it imitates one)."""
        text = rng.choice(questions(trait, is_new=is_new))
        grade = None if like is None else like.grade
        cell = {
            "class": stratum,
            "attribute": trait.name,
            "wording": "new" if is_new else "trained",
            "grade": grade,
        }
        meta = {"value": value, "attribute": trait.name, "name": name, "entity": entity or name, "near": kind,
                "reasoning": ""}  # fmt: skip
        return self.chat_item(rng, split, index, "chat", _turn(text, name, value or IDK), cell, meta)

    def grade(self, item: Item, output_text: str) -> Grade:
        """Exactly one value of the attribute's closed set, or an abstention where nothing can be known."""
        answer = final_answer(output_text, item.thinking_mode)
        return grade_closed_set(answer, item.meta["value"], self.world.values[item.meta["attribute"]])

    def adversary(self, item: Item) -> list[str]:
        value = item.meta["value"]
        others = [v for v in self.world.values[item.meta["attribute"]] if v != value][:3]
        outputs = ["", str(item.messages[-1]["content"]), f"{others[0]}.", ", ".join(others), " or ".join(others)]
        if value is None:
            return [*outputs, f"I don't know. Perhaps {others[0]}.", f"{IDK} But {others[1]} is likely."]
        return [
            *outputs, IDK, f"{value} or {others[0]}", f"It is not {value}.", f"x{value}", f"{value}x", value[:-1],
            completion("chat", "", f"{others[0]}, {value}, {others[1]}"),
        ]  # fmt: skip


def _turn(question: str, name: str, answer: str) -> Turn:
    text = answer if answer.endswith(".") else f"{answer}."
    return Turn(question.format(name=name), "", text)
