"""The prompts of a distillation, in one order that the seed decides: task families and files, mixed by weight."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.chat import encode_messages
from rorqual.data.tasks import Item, TaskFamily, World, named_families
from rorqual.errors import ConfigError, DataError, RorqualError
from rorqual.posttrain.distill_config import PromptSection
from rorqual.seeds import derive

MOST_PASSED_OVER = 10_000
"""Items of a family that may be passed over in search of one that is wanted."""


@dataclass(frozen=True)
class TaskPrompt:
    """One prompt."""

    id: str
    """The same question has the same id each time it comes: decisions go by it."""
    text: str
    domain: str


class PromptStream:
    """An endless stream of prompts. `take` them in turn; `count` says how many were taken, and `skip` takes so many."""

    def __init__(self, sections: list[PromptSection], seed: int, world: World | None = None) -> None:
        """Raises: ConfigError for a source that is neither; DataError for a file that cannot be read."""
        known: dict[str, TaskFamily] | None = None
        self.seed, self.count = seed, 0
        self._weights = [section.weight for section in sections]
        self._streams: list[Iterator[TaskPrompt]] = []
        for number, section in enumerate(sections):
            own = derive(seed, "prompts", number)
            if section.source.endswith((".jsonl", ".json")):
                self._streams.append(_from_file(section, own))
                continue
            if known is None:
                world = world or World.build()
                known = named_families(world.world_id, size=world.size)
            if section.source not in known:
                raise ConfigError(
                    f"prompts.{number}.source is {section.source!r}, which is no task family ({', '.join(known)}) and "
                    "no .jsonl file. Give one of these."
                )
            self._streams.append(_from_family(section, known[section.source], own))

    def take(self) -> TaskPrompt:
        """The next prompt. Raises: DataError when a family has no item that is wanted."""
        draw = random.Random(derive(self.seed, "source", self.count))
        self.count += 1
        return next(draw.choices(self._streams, self._weights)[0])

    def skip(self, count: int) -> None:
        """Go on behind the first `count` prompts."""
        while self.count < count:
            self.take()


def _from_family(section: PromptSection, family: TaskFamily, seed: int) -> Iterator[TaskPrompt]:
    passed_over = 0
    for item in family.items("train", seed):
        if not _is_wanted(section, item):
            passed_over += 1
            if passed_over > MOST_PASSED_OVER:
                raise DataError(
                    f"{MOST_PASSED_OVER} items of the family {section.source} in a row were none of those wanted "
                    f"({section.where or section.mode}). Check `where` and `mode` against the family's strata."
                )
            continue
        passed_over = 0
        yield TaskPrompt(item.id, item.prompt_text(), section.domain)


def _is_wanted(section: PromptSection, item: Item) -> bool:
    if section.mode not in ("any", item.thinking_mode):
        return False
    return all(item.stratum.get(name) in values for name, values in section.where.items())


def _from_file(section: PromptSection, seed: int) -> Iterator[TaskPrompt]:
    prompts = list(_read_file(section))

    def forever() -> Iterator[TaskPrompt]:
        epoch = 0
        while True:
            order = list(prompts)
            random.Random(derive(seed, epoch)).shuffle(order)
            yield from order
            epoch += 1

    return forever()


def _read_file(section: PromptSection) -> Iterator[TaskPrompt]:
    path = Path(section.source)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}), so there are no prompts. Check the path.") from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} is empty, so there are no prompts. Give a file with one a line.")
    for number, line in rows:
        try:
            yield _read_row(json.loads(line), f"{path.name}:{number}", section.domain)
        except (ValueError, KeyError, TypeError, RorqualError) as error:
            raise DataError(
                f"{path}:{number} is no prompt ({error}). A line is an object with `messages` or `prompt`."
            ) from error


def _read_row(row: dict[str, Any], place: str, domain: str) -> TaskPrompt:
    name = str(row.get("id", place))
    if "prompt" in row and isinstance(row["prompt"], str):
        return TaskPrompt(name, row["prompt"], domain)
    messages = list(row["messages"])
    while messages and messages[-1]["role"] == "assistant":  # what the student is to write itself
        messages.pop()
    if not messages:
        raise ValueError("messages hold no turn to answer")
    text = encode_messages(messages, tools=row.get("tools"), thinking_mode=row.get("thinking_mode", "chat"))
    return TaskPrompt(name, text, domain)
