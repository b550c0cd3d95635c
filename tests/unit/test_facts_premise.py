"""Facts with a premise: what the questions say of the world, and which answers decline them."""

from itertools import islice

import pytest

from rorqual.data.tasks import SPLITS, World
from rorqual.data.tasks.base import Item, Split, completion, split_of
from rorqual.data.tasks.facts_premise import STRATA, PremiseFactsFamily

WORLD = World.build()
FAMILY = PremiseFactsFamily(WORLD)


def take(split: Split, count: int = 220) -> list[Item]:
    return list(islice(FAMILY.items(split, 3), count))


def say(item: Item, text: str) -> str:
    return completion(item.thinking_mode, "", text)


@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_passes_and_every_adversary_fails(split: Split) -> None:
    for item in take(split):
        assert FAMILY.grade(item, item.gold).passed
        for output in FAMILY.adversary(item):
            assert not FAMILY.grade(item, output).passed, (item, output)


def test_premises_are_about_known_people_of_the_split_and_true_or_not() -> None:
    people = {p.name: p for p in WORLD.people}
    seen = {"U-premise": 0, "K-premise": 0}
    for item in take("test"):
        kind, premise = item.stratum["class"], item.meta.get("premise")
        if kind not in seen:
            assert premise is None
            continue
        seen[kind] += 1
        question = item.messages[-1]["content"]
        person = next(p for name, p in people.items() if name in question)
        assert person.split == "test" and person.facts[premise["attribute"]] == premise["true"]
        assert premise["said"] in question and item.meta["attribute"] in person.facts
        assert (premise["said"] == premise["true"]) == (kind == "K-premise") == (item.meta["value"] is not None)
    assert min(seen.values()) >= 15


def test_things_are_asked_what_only_people_have_and_their_splits_do_not_meet() -> None:
    things = {*WORLD.values["birthplace"], *WORLD.values["employer"]}
    for split in SPLITS:
        asked = [i for i in take(split) if i.stratum["class"] == "U-cat"]
        assert len(asked) == 20
        for item in asked:
            named = [t for t in things if t in item.messages[-1]["content"]]
            assert len(named) == 1 and split_of("facts-thing", named[0]) == split
            assert item.meta["attribute"] in ("job", "instrument", "birth_year") and item.meta["value"] is None


def test_a_wrong_premise_may_be_put_right() -> None:
    for item in (i for i in take("test") if i.stratum["class"] == "U-premise"):
        true, said = item.meta["premise"]["true"], item.meta["premise"]["said"]
        for text in (f"It is {true}, not {said}.", f"No, {true}.", f"Not {said}. It is {true}."):
            grade = FAMILY.grade(item, say(item, text))
            assert grade.passed and grade.grade == "A", text
        for text in (f"It is {said}, not {true}.", f"{true} and {said}."):
            assert FAMILY.grade(item, say(item, text)).grade == "I", text


def test_the_other_classes_are_those_of_facts() -> None:
    classes = [item.stratum["class"] for item in take("test", len(STRATA))]
    assert classes == list(STRATA)
    assert len({item.id for item in take("test")}) == 220
