"""The study of rewriting facts: which rows an edit may touch, what it changes, and that everything is put back."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from engram_edits import STEPS, Asker, Fact, Text, known_facts, memory_rows, name_ends, neighbours, rewrite, study

from rorqual import load
from rorqual.config import ModelConfig
from rorqual.data.tasks import World
from rorqual.data.tasks.world import ATTRIBUTES
from rorqual.model import Transformer
from rorqual.model.engram import memories
from rorqual.tokenizer import Tokenizer

WORLD = World.build()


@pytest.fixture(scope="module")
def asker() -> Asker:
    tokenizer: Tokenizer = load("minke")[1]
    model = Transformer(ModelConfig.preset("minke-engram"), seed=3).eval()
    return Asker(model, tokenizer)


def a_fact(number: int = 0) -> Fact:
    person = [p for p in WORLD.people if len(p.facts) == len(ATTRIBUTES)][number]
    return Fact(person, ATTRIBUTES[number % len(ATTRIBUTES)])


def rows_by_hand(asker: Asker, text: Text, name: list[int]) -> set[int]:
    """Rows of every run that holds the name's last two tokens, with plain integers."""
    (memory,) = memories(asker.model)
    hashes, settings = memory.hash, memory.settings
    ids = [int(hashes.compression[i]) for i in text.ids]
    pad = int(hashes.compression[settings.pad_token_id])
    found = set()
    for end in range(len(ids)):
        for number, order in enumerate(settings.orders):
            places = range(end - order + 1, end + 1)
            if not any(a in places and a + 1 in places and list(text.ids[a : a + 2]) == name[-2:] for a in range(end)):
                continue
            mixed = 0
            for back in range(order):
                mixed ^= (ids[end - back] if end >= back else pad) * int(hashes.multipliers[back])
            for head in range(settings.heads):
                at = number * settings.heads + head
                found.add(mixed % int(hashes.sizes[at]) + int(hashes.offsets[at]))
    return found


def test_an_edit_s_rows_are_those_of_the_runs_that_hold_the_name(asker: Asker) -> None:
    for number in range(6):
        fact = a_fact(number)
        name = asker.tokenizer.encode(" " + fact.person.name)
        texts = [asker.answer(fact, wording, fact.value) for wording in (0, 3, 7)]
        assert all(list(name_ends(text.ids, name)) for text in texts)
        (rows,) = memory_rows(asker.model, texts, name)
        assert set(rows.tolist()) == set().union(*(rows_by_hand(asker, text, name) for text in texts))


def test_a_text_goes_on_as_it_would_be_encoded_whole(asker: Asker) -> None:
    for number in range(10):
        fact = a_fact(number)
        texts = [asker.answer(fact, wording, fact.value) for wording in range(len(fact.attribute.questions))]
        texts += [t for i in range(8) if (t := asker.statement(fact, i, fact.value)) is not None]
        for text in texts:
            whole = asker.tokenizer.decode([*text.ids[1:], *text.wanted])
            assert asker.tokenizer.encode(whole) == [*text.ids[1:], *text.wanted]
            assert whole.endswith(" " + fact.value) and fact.person.name in whole


def test_rewriting_moves_its_rows_and_nothing_else(asker: Asker) -> None:
    fact = a_fact()
    new = next(v for v in WORLD.values[fact.attribute.name] if v != fact.value)
    texts = [asker.answer(fact, wording, new) for wording in range(3)]
    (rows,) = memory_rows(asker.model, texts, asker.tokenizer.encode(" " + fact.person.name))
    before = {name: value.clone() for name, value in asker.model.state_dict().items()}
    table = memories(asker.model)[0].table
    at_first = asker.loss(texts).item()
    edit = rewrite(asker, [(table, rows)], texts)
    assert edit.loss < at_first and 0 < edit.steps <= STEPS and edit.rows == len(rows)
    moved = {name for name, value in asker.model.state_dict().items() if not torch.equal(value, before[name])}
    (only,) = moved
    assert only.endswith("engram.table")
    changed = (table != before[only]).any(-1).nonzero().flatten()
    assert set(changed.tolist()) <= set(rows.tolist()) and len(changed)
    with torch.no_grad():
        table.copy_(before[only])


def test_a_study_puts_everything_back_and_asks_only_what_was_known() -> None:
    model, tokenizer = load("minke")
    asker = Asker(model.eval(), tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held, edits = study(asker, WORLD, "embedding", count=2, seed=1, near=3)
    assert len(edits) == 2 and all(edit.rows >= 2 for edit in edits)
    assert held["new value"] and held["kept: anybody"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neighbours_share_what_they_are_named_for() -> None:
    fact = a_fact(2)
    near = neighbours(WORLD, fact, random.Random(0), 5)
    first, family = fact.person.name.split(" ")
    assert all(f.person is fact.person and f.attribute is not fact.attribute for f in near["same person"])
    assert all(f.person.name.startswith(first + " ") for f in near["same first name"])
    assert all(f.person.name.endswith(" " + family) for f in near["same family name"])
    assert all(f.value == fact.value for f in near["same value"])
    assert len(near["same person"]) == 4 and len(near["anybody"]) == len(near["same value"]) == 5
    for kind, facts in near.items():
        assert kind == "same person" or all(f.attribute is fact.attribute for f in facts)


def test_known_facts_are_said_by_the_model() -> None:
    model, tokenizer = load("minke")
    asker = Asker(model.eval(), tokenizer)
    facts = known_facts(asker, WORLD, random.Random(5), 3)
    assert len({fact.person.name for fact in facts}) == 3
    for fact in facts:
        assert all(asker.says([asker.answer(fact, 0, fact.value)]))
        other = next(v for v in WORLD.values[fact.attribute.name] if v != fact.value)
        assert asker.says([asker.answer(fact, 0, other)]) == [False]
