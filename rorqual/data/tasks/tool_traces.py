"""S-TOOL with a reasoning that works the call out: what is asked, which tool fits, what it needs, what is given.

    set the lantern: set_lantern(name, level). name "velmar". level missing.
    open the kite: no tool.

The parameters are written from the catalogue before the values are looked for in the request, so that a missing one is
seen by comparing two things that stand side by side. Cases that a small model misses (several calls, a missing
argument, no fitting tool) are as frequent here as the plain call. Questions, splits and graders are those of `tool`.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

from rorqual.data.tasks.base import Piece, Split, random_mode, render_document
from rorqual.data.tasks.tool import CLASSES, Function, Scene, ToolFamily, spoken

_WEIGHTS = {"single": 6, "result": 2, "parallel": 4, "bait": 4, "error": 1, "missing": 4, "irrelevant": 4}
_AT_ONCE = _WEIGHTS | {"missing": 6, "irrelevant": 12}
"""Weights without thinking: that no tool fits must then be seen in one step, which takes more examples."""
_LOST = re.compile(r"Which (\w+) should I use\?")
_ABSENT = re.compile(r"No tool can (.+)\.")


class ToolTracesFamily(ToolFamily):
    """Tool calls whose reasoning is a procedure."""

    name = "tool-traces"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "weights": {"thinking": _WEIGHTS, "chat": _AT_ONCE}}

    def scene(self, rng: random.Random, split: Split, kind: str) -> Scene:
        """A scene of `tool` with the reasoning of this family."""
        return with_trace(super().scene(rng, split, kind))

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        weights = _WEIGHTS if mode == "thinking" else _AT_ONCE
        scene = self.scene(rng, "train", rng.choices(CLASSES, [weights[kind] for kind in CLASSES])[0])
        return render_document(self.messages(scene, mode), mode=mode, tools=scene.tools)


def with_trace(scene: Scene) -> Scene:
    """The scene with its decision worked out; what is said about results stays as it is."""
    by_name = {f.name: f for f in scene.functions}
    if scene.kind == "irrelevant":
        found = _ABSENT.fullmatch(scene.answer_reasoning)
        assert found is not None
        return replace(scene, answer_reasoning=f"{found[1]}: no tool.")
    if scene.kind == "missing":
        lost = _LOST.fullmatch(scene.answer or "")
        assert lost is not None
        function = by_name[scene.answer_reasoning.split(" needs ")[0]]
        given = {name: scene.user for name in (p.name for p in function.parameters) if name != lost[1]}
        values = {name: _said(scene.user, name) for name in given}
        return replace(scene, answer_reasoning=_worked_out(function, values))
    parts = [
        _worked_out(by_name[name], {key: spoken(value) for key, value in arguments.items()})
        for name, arguments in scene.calls
    ]
    return replace(scene, call_reasoning=" ".join(parts))


def _worked_out(function: Function, values: dict[str, str]) -> str:
    """One call: the tool with its parameters, then each with its value as the request says it, or `missing`."""
    names = [p.name for p in function.parameters]
    said = " ".join(f"{name} {values.get(name, 'missing')}." for name in names)
    return f"{function.act}: {function.name}({', '.join(names)}). {said}".rstrip()


def _said(user: str, name: str) -> str:
    """The value of `name` as the request gives it."""
    found = re.search(rf'\b{name} ("[^"]*"|\[[^\]]*\]|-?\d+|true|false)', user)
    assert found is not None, (user, name)
    return found[1]
