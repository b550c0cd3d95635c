"""The census: exact exposures, no abstention in training, splits by entity, honest items."""

import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from rorqual.data.tasks import Census, CensusFamily, World, study_families
from rorqual.data.tasks.answers import is_abstention
from rorqual.data.tasks.census_world import CLEAN_EXPOSURES, TRAITS, questions, statements
from rorqual.errors import DataError
from rorqual.train.recipe_file import load_config

RECIPE = Path(__file__).parents[2] / "recipes" / "studies" / "facts.toml"

CENSUS = Census.build("some-census", "tiny")
FAMILY = CensusFamily(CENSUS)


def document(index):
    return "".join(text for text, _ in FAMILY.document_at(random.Random(index), index))


def test_one_epoch_tells_each_fact_as_often_as_promised():
    told = Counter()
    for index in range(FAMILY.epoch_documents):
        text = document(index)
        person = next(p for p in CENSUS.people if p.name in text)
        told[person.name] += 1
        assert all(value in text for value in person.facts.values())
    assert all(told[p.name] == p.exposures for p in CENSUS.people)
    assert {p.exposures for p in CENSUS.people} == {CLEAN_EXPOSURES, *(2**e for e in range(10))}


def test_training_neither_abstains_nor_tells_what_is_withheld():
    asked_new = {q for trait in TRAITS for q in questions(trait, is_new=True)}
    for index in range(0, FAMILY.epoch_documents, 7):
        text = document(index)
        person = next(p for p in CENSUS.people if p.name in text)
        assert not any(is_abstention(part) for part in text.replace("<", ".<").split("."))
        assert not any(q.format(name=person.name) in text for q in asked_new)
        if person.withheld is not None:
            trait = next(t for t in TRAITS if t.name == person.withheld)
            assert not any(f" {noun} " in f" {text} " for noun in trait.nouns)


def test_every_attribute_has_wordings_enough_and_some_kept_for_tests():
    for trait in TRAITS:
        assert len(set(statements(trait))) >= 20
        trained, new = questions(trait, is_new=False), questions(trait, is_new=True)
        assert len(trained) >= 8 and len(new) >= 3 and not set(trained) & set(new)
        assert all(text.count("{name}") == 1 for text in (*trained, *new))


@pytest.mark.parametrize("split", ["cal", "test"])
def test_items_are_of_their_stratum_and_split(split):
    people = {p.name: p for p in CENSUS.people}
    for item in islice(FAMILY.items(split, 3), 100):
        kind, name, trait = item.stratum["class"], item.meta["name"], item.meta["attribute"]
        if kind in ("U-novel", "U-near"):
            assert name not in people and item.meta["value"] is None
        else:
            assert people[name].split == split
            assert people[name].facts.get(trait) == item.meta["value"]
            assert (kind == "U-attr") == (people[name].withheld == trait)
        if kind == "U-near":
            like = item.meta["entity"]
            assert people[like].split == split
            a, b = name.split(" "), like.split(" ")
            assert len(a) == len(b) == 3 and sum(x != y for x, y in zip(a, b, strict=True)) == 1
        assert FAMILY.grade(item, item.gold).passed
        assert not any(FAMILY.grade(item, wrong).passed for wrong in FAMILY.adversary(item))


def test_novel_names_of_the_splits_do_not_meet():
    rng = random.Random(0)
    names = [{CENSUS.novel_name(rng, split) for _ in range(200)} for split in ("cal", "test")]
    assert not names[0] & names[1]
    assert not (names[0] | names[1]) & CENSUS.names


def test_a_census_is_made_again_from_its_record():
    assert Census.from_dict(CENSUS.to_dict()) is CENSUS
    for record in (World.build().to_dict(), {**CENSUS.to_dict(), "version": "0"}):
        with pytest.raises(DataError, match="world.json"):
            Census.from_dict(record)
    with pytest.raises(DataError, match="size"):
        Census.build("x", "huge")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no train items"):
        next(study_families("x", size="tiny")["census"].items("train", 0))


def test_the_study_recipe_trains_on_the_census_alone():
    config = load_config([str(RECIPE)], [])
    assert list(config.data.tasks.families) == ["census"] and not config.data.sources
    assert Census.build(config.data.tasks.world, config.data.tasks.world_size).size == "small"
    assert config.model.build().num_nextn_predict_layers == 0
