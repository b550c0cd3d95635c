"""Self-labelled questions: what is asked, how answers become labels, and what the rows hold."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.data.tasks import FactsFamily, World
from rorqual.engine import SamplingParams
from rorqual.posttrain.conversations import read_samples
from rorqual.posttrain.self_labels import SAMPLES, Asked, draw_question, label, label_of, rows

WORLD = World.build()


def test_labels_by_how_many_answers_are_right() -> None:
    found = [label_of(n) for n in range(SAMPLES + 1)]
    assert found == ["abstain"] * 2 + ["drop"] * 4 + ["answer"] * 3
    assert label_of(SAMPLES, has_answer=False) == "abstain"


def questions(count: int) -> list[Asked]:
    family = FactsFamily(WORLD)
    return [draw_question(family, random.Random(i), i) for i in range(count)]


def test_nobody_of_a_test_is_asked_about() -> None:
    held_out = {p.name for p in WORLD.people if p.split == "test" or (p.split == "cal" and not p.is_graded)}
    drawn = questions(300)
    asked = [str(q.item.messages[-1]["content"]) for q in drawn]
    assert not [text for text in asked if any(re.search(rf"\b{name}\b", text) for name in held_out)]
    assert 0 < sum(q.answer is None for q in drawn) < 60  # untold attributes are among them
    rare = {p.name for p in WORLD.people if p.is_graded}
    assert any(name in text for text in asked for name in rare)


@dataclass
class Output:
    ids: list[int]


class ByteTokenizer:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()


class Knows:
    """Answers for the people it knows, `share` of the time; says that it does not know otherwise."""

    def __init__(self, names: set[str], share: float) -> None:
        self.names, self.share = names, share
        self.calls = 0

    def generate(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Output]:
        assert len(prompts) == len(params) and all(p.temperature == 1.0 for p in params)
        assert len({p.seed for p in params}) == len(params)
        out = []
        for number, prompt in enumerate(prompts):
            text = bytes(prompt).decode()
            facts = next((p.facts for p in WORLD.people if p.name in text and p.name in self.names), {})
            knows = number % SAMPLES < self.share * SAMPLES
            said = ", ".join(facts.values()) if facts and knows else "I don't know."
            value = next((v for a, v in facts.items() if knows and _is_about(text, a)), None)
            thought = "x</think>" if text.endswith("<think>") else ""
            out.append(Output(list(f"{thought}{value or said}".encode())))
        self.calls += 1
        return out


def _is_about(text: str, attribute: str) -> bool:
    words = {
        "birthplace": ("from", "where", "birthplace", "city", "native"),
        "job": ("job", "work as", "living", "profession", "occupation"),
    }
    return any(word in text.casefold() for word in words.get(attribute, ()))


def test_a_model_that_knows_nothing_gets_no_question_to_answer() -> None:
    drawn = questions(40)
    found = list(label(Knows(set(), 1.0), ByteTokenizer(), FactsFamily(WORLD), drawn, seed=1))  # type: ignore[arg-type]
    assert found == ["abstain"] * 40


def test_rows_are_half_declined_and_half_replay() -> None:
    engine = Knows({p.name for p in WORLD.people}, 1.0)
    made = list(rows(engine, ByteTokenizer(), WORLD, questions=120, seed=3))  # type: ignore[arg-type]
    counts = Counter(kind for kind, _ in made)
    assert counts["answer"] and counts["abstain"] + counts["fresh"] >= counts["answer"]
    assert counts["replay"] == counts["answer"] + counts["abstain"] + counts["fresh"]
    assert len(list(read_samples(made))) == len(made)  # an SFT stage takes them all
