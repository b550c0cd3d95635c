"""Arithmetic without an answer: that there is none, and the figures of a model that does or does not see it."""

import re
from itertools import islice, product
from pathlib import Path

import pytest
from eval_targets import ScriptedTarget

from rorqual.data.tasks import ArithLimitsFamily, Item, World
from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.arith_limits import STEPS, UNSOLVABLE, declines
from rorqual.evals.run import RunSettings, evaluate
from rorqual.evals.suites import build
from rorqual.evals.suites.base import Setting, say

WORLD = World.build()
ITEMS = list(islice(ArithLimitsFamily().items("test", 2), 350))


def text_of(item: Item) -> str:
    return str(item.messages[-1]["content"])


def test_equations_have_the_solution_told_or_none() -> None:
    for item in (i for i in ITEMS if i.stratum["kind"] in ("linear", "contradictory")):
        rows = [[int(n or 1) for n in row] for row in re.findall(r"(\d*)x \+ (\d*)y = (\d+)", text_of(item))]
        found = {x for x, y in product(range(120), repeat=2) if all(a * x + b * y == c for a, b, c in rows)}
        value = item.meta["value"]
        assert len(rows) == 2 and found == (set() if value is None else {value})


def test_stories_are_added_up_and_one_amount_is_missing_or_others_are_in_the_way() -> None:
    for item in (i for i in ITEMS if i.stratum["kind"] in ("missing", "irrelevant")):
        text = text_of(item)
        thing = re.search(r"How many pieces of (\w+) does", text)[1]  # type: ignore[index]
        own = re.findall(rf"(has|gets|gives away) (\d+) pieces of {thing}\b", text)
        total = sum(-int(n) if verb == "gives away" else int(n) for verb, n in own)
        is_missing = item.stratum["kind"] == "missing"
        assert text.count(" some of ") == is_missing
        assert len(own) == 1 + item.stratum["d"] - is_missing
        if not is_missing:
            assert total == item.meta["value"] >= 0
            assert len(re.findall(r"\d+ pieces of", text)) > len(own)


def test_chains_and_the_walk_over_d() -> None:
    for item in (i for i in ITEMS if i.stratum["kind"] == "modular"):
        start, m = (int(re.search(p, text_of(item))[1]) for p in (r"with (\d+)", r"modulo (\d+)"))  # type: ignore[index]
        for verb, n in re.findall(r"(Add|Multiply by) (\d+)", text_of(item)):
            start = start + int(n) if verb == "Add" else start * int(n)
        assert start % m == item.meta["value"]
    assert {i.stratum["d"] for i in ITEMS if i.stratum["kind"] == "missing"} == set(STEPS)


@pytest.mark.parametrize(
    ("text", "is_so"),
    [
        ("It cannot be determined.", True),
        ("There is no solution.", True),
        ("Not enough information.", True),
        ("The number of ribbons can't be known.", True),
        ("No solution but 4.", False),
        ("It can be determined.", False),
        ("No.", False),
        ("Nobody has no answer.", False),
    ],
)
def test_what_declines(text: str, is_so: bool) -> None:
    assert declines(text) == is_so


def test_figures_of_known_answers(tmp_path: Path) -> None:
    """A model that answers half of what has no answer, with three times the words, and declines one that has one."""
    settings = RunSettings("arith", size="tiny", items=60)
    items = build("arith", Setting(WORLD, "tiny")).items("test", 0, 60)
    limits = [i for i in items if i.family == "arith-limits"]
    hopeless = [i for i in limits if i.stratum["kind"] in UNSOLVABLE]
    solvable = [i for i in limits if i.stratum["kind"] not in UNSOLVABLE]
    fooled = {i.id for i in hopeless[::2]}

    def says(item: Item) -> str:
        if item.id in fooled:
            return say(item, "It is surely 7.")
        return say(item, IDK if item is solvable[0] or item.meta["value"] is None else str(item.meta["value"]))

    result = evaluate(settings, ScriptedTarget(items, says), WORLD, tmp_path).result
    head = result["headline"]
    assert len(limits) == 30 and len(hopeless) == 12
    assert head["HR_U"] == 0.5 and head["OVER"] == pytest.approx(1 / len(solvable))
    assert head["EM_LIMITS"] == pytest.approx(1 - 1 / len(solvable)) and head["TOKENS_IMPOSSIBLE"] > 1
    assert head["EM"] == pytest.approx(1 - 1 / (60 - len(hopeless)))
    assert result["baselines"]["always-abstain"]["HR_U"] == 0 and result["baselines"]["always-abstain"]["OVER"] == 1
