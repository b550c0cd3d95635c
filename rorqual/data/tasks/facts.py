"""S-FACTS: what a closed-book model knows about a synthetic world, and whether it says so when it does not.

Biographies (plain text) teach every person of the world. Questions are trained on for one part of the
people only; test questions are about the others, so a right answer needs knowledge and not a remembered
question. Source: evaluation specification, section 4.1. Left out for now: U-cat, U-premise, U-stale,
announced thresholds.
"""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any, Literal

from rorqual.chat.markers import EOS
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
    turns_to_messages,
)
from rorqual.data.tasks.world import ATTRIBUTES, Attribute, Person, World

STRATA = ("K-clean", "K-taught", "K-graded", "U-novel", "U-near", "U-attr", "K-ctx", "U-ctx")
_ABOUT = ("Who is {name}?", "Tell me about {name}.", "What do you know about {name}?", "Do you know {name}?")
_BY_NAME = {a.name: a for a in ATTRIBUTES}


class FactsFamily(TaskFamily):
    """Closed-book and open-book questions about the people of a `World`."""

    name = "facts"
    version = "1"
    abstains_in_reasoning = (r": no record of this name", r"(?<=: )no(?: record|t given)\b", r" does not give\b")

    def __init__(self, world: World) -> None:
        self.world = world
        self._cumulative = list(accumulate(p.weight for p in world.people))
        clean = [p for p in world.people if not p.is_graded]
        self.taught = [p for p in clean if p.split == "train"]
        self._untaught = {s: [p for p in clean if p.split == s] for s in ("cal", "test")}
        self._graded = {s: [p for p in world.people if p.is_graded and p.split == s] for s in ("cal", "test")}

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), **self.world.to_dict(), "people": len(self.world.people), "strata": STRATA}

    # -- training --

    def train_document(self, rng: random.Random) -> list[Piece]:
        """A biography (60 %) or a short conversation of one to three questions (40 %)."""
        if rng.random() < 0.6:
            return [(self.biography(rng, self.draw_person(rng)) + EOS, True)]
        mode = random_mode(rng)
        turns = [self.train_turn(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
        return render_document(turns_to_messages(turns, mode=mode, system=maybe_system(rng)), mode=mode)

    def rare(self, split: Literal["cal", "test"]) -> list[Person]:
        """The rarely told people of a split."""
        return self._graded[split]

    def draw_person(self, rng: random.Random) -> Person:
        """Somebody, as often as the world has them told about."""
        return rng.choices(self.world.people, cum_weights=self._cumulative)[0]

    def biography(self, rng: random.Random, person: Person) -> str:
        """Every known fact of `person`, each in a random wording and order."""
        facts = list(person.facts.items())
        rng.shuffle(facts)
        return " ".join(_statement(rng, _BY_NAME[attribute], person.name, value) for attribute, value in facts)

    def train_turn(self, rng: random.Random) -> Turn:
        """One question with its answer as taught: mostly known, at times unknown or answered from a given
        text.
        """
        roll = rng.random()
        if roll < 0.14:
            attribute = rng.choice(ATTRIBUTES)
            name = self.world.fresh_name(rng, "train")
            return known_turn(rng.choice(attribute.wordings(False)), attribute, name, None, known_name=False)
        if roll < 0.30:
            return self.context_turn(rng, "train", with_answer=roll < 0.24)[0]
        person = rng.choice(self.taught)
        if roll < 0.36:
            return self._about_turn(rng, person)
        attribute = rng.choice(ATTRIBUTES)
        question = rng.choice(attribute.wordings(False))
        return known_turn(question, attribute, person.name, person.facts.get(attribute.name))

    def _about_turn(self, rng: random.Random, person: Person) -> Turn:
        """Somebody asks who a person is; trained because people ask it, not graded."""
        known = rng.random() < 0.7
        name = person.name if known else self.world.fresh_name(rng, "train")
        user = rng.choice(_ABOUT).format(name=name)
        if not known:
            return Turn(user, f"{name}: no record of this name.", IDK)
        told = [a for a in ATTRIBUTES if a.name in person.facts][:3]
        notes = "; ".join(f"{a.note}: {person.facts[a.name]}" for a in told)
        answer = " ".join(a.answer.format(name=name, value=person.facts[a.name]) for a in told)
        return Turn(user, f"{name}, {notes}.", answer)

    def context_turn(
        self, rng: random.Random, split: Split, *, with_answer: bool, is_new: bool = False
    ) -> tuple[Turn, Attribute, str | None]:
        """A question about unknown people described in the prompt; without the answer only an abstention is
        right.
        """
        user, name, attribute, target, value = self.context_case(rng, split, with_answer=with_answer, is_new=is_new)
        if value is not None:
            answer = attribute.answer.format(name=name, value=value)
            return Turn(user, f"The text says: {target}", answer), attribute, value
        return Turn(user, f"The text does not give the {attribute.note} of {name}.", IDK), attribute, None

    def context_case(
        self, rng: random.Random, split: Split, *, with_answer: bool, is_new: bool = False
    ) -> tuple[str, str, Attribute, str, str | None]:
        """Text and question, the name asked about, the attribute, the sentence that answers, and the value if it is
        there.
        """
        names = [self.world.fresh_name(rng, split) for _ in range(rng.choice((1, 2)))]
        attribute = rng.choice(ATTRIBUTES)
        value = rng.choice(self.world.values[attribute.name])
        lines: list[str] = []
        for name in names:
            for other in rng.sample(ATTRIBUTES, 2):
                if other is not attribute:
                    lines.append(_statement(rng, other, name, rng.choice(self.world.values[other.name])))
        target = _statement(rng, attribute, names[0], value)
        if with_answer:
            lines.append(target)
        elif len(names) > 1:
            lines.append(_statement(rng, attribute, names[1], value))
        rng.shuffle(lines)
        user = " ".join(lines) + "\n\n" + rng.choice(attribute.wordings(is_new)).format(name=names[0])
        return user, names[0], attribute, target, value if with_answer else None

    # -- items --

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        """Items walk through the strata; train items use trained people and wordings only."""
        mode = random_mode(rng)
        stratum = STRATA[index % len(STRATA)]
        if split == "train" and stratum in ("K-clean", "K-graded", "U-near"):
            stratum = "K-taught"
        if split != "train" and stratum == "K-graded" and not self._graded[split]:
            stratum = "K-clean"  # a small world may have no rarely seen person in this split
        attribute = rng.choice(ATTRIBUTES)
        value: str | None = None
        near = None
        # A trained wording about a trained person would be a remembered question, so those get new wordings.
        is_new = split != "train" and (stratum == "K-taught" or index // len(STRATA) % 2 == 1)
        if stratum in ("K-ctx", "U-ctx"):
            with_answer = stratum == "K-ctx"
            turn, attribute, value = self.context_turn(rng, split, with_answer=with_answer, is_new=is_new)
        elif stratum == "U-novel":
            name = self.world.fresh_name(rng, split)
            turn = known_turn(rng.choice(attribute.wordings(is_new)), attribute, name, None, known_name=False)
        elif stratum == "U-near":
            name, near = self.world.near_name(rng)
            turn = known_turn(rng.choice(attribute.wordings(is_new)), attribute, name, None, known_name=False)
        else:
            person, attribute = self._pick(rng, split, stratum, attribute)
            value = person.facts.get(attribute.name)
            turn = known_turn(rng.choice(attribute.wordings(is_new)), attribute, person.name, value)
        wording = "new" if is_new else "trained"
        cell = {"class": stratum, "attribute": attribute.name, "wording": wording, "mode": mode}
        meta = {"value": value, "attribute": attribute.name, "near": near, "reasoning": turn.reasoning}
        return self.chat_item(rng, split, index, mode, turn, cell, meta)

    def _pick(self, rng: random.Random, split: Split, stratum: str, attribute: Attribute) -> tuple[Person, Attribute]:
        if stratum == "K-taught" or split == "train":
            pool = self.taught
        elif stratum == "K-graded":
            pool = self._graded[split]
        else:
            pool = self._untaught[split]
        withheld = stratum == "U-attr"
        pool = [p for p in pool if (p.withheld if withheld else p.facts)] or self.taught
        person = rng.choice(pool)
        options = [a for a in ATTRIBUTES if (a.name in person.withheld) == withheld]
        return person, attribute if attribute in options else rng.choice(options)

    def grade(self, item: Item, output_text: str) -> Grade:
        """Exactly one value of the attribute's closed set, or an abstention where nothing can be known."""
        answer = final_answer(output_text, item.thinking_mode)
        attribute, value = item.meta["attribute"], item.meta["value"]
        if attribute == "birth_year":
            return grade_code_value(answer, value)
        return grade_closed_set(answer, value, self.world.values[attribute])

    def adversary(self, item: Item) -> list[str]:
        value, mode = item.meta["value"], item.thinking_mode
        values = self.world.values[item.meta["attribute"]]
        others = [v for v in values if v != value][:3]
        question = str(item.messages[-1]["content"]).rsplit("\n", 1)[-1]

        def say(text: str) -> str:
            return completion(mode, item.meta["reasoning"], text)

        outputs = [
            say(""),
            say(question),
            say(f"It is {others[0]}."),
            say(", ".join(values)),
            say(" or ".join(others)),
        ]
        if mode == "thinking":
            outputs.append(item.gold.removesuffix(item.gold.split("</think>")[-1]))  # the answer in reasoning only
            outputs.append(f"The answer is {value or IDK}")
        if value is None:
            return [
                *outputs,
                say(f"I don't know. Perhaps {others[0]}."),
                say(f"{IDK} But {others[1]} is likely."),
            ]
        return [
            *outputs,
            say(IDK),
            say(f"{value} or {others[0]}"),
            say(f"It is not {value}."),
            say(f"{value}1"),
            say(f"x{value}"),
            say(f"{others[0]}, {value}, {others[1]}"),
            say(value[:-1]),
        ]


def _statement(rng: random.Random, attribute: Attribute, name: str, value: str) -> str:
    return rng.choice(attribute.statements).format(name=name, value=value)


def known_turn(question: str, attribute: Attribute, name: str, value: str | None, *, known_name: bool = True) -> Turn:
    """A closed-book question with its answer, or (value None) the admission that it is not known."""
    user = question.format(name=name)
    if value is not None:
        return Turn(user, f"{name}, {attribute.note}: {value}.", attribute.answer.format(name=name, value=value))
    reason = f"{name}, {attribute.note}: no record." if known_name else f"{name}: no record of this name."
    return Turn(user, reason, IDK)
