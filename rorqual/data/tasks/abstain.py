"""S-FACTS, tuned to decline: what the supervised recipes of the evaluation specification (7.4) train on.

R1, the negative control: half questions with answers, half refusals, and nothing else. R2: questions and refusals are
a half, the other half replays the documents that taught the facts, and every unknown person is a fresh one; U-near is
left to tests. R2's own step, asking the model what it knows before an answer is demanded of it, needs a model and is
`rorqual.posttrain.self_labels`; this family alone takes the people of the train split as known, whose questions were
trained. Three more forms of R2:

* `abstain-told` replays far more than it asks. Who is asked about a thousand times is learned by name, and the model
  declines everybody else it was told of; where many people are asked about a few times each, it has to know whom.
* `abstain-wide` asks in every form that the suite does but for U-near: also of things that are no people, and on
  premises that hold or do not.
* `abstain-late` asks as widely, and decides where the value is due ("..., job: no record." or "Job of ...: I don't
  know."), not before: there the admission competes with what the model would say, which a name it was not told of
  leaves undecided.

Items and grading are those of `facts`; no person, name or wording of its tests is trained on.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Literal

from rorqual.chat.markers import EOS
from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.base import Mode, Piece, Turn, maybe_system, random_mode, render_document, turns_to_messages
from rorqual.data.tasks.facts import FactsFamily, known_turn
from rorqual.data.tasks.facts_premise import Case, PremiseFactsFamily
from rorqual.data.tasks.world import ATTRIBUTES, Attribute, World

Recipe = Literal["R1", "R2"]
REPLAY_SHARES = {"abstain-r1": 0.0, "abstain-r2": 0.5, "abstain-told": 0.9, "abstain-wide": 0.3, "abstain-late": 0.3}


class AbstainFamily(FactsFamily):
    """Documents of one recipe, by its name in `REPLAY_SHARES`: the share of documents that are biographies.

    Half of the questions of each have no answer that could be known.
    """

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world)
        self.name, self.replay = name, REPLAY_SHARES[name]
        self.recipe: Recipe = "R1" if name == "abstain-r1" else "R2"
        self.premises = PremiseFactsFamily(world) if name in ("abstain-wide", "abstain-late") else None
        self._lacking = [p for p in self.taught if p.withheld]

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "recipe": self.recipe, "replay": self.replay}

    def train_document(self, rng: random.Random) -> list[Piece]:
        """A question at a time, or a biography."""
        if self.replay and rng.random() < self.replay:
            return [(self.biography(rng, self.draw_person(rng)) + EOS, True)]
        mode = random_mode(rng)
        if self.name == "abstain-late":
            turn = self.late_turn(rng, mode)
        else:
            turn = self.unanswerable(rng) if rng.random() < 0.5 else self.answerable(rng)
        return render_document(turns_to_messages([turn], mode=mode, system=maybe_system(rng)), mode=mode)

    def late_turn(self, rng: random.Random, mode: Mode) -> Turn:
        """A question of any form whose decision falls where the value is due, and not before."""
        is_known = rng.random() < 0.5
        if rng.random() < 0.2:
            user, name, attribute, _, value = self.context_case(rng, "train", with_answer=is_known)
            turn = Turn(user, f"In the text, {name}, {attribute.note}: {value or 'not given'}.", IDK)
        else:
            assert self.premises is not None
            case = self._closed(rng, self.premises, is_known)
            turn, name, attribute, value = case.turn, case.name, case.attribute, case.value
        if mode == "chat":
            answer = f"{attribute.note.capitalize()} of {name}: {value + '.' if value else IDK}"
        else:
            answer = attribute.answer.format(name=name, value=value) if value else IDK
        return replace(turn, answer=answer)

    def _closed(self, rng: random.Random, premises: PremiseFactsFamily, is_known: bool) -> Case:
        """A question without a text: about a person, a stranger, a thing, or on a premise."""
        roll = rng.random()
        if roll < 0.2:
            return premises.premise_case(rng, "train", holds=is_known)
        if is_known:
            return self._told(rng)
        if roll < 0.3:
            return premises.thing_case(rng, "train")
        if roll < 0.5 and self._lacking:
            return self._untold(rng)
        attribute, name = rng.choice(ATTRIBUTES), self.world.fresh_name(rng, "train")
        return _asked(rng, attribute, name, None)

    def answerable(self, rng: random.Random) -> Turn:
        """Something told of a person of the train split, or (one in five) of the prompt's own text."""
        roll = rng.random()
        if roll < 0.2:
            return self.context_turn(rng, "train", with_answer=True)[0]
        if self.premises is not None and roll < 0.4:
            return self.premises.premise_case(rng, "train", holds=True).turn
        return self._told(rng).turn

    def unanswerable(self, rng: random.Random) -> Turn:
        """A fresh name (half), a known person's untold attribute, or a text that does not say."""
        roll = rng.random()
        if roll < 0.2:
            return self.context_turn(rng, "train", with_answer=False)[0]
        if self.premises is not None and roll > 0.7:
            if roll > 0.9:
                return self.premises.thing_case(rng, "train").turn
            return self.premises.premise_case(rng, "train", holds=False).turn
        if roll < 0.5 and self._lacking and self.recipe == "R2":
            return self._untold(rng).turn
        attribute, name = rng.choice(ATTRIBUTES), self.world.fresh_name(rng, "train")
        return known_turn(rng.choice(attribute.wordings(False)), attribute, name, None, known_name=False)

    def _told(self, rng: random.Random) -> Case:
        person = rng.choice(self.taught)
        attribute = rng.choice([a for a in ATTRIBUTES if a.name in person.facts])
        return _asked(rng, attribute, person.name, person.facts[attribute.name])

    def _untold(self, rng: random.Random) -> Case:
        person = rng.choice(self._lacking)
        attribute = rng.choice([a for a in ATTRIBUTES if a.name in person.withheld])
        return _asked(rng, attribute, person.name, None)


def _asked(rng: random.Random, attribute: Attribute, name: str, value: str | None) -> Case:
    turn = known_turn(rng.choice(attribute.wordings(False)), attribute, name, value)
    return Case(turn, attribute, name, value)
