"""S-FACTS, tuned to decline: what the supervised recipes of the evaluation specification (7.4) train on.

R1, the negative control: half questions with answers, half refusals, and nothing else. R2: questions and refusals are
a half, the other half replays the documents that taught the facts, and every unknown person is a fresh one; U-near is
left to tests. R2's own step, asking the model what it knows before an answer is demanded of it, needs a model and is
`rorqual.posttrain.self_labels`; this family alone takes the people of the train split as known, whose questions were
trained. Items and grading are those of `facts`; no person, name or wording of its tests is trained on.
"""

from __future__ import annotations

import random
from typing import Any, Literal

from rorqual.chat.markers import EOS
from rorqual.data.tasks.base import Piece, Turn, maybe_system, random_mode, render_document, turns_to_messages
from rorqual.data.tasks.facts import FactsFamily, known_turn
from rorqual.data.tasks.world import ATTRIBUTES, World

Recipe = Literal["R1", "R2"]
REPLAY_SHARE = 0.5


class AbstainFamily(FactsFamily):
    """Documents of one recipe. Half of the questions of either have no answer that could be known."""

    def __init__(self, world: World, recipe: Recipe) -> None:
        super().__init__(world)
        self.recipe = recipe
        self.name = f"abstain-{recipe.lower()}"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "recipe": self.recipe, "replay": REPLAY_SHARE if self.recipe == "R2" else 0.0}

    def train_document(self, rng: random.Random) -> list[Piece]:
        """A question at a time, or under R2 as often a biography."""
        if self.recipe == "R2" and rng.random() < REPLAY_SHARE:
            return [(self.biography(rng, self.draw_person(rng)) + EOS, True)]
        mode = random_mode(rng)
        turn = self.unanswerable(rng) if rng.random() < 0.5 else self.answerable(rng)
        return render_document(turns_to_messages([turn], mode=mode, system=maybe_system(rng)), mode=mode)

    def answerable(self, rng: random.Random) -> Turn:
        """Something told of a person of the train split, or (one in five) of the prompt's own text."""
        if rng.random() < 0.2:
            return self.context_turn(rng, "train", with_answer=True)[0]
        person = rng.choice(self.taught)
        attribute = rng.choice([a for a in ATTRIBUTES if a.name in person.facts])
        return known_turn(rng.choice(attribute.wordings(False)), attribute, person.name, person.facts[attribute.name])

    def unanswerable(self, rng: random.Random) -> Turn:
        """A fresh name (half), a known person's untold attribute, or a text that does not say."""
        roll = rng.random()
        if roll < 0.2:
            return self.context_turn(rng, "train", with_answer=False)[0]
        lacking = [p for p in self.taught if p.withheld]
        if roll < 0.5 and lacking and self.recipe == "R2":
            person = rng.choice(lacking)
            attribute = rng.choice([a for a in ATTRIBUTES if a.name in person.withheld])
            return known_turn(rng.choice(attribute.wordings(False)), attribute, person.name, None)
        attribute, name = rng.choice(ATTRIBUTES), self.world.fresh_name(rng, "train")
        return known_turn(rng.choice(attribute.wordings(False)), attribute, name, None, known_name=False)
