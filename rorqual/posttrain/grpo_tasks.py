"""Prompts of a GRPO run: drawn from task families, datasets or a user's own generator, each used once.

Prompt number n of a run is a function of the seed and of n, so a resumed run asks what the uninterrupted one would
have asked. Families draw from their `train` split for training and from `cal` for evaluations; `test` is never seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.chat import encode_messages
from rorqual.data.tasks import World, named_families
from rorqual.data.tasks.base import Item, Mode, Split, TaskFamily
from rorqual.errors import ConfigError, DataError
from rorqual.posttrain.grpo_config import GRPOConfig, ModeSection, TaskSection
from rorqual.posttrain.rewards.confidence import announce_confidence
from rorqual.posttrain.rewards.graded import announce_penalty
from rorqual.posttrain.rewards.length import announce_budget
from rorqual.posttrain.rewards.registry import load_dotted
from rorqual.seeds import derive

MOST_TRIES = 10_000
"""Items looked at for one that a task's `where` and mode take."""

_ANSWERS = ("answer", "solution", "ground_truth")


@dataclass(frozen=True)
class Question:
    """A prompt of a run. task: number of its task, -1 for judgements."""

    item: Item
    task: int
    mode: str
    window: int

    @property
    def text(self) -> str:
        """What the model continues, BOS included."""
        if self.item.prompt is not None:
            return self.item.prompt_text()
        return encode_messages(
            self.item.messages,
            tools=self.item.tools,
            thinking_mode=self.item.thinking_mode,
            reasoning_effort="max" if self.mode == "max" else None,
        )


def thinking_mode(mode: str) -> Mode:
    """How the chat format puts an effort mode."""
    return "chat" if mode == "off" else "thinking"


def families_of(config: GRPOConfig, base: Path) -> dict[str, TaskFamily]:
    """All task families, over the world that the model of folder `base` was taught."""
    world = World.taught_to(base, config.world)
    return named_families(world.world_id, size=world.size)


class TaskStream:
    """The prompts of a run by their number. Raises: ConfigError, DataError for a source that cannot be read."""

    def __init__(self, config: GRPOConfig, known: Mapping[str, TaskFamily], seed: int) -> None:
        self._tasks, self._modes, self._seed = config.tasks, config.modes, seed
        self._sources = [_source(task.source, known) for task in config.tasks]

    def question(self, number: int) -> Question:
        """Prompt `number` of the training."""
        return self._draw("train", number, None)

    def held_out(self, task: int, count: int) -> list[Question]:
        """`count` prompts of a task that training never asks, the same at every call."""
        return [self._draw("cal", number, task) for number in range(count)]

    def _draw(self, split: Split, number: int, task: int | None) -> Question:
        rng = random.Random(derive(self._seed, "grpo-prompt", split, number, -1 if task is None else task))
        if task is None:
            [task] = rng.choices(range(len(self._tasks)), [t.weight for t in self._tasks])
        names = list(self._modes)
        [mode] = rng.choices(names, [self._modes[name].share for name in names])
        item = self._item(rng, split, task, mode)
        return _question(rng, item, task, mode, self._tasks[task], self._modes[mode])

    def _item(self, rng: random.Random, split: Split, number: int, mode: str) -> Item:
        source, task, wanted = self._sources[number], self._tasks[number], thinking_mode(mode)
        where = task.where if split == "train" or not task.where_held_out else task.where_held_out
        for _ in range(MOST_TRIES):
            item = source.draw(rng, split, wanted)
            if item.thinking_mode == wanted and _fits(item.stratum, where):
                return item
        raise DataError(
            f"None of {MOST_TRIES:,} items of {task.source!r} has {where} in mode {mode}. Correct the task's "
            "`where`: names and values are those of the items' strata."
        )


def _fits(stratum: Mapping[str, Any], where: Mapping[str, Sequence[Any]]) -> bool:
    return all(stratum.get(name) in values for name, values in where.items())


def _question(rng: random.Random, item: Item, task: int, mode: str, section: TaskSection, how: ModeSection) -> Question:
    """The item with what its task announces."""
    if section.penalties:
        item = announce_penalty(item, rng.choice(section.penalties))
    if section.confidence:
        item = announce_confidence(item)
    if section.budgets:
        item = announce_budget(item, rng.choice(section.budgets))
    return Question(item, task, mode, how.window)


class _Family:
    """Items of a task family; its entities decide the split."""

    def __init__(self, family: TaskFamily) -> None:
        self._family = family

    def draw(self, rng: random.Random, split: Split, mode: Mode) -> Item:
        return self._family.make_item(rng, split, rng.randrange(1 << 20))


class _Rows:
    """Rows of a JSON Lines file: every tenth is held out. Columns as TRL has them: `prompt` (text, or messages)."""

    def __init__(self, path: Path) -> None:
        self._rows = [_read_row(path, number, line) for number, line in _lines(path)]
        if len(self._rows) < 2:
            raise DataError(f"{path} holds {len(self._rows)} rows, and some are held out. Give it two or more.")
        every = min(10, len(self._rows))
        self._held_out = self._rows[::every]
        self._trained = [row for place, row in enumerate(self._rows) if place % every]

    def draw(self, rng: random.Random, split: Split, mode: Mode) -> Item:
        row = rng.choice(self._trained if split == "train" else self._held_out)
        prompt = row["prompt"]
        meta = {name: value for name, value in row.items() if name != "prompt"}
        gold = next((str(row[name]) for name in _ANSWERS if name in row), "")
        is_text = isinstance(prompt, str)
        return Item(
            "dataset", f"dataset-{row['#']}", [] if is_text else prompt, row.get("tools"), mode, gold, {}, meta,
            prompt if is_text else None, split,
        )  # fmt: skip


class _Own:
    """Items of a user's function: called with a seed and a split, it yields them."""

    def __init__(self, path: str) -> None:
        self._make = load_dotted(path)

    def draw(self, rng: random.Random, split: Split, mode: Mode) -> Item:
        items: Iterator[Item] = iter(self._make(rng.getrandbits(48), split))
        return next(items)


def _source(name: str, known: Mapping[str, TaskFamily]) -> _Family | _Rows | _Own:
    if name in known:
        return _Family(known[name])
    if name.endswith((".jsonl", ".json")):
        return _Rows(Path(name))
    if ":" in name or "." in name:
        return _Own(name)
    raise ConfigError(
        f"There is no task {name!r}, only {', '.join(sorted(known))}. Choose one, or give a .jsonl file or the dotted "
        "path of a function of your own."
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}. Check the task's source.") from None
    return ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _read_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number} is no JSON ({error}). Each line must be one object.") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
        raise DataError(f"{path}:{number} has no column `prompt` that holds text or messages. Add it.")
    return {**row, "#": number}
