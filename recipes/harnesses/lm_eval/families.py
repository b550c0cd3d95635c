"""Rorqual's task families as data sets of lm-evaluation-harness: items from the generators, grades from the graders.

Nothing is stored: an item is made again from its place in the stream when its answer is graded, so a task is named by
its family, split, seed and world alone. `--metadata '{"seed": 1, "count": 500}'` changes what is asked.
"""

import json
from functools import cache
from itertools import islice
from typing import Any

import datasets

from rorqual.data.tasks import DEFAULT_WORLD, families
from rorqual.data.tasks.base import Item


@cache
def _items(family: str, split: str, seed: int, count: int, world: str) -> tuple[Item, ...]:
    return tuple(islice(families(world)[family].items(split, seed), count))


def _document(item: Item, place: dict[str, Any]) -> dict[str, str]:
    chat = [m for m in item.messages if m["role"] == "user"]
    return {
        "id": item.id,
        "prompt": item.prompt_text(),
        "question": str(chat[-1]["content"]) if chat else "",
        "gold": item.gold,
        "place": json.dumps(place),
    }


def completions(
    family: str, split: str = "test", seed: int = 0, count: int = 200, world: str = DEFAULT_WORLD, **_: Any
) -> dict[str, datasets.Dataset]:
    """Every item with its whole prompt, for `local-completions`."""
    place = {"family": family, "split": split, "seed": seed, "count": count, "world": world}
    items = _items(family, split, seed, count, world)
    rows = [_document(item, {**place, "at": at}) for at, item in enumerate(items)]
    return {"test": datasets.Dataset.from_list(rows)}


def chats(**parameters: Any) -> dict[str, datasets.Dataset]:
    """Only items that are one question in chat mode without tools: a chat endpoint renders them as we do."""
    rows = []
    for row in completions(**parameters)["test"]:
        item = _item(row)
        if item.thinking_mode == "chat" and item.tools is None and [m["role"] for m in item.messages] == ["user"]:
            rows.append(row)
    return {"test": datasets.Dataset.from_list(rows)}


def choices(**parameters: Any) -> dict[str, datasets.Dataset]:
    """Known facts in chat mode as a choice between the right value and others of its set, by likelihood."""
    rows = []
    for row in completions(**{**parameters, "family": "facts"})["test"]:
        item = _item(row)
        value = item.meta["value"]
        if item.thinking_mode != "chat" or value is None or item.stratum["class"] in ("K-ctx", "U-ctx"):
            continue
        values = families(json.loads(row["place"])["world"])["facts"].world.values[item.meta["attribute"]]
        others = [other for other in values if other != value][:3]
        options = sorted({value, *others})
        texts = [item.gold.replace(value, option) for option in options]
        rows.append({**row, "options": texts, "label": texts.index(item.gold)})
    return {"test": datasets.Dataset.from_list(rows)}


def _item(row: dict[str, Any]) -> Item:
    place = json.loads(row["place"])
    return _items(place["family"], place["split"], place["seed"], place["count"], place["world"])[place["at"]]


def grade(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """What our grader says of the answer: right, abstained, and answered though wrong."""
    place = json.loads(row["place"])
    verdict = families(place["world"])[place["family"]].grade(_item(row), results[0])
    return {
        "correct": float(verdict.passed),
        "abstained": float(verdict.grade == "A"),
        "incorrect": float(verdict.grade in ("I", "P")),
    }
