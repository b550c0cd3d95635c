"""S-TOOL with nested schemas: arguments that are objects, lists of objects, optional, one of several types, or trees.

Requests are those of `tool`, with nested values in words. An argument that was not told must be left out; one that says
what its default says is the same as none. Source: evaluation specification, section 4.7.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from rorqual.data.tasks.base import Grade, Item, Split
from rorqual.data.tasks.schemas import FEATURES, Schema, draw_schema, draw_value, faults, spoken, without_defaults
from rorqual.data.tasks.tool import Function, Scene, ToolFamily, calls_of, grade_calls, render_calls


@dataclass(frozen=True)
class NestedFunction(Function):
    """A tool whose parameters are a whole schema."""

    shape: Schema = field(default_factory=dict)

    def schema(self) -> dict[str, Any]:
        described = super().schema()
        described["function"]["parameters"] = self.shape
        return described

    def arguments(self, rng: random.Random, *, bait: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = draw_value(rng, self.shape, self.shape)
        return found


class NestedToolFamily(ToolFamily):
    """One call with nested arguments; the class is the schema's feature."""

    name = "tool-nested"
    version = "1"
    classes = FEATURES
    weights = (1,) * len(FEATURES)

    def scene(self, rng: random.Random, split: Split, kind: str) -> Scene:
        """A request for the function whose schema has the feature `kind`, beside one with another."""
        taken: set[str] = set()
        functions = []
        for feature in (kind, rng.choice(FEATURES)):
            base = self._function(rng, split, taken)
            functions.append(NestedFunction(base.verb, base.noun, (), draw_schema(rng, feature)))
        target = functions[0]
        arguments = target.arguments(rng)
        told = " and ".join(f"{name} {spoken(value)}" for name, value in arguments.items())
        rng.shuffle(functions)
        user = f"{target.act.capitalize()} with {told}."
        return Scene(kind, tuple(functions), user, ((target.name, arguments),), f"Call {target.name}.")

    def grade(self, item: Item, output_text: str) -> Grade:
        """As `ToolFamily`, an argument equal to its default taken as absent."""
        shapes = {t["function"]["name"]: t["function"]["parameters"] for t in item.tools or ()}

        def plain(name: str, arguments: Any) -> Any:
            return without_defaults(arguments, shapes.get(name, {}))

        made = calls_of(output_text, item.thinking_mode, plain)
        return grade_calls(made, [[name, plain(name, arguments)] for name, arguments in item.meta["calls"]])

    def adversary(self, item: Item) -> list[str]:
        name, arguments = item.meta["calls"][0]
        reasoning = item.meta["reasoning"]
        return super().adversary(item) + [
            render_calls(item.thinking_mode, reasoning, [[name, bad]]) for bad in faults(arguments)
        ]
