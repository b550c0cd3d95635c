"""The contract of the evaluation families: graders, adversaries, splits, determinism, rendering."""

import itertools
import json
import random

import pytest

from rorqual.chat import encode_messages
from rorqual.chat.markers import EOS
from rorqual.data.tasks import CANARY, SPLITS, Item, TaskFamily, evaluation_families

FAMILIES = evaluation_families()
NAMES = sorted(FAMILIES)


def take(family: TaskFamily, split: str, count: int, seed: int = 7) -> list[Item]:
    return list(itertools.islice(family.items(split, seed), count))  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_every_gold_passes_and_every_adversary_fails(name: str, split: str) -> None:
    family = FAMILIES[name]
    for item in take(family, split, 36):
        for ending in ("", EOS):
            grade = family.grade(item, item.gold + ending)
            assert grade.passed and grade.grade in "CA", (item, grade)
        outputs = family.adversary(item)
        assert len(outputs) >= 5
        for output in outputs:
            grade = family.grade(item, output)
            assert not grade.passed and grade.grade in "IPAX", (output, item.gold, grade)


@pytest.mark.parametrize("name", NAMES)
def test_items_and_documents_are_functions_of_the_seed(name: str) -> None:
    again = evaluation_families()[name]
    first = [FAMILIES[name].train_document(rng) for rng in [random.Random(1)] for _ in range(10)]
    assert first == [again.train_document(rng) for rng in [random.Random(1)] for _ in range(10)]
    assert first != [again.train_document(rng) for rng in [random.Random(2)] for _ in range(10)]
    assert take(FAMILIES[name], "test", 12) == take(again, "test", 12)
    assert [i.gold for i in take(again, "test", 12)] != [i.gold for i in take(again, "test", 12, seed=8)]
    assert len({i.id for split in SPLITS for i in take(again, split, 12)}) == 36


@pytest.mark.parametrize("name", NAMES)
def test_an_item_does_not_depend_on_those_before_it(name: str) -> None:
    assert take(FAMILIES[name], "test", 9)[8] == take(FAMILIES[name], "test", 20)[8]


@pytest.mark.parametrize("name", NAMES)
def test_grading_survives_json(name: str) -> None:
    for split in ("train", "test"):
        for item in take(FAMILIES[name], split, 8):
            record = json.loads(json.dumps(item.to_dict()))
            assert (record.pop("canary", None) == CANARY) == (split == "test")
            assert FAMILIES[name].grade(Item(**record), item.gold).passed


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_rendered_chat_with_loss_on_the_assistant_only(name: str) -> None:
    rng = random.Random(3)
    for _ in range(30):
        pieces = FAMILIES[name].train_document(rng)
        text = "".join(text for text, _ in pieces)
        assert text.endswith(EOS) and CANARY not in text and "<｜User｜>" in text
        for part, is_loss in pieces:
            if is_loss:
                assert part.endswith(EOS) and part.count(EOS) == 1
            else:
                assert part.endswith(("<think>", "</think>")), part[-40:]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_what_the_encoder_writes(name: str) -> None:
    for item in take(FAMILIES[name], "test", 12):
        prompt = encode_messages(item.messages, tools=item.tools, thinking_mode=item.thinking_mode)
        assert item.prompt_text() == prompt
        assert prompt.endswith("<think>" if item.thinking_mode == "thinking" else "</think>")


@pytest.mark.parametrize("name", NAMES)
def test_items_walk_through_their_strata(name: str) -> None:
    """Every stratum that a suite reports has several values among the first items."""
    items = take(FAMILIES[name], "test", 72)
    first = next(iter(items[0].stratum))
    assert len({str(item.stratum[first]) for item in items}) > 1
    modes = {"thinking"} if name == "threads" else {"chat", "thinking"}  # reasoning is what threads are about
    assert {item.thinking_mode for item in items} == modes
