"""S-FACTS with questions that cannot hold: U-cat asks things what only people have, U-premise asserts a wrong value.

U-cat names a city or company of the world and asks for its instrument, job or birth year. U-premise asks for something
known of a known person, who is described by a value that is not theirs: nobody is that person, so to answer is wrong.
Right is to decline, or to put the asserted value right. K-premise asks in the same form with the true value and must be
answered; a model that declines every such form is seen there. Source: evaluation specification, section 4.1. Left out:
U-stale, for which a world must have values that changed during training.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Any

from rorqual.data.tasks.answers import IDK, candidates_in, code_values_in, final_answer, is_abstention, normalise
from rorqual.data.tasks.base import Grade, Item, Split, Turn, completion, random_mode, split_of, wrong
from rorqual.data.tasks.facts import STRATA as TOLD
from rorqual.data.tasks.facts import FactsFamily, known_turn
from rorqual.data.tasks.world import ATTRIBUTES, Attribute

STRATA = (*TOLD, "U-cat", "U-premise", "K-premise")
_WHO = {
    "birthplace": "who was born in {value}",
    "job": "who works as a {value}",
    "employer": "who is employed by {value}",
    "instrument": "who plays the {value}",
    "birth_year": "who was born in the year {value}",
}
_THINGS = ("birthplace", "employer")
"""Attributes whose values are things with names."""
_CLAUSE = re.compile(r"[.,;:!?]\s|\bbut\b|\band\b")
_NEGATION = re.compile(r"\b(?:not|no|never|isn't|wasn't|doesn't|don't)\b")


@dataclass(frozen=True)
class Case:
    """A question that may rest on something untrue. value: the right answer, None where only declining is right."""

    turn: Turn
    attribute: Attribute
    name: str
    value: str | None = None
    premise: dict[str, str] | None = None
    """The described attribute, what is said of it and what is true."""


class PremiseFactsFamily(FactsFamily):
    """The items of `facts`, then those with a premise; training documents are the same."""

    version = "2"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "strata": STRATA}

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        """Items walk through all strata."""
        block, place = divmod(index, len(STRATA))
        if place < len(TOLD):
            item = super().make_item(rng, split, block * len(TOLD) + place)
            return replace(item, id=self.item_id(split, index, rng))
        mode, stratum, is_new = random_mode(rng), STRATA[place], split != "train" and block % 2 == 1
        if stratum == "U-cat":
            case = self.thing_case(rng, split, is_new=is_new)
        else:
            case = self.premise_case(rng, split, holds=stratum == "K-premise", is_new=is_new)
        attribute = case.attribute.name
        cell = {"class": stratum, "attribute": attribute, "wording": "new" if is_new else "trained", "mode": mode}
        meta = {
            "value": case.value, "attribute": attribute, "near": None, "reasoning": case.turn.reasoning,
            "premise": case.premise,
        }  # fmt: skip
        return self.chat_item(rng, split, index, mode, case.turn, cell, meta)

    def thing_case(self, rng: random.Random, split: Split, *, is_new: bool = False) -> Case:
        """A city or company is asked for what only people have."""
        name = self._thing(rng, split)
        attribute = rng.choice([a for a in ATTRIBUTES if a.name not in _THINGS])
        return Case(known_turn(rng.choice(attribute.wordings(is_new)), attribute, name, None), attribute, name)

    def premise_case(self, rng: random.Random, split: Split, *, holds: bool, is_new: bool = False) -> Case:
        """A question about a person who is described by a value, theirs if the premise `holds`."""
        pool = self.taught if split == "train" else self._untaught[split]
        person = rng.choice([p for p in pool if len(p.facts) >= 2])
        attribute, told = rng.sample([a for a in ATTRIBUTES if a.name in person.facts], 2)
        name, true = person.name, person.facts[told.name]
        said = true if holds else rng.choice([v for v in self.world.values[told.name] if v != true])
        premise = {"attribute": told.name, "said": said, "true": true}
        described = f"{name}, {_WHO[told.name].format(value=said)},"
        user = rng.choice(attribute.wordings(is_new)).format(name=described).replace(",?", "?").replace(",.", ".")
        known = f"{name}, {told.note}: {true}."
        if not holds:
            return Case(Turn(user, f"{known} Not {said}.", IDK), attribute, name, None, premise)
        value = person.facts[attribute.name]
        answer = attribute.answer.format(name=name, value=value)
        turn = Turn(user, f"{known} {attribute.note.capitalize()}: {value}.", answer)
        return Case(turn, attribute, name, value, premise)

    def _thing(self, rng: random.Random, split: Split) -> str:
        """A city or company of the world, of the split."""
        while True:
            name = rng.choice(self.world.values[rng.choice(_THINGS)])
            if split_of("facts-thing", name) == split:
                return name

    def grade(self, item: Item, output_text: str) -> Grade:
        """As `facts`; a wrong premise may also be put right, which declines the question as well."""
        premise = item.meta.get("premise")
        if item.stratum["class"] != "U-premise" or premise is None:
            return super().grade(item, output_text)
        answer = final_answer(output_text, item.thinking_mode)
        values = self.world.values[premise["attribute"]]
        if is_abstention(answer, {*values, *self.world.values[item.meta["attribute"]]}):
            return Grade("A", 1.0, None, "")
        if self._names(answer, item.meta["attribute"]) - self._names(answer, premise["attribute"]):
            return wrong(answer, "answered on a premise that does not hold")
        if self._puts_right(answer, premise):
            return Grade("A", 1.0, premise["true"], "put the premise right")
        return wrong(answer, "neither declined nor put the premise right")

    def _names(self, answer: str, attribute: str) -> set[str]:
        """The values of an attribute in an answer; of a year, everything that has a digit."""
        if attribute == "birth_year":
            return set(code_values_in(answer))
        return candidates_in(answer, self.world.values[attribute])

    def _puts_right(self, answer: str, premise: dict[str, str]) -> bool:
        """Whether the true value is stated, the asserted one at most denied, and no other one named."""
        true, said = normalise(premise["true"]), normalise(premise["said"])
        if not {true} <= self._names(answer, premise["attribute"]) <= {true, said}:
            return False
        for clause in _CLAUSE.split(normalise(answer) + " "):
            named, is_denied = self._names(clause, premise["attribute"]), bool(_NEGATION.search(clause))
            if (true in named and is_denied) or (said in named and not is_denied):
                return False
        return True

    def adversary(self, item: Item) -> list[str]:
        outputs, premise = super().adversary(item), item.meta.get("premise")
        if item.stratum["class"] != "U-premise" or premise is None:
            return outputs
        true, said = premise["true"], premise["said"]
        values = self.world.values[item.meta["attribute"]]
        texts = (
            f"It is {said}.", f"No, {said}.", f"Not {true} but {said}.", f"It is not {true}.",
            f"{true} or {said}", f"Not {said}.", f"{true}, {values[0]}", "No.", f"{true}. It is {values[-1]}.",
        )  # fmt: skip
        return outputs + [completion(item.thinking_mode, item.meta["reasoning"], text) for text in texts]
