"""S-TOOL: whether to call, what, and with which arguments; by turn of a dialogue, by size of the catalogue, and by what
the functions' schemas nest.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from rorqual.data.tasks.base import Grade, Item, Size, Split
from rorqual.data.tasks.tool import NO_TOOL, ToolFamily, calls_of
from rorqual.data.tasks.tool_dialogue import ToolDialogueFamily
from rorqual.data.tasks.tool_nested import NestedToolFamily
from rorqual.evals import metrics as m
from rorqual.evals.economy import PriceVector
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, say, spent
from rorqual.evals.targets.base import Prompt
from rorqual.evals.targets.server import completion_of
from rorqual.referee.schemas import fit, schema_of

SCOPE: dict[Size, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((1, 2, 4), (2, 6)),
    "small": ((1, 2, 4, 8, 16, 32, 64), (2, 8, 32)),
    "full": ((1, 2, 4, 8, 16, 32, 64), (2, 8, 32, 128)),
}
"""Turns and sizes of catalogues."""

_SPOKEN = re.compile(r'(\w+) ("[^"]*"|\[[^\]]*\]|-?\d+|true|false)')


class ToolsSuite(Suite):
    """Short dialogues of seven classes, long ones by turn, and calls with nested arguments, in turns."""

    name = "tools"
    answer_words = None
    max_tokens = 256
    sizes = {"tiny": 42, "small": 630, "full": 6300}
    strata = ("class", "turn", "functions", "parameters", "mode")

    def build_family(self) -> ToolFamily:
        turns, catalogues = SCOPE[self.setting.size]
        self.long = ToolDialogueFamily(turns=turns, catalogues=catalogues)
        self.nested = NestedToolFamily()
        return ToolFamily()

    @property
    def version(self) -> str:
        return f"{self.family.version}+{self.long.version}+{self.nested.version}"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "dialogues": self.long.spec(), "nested": self.nested.spec()}

    def items(self, split: Split, seed: int, count: int | None = None) -> list[Item]:
        count = self.sizes[self.setting.size] if count is None else count
        kinds = (family.items(split, seed) for family in (self.family, self.long, self.nested))
        return list(islice(chain.from_iterable(zip(*kinds, strict=False)), count))

    def grade(self, item: Item, text: str) -> Grade:
        by_name = {family.name: family for family in (self.family, self.long, self.nested)}
        return by_name[item.family].grade(item, text)

    def programs(self) -> dict[str, Program]:
        def spoken(item: Item) -> dict[str, Any]:
            text = str(item.messages[-1]["content"])
            return {name: json.loads(value) for name, value in _SPOKEN.findall(text)}

        def call(item: Item, name: str, arguments: dict[str, Any]) -> str:
            made = [
                {"id": "call_0", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            ]
            return completion_of({"tool_calls": made}, Prompt.of(item), "tool_calls")

        def names(item: Item) -> list[str]:
            return [tool["function"]["name"] for tool in item.tools or ()]

        def search(item: Item, rng: random.Random) -> str:
            """The function whose name's words stand in the request, with what is spoken there; a result is repeated."""
            last = item.messages[-1]
            if last["role"] == "tool":
                return say(
                    item, f"The result is {re.split(r'[^0-9A-Za-z]+', str(last['content']).rstrip(chr(34) + '}'))[-1]}."
                )
            words = set(re.findall(r"[a-z]+", str(last["content"]).lower()))
            fits = [name for name in names(item) if set(name.split("_")) <= words]
            return call(item, fits[0], spoken(item)) if fits else say(item, NO_TOOL)

        return {
            "majority": lambda item, rng: call(item, names(item)[0], {}),
            "random": lambda item, rng: call(item, rng.choice(names(item)), spoken(item)),
            "recency": lambda item, rng: call(item, names(item)[-1], spoken(item)),
            "search": search,
            "always-abstain": lambda item, rng: say(item, NO_TOOL),
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        made = {r.item.id: calls_of(r.text, r.item.thinking_mode) for r in rows}
        wanted = [r for r in rows if r.item.meta["calls"] is not None]
        hits = sum(bool(made[r.item.id]) for r in wanted)
        called = sum(bool(calls) for calls in made.values())
        precision, recall = m.share(hits, called), m.share(hits, len(wanted))
        trigger = None if precision is None or recall is None else m.harmonic_mean(precision, recall)
        return {
            "TRIGGER_F1": Figure(trigger),
            "NAME": Figure.of_share(
                _names(made[r.item.id]) == sorted(n for n, _ in r.item.meta["calls"]) for r in wanted
            ),
            "ARG": Figure.of_share(r.passed for r in wanted),
            "ARG_NESTED": Figure.of_share(r.passed for r in wanted if r.item.family == self.nested.name),
            "SCHEMA": Figure.of_share(_is_valid(r.item, c) for r in rows for c in made[r.item.id]),
            "SCHEMA_REPAIRED": Figure.of_share(
                _is_valid(r.item, c, is_mended=True) for r in rows for c in made[r.item.id]
            ),
            "COPY": Figure.of_share(_is_copied(r.item, arguments) for r in rows for _, arguments in made[r.item.id]),
            "ASKBACK": Figure.of_share(r.passed for r in rows if r.item.stratum["class"] == "missing"),
            "IRRELEVANCE": Figure.of_share(
                not made[r.item.id] for r in rows if r.item.stratum["class"] == "irrelevant"
            ),
            "ENVIRONMENT": Figure.of_share(r.passed for r in rows if r.item.stratum["class"] == "environment"),
            "ACC": Figure.of_share(r.passed for r in rows),
            **spent(rows, price),
        }


def _names(calls: list[tuple[str, str]]) -> list[str]:
    return sorted(name for name, _ in calls)


def _is_valid(item: Item, call: tuple[str, str], *, is_mended: bool = False) -> bool:
    """Whether a call obeys the schema of the function it names, as it came or as the referee would mend it."""
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in item.tools or ()}
    if call[0] not in schemas:
        return False
    schema = schema_of(schemas[call[0]], f"the parameters of {call[0]}")
    try:
        arguments = json.loads(call[1])
    except ValueError:
        return False
    return schema.accepts(fit(schema, arguments)[0] if is_mended else arguments)


def _is_copied(item: Item, arguments: str) -> bool:
    """Whether every string and number of the arguments occurs in the conversation."""
    text = json.dumps([message.get("content") for message in item.messages], ensure_ascii=False)
    try:
        values = json.loads(arguments)
    except ValueError:
        return False
    flat: list[Any] = []
    queue = [values]
    while queue:
        part = queue.pop()
        if isinstance(part, dict):
            queue += list(part.values())
        elif isinstance(part, list):
            queue += part
        elif not isinstance(part, bool) and part is not None:
            flat.append(str(part))
    return all(value in text for value in flat)
