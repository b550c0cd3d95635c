"""Announced thresholds are scored at their price, and effort by rank correlation."""

import json
from pathlib import Path

import pytest
from eval_targets import ScriptedTarget

from rorqual.data.tasks import World
from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.base import Item
from rorqual.errors import ConfigError
from rorqual.evals.economy import spearman
from rorqual.evals.run import RunSettings, evaluate
from rorqual.evals.suites import build
from rorqual.evals.suites.base import Setting, say

WORLD = World.build()


def test_scores_are_at_the_price_that_was_told(tmp_path: Path) -> None:
    """A model that answers K-clean rightly and guesses elsewhere while a wrong answer costs 1, but not at 3 and 9."""
    settings = RunSettings("facts", size="tiny", items=110, options={"announce": True})
    items = build("facts", Setting(WORLD, "tiny", options=settings.options)).items("test", 0, 110)
    assert len({(i.stratum["class"], i.stratum["announced"]) for i in items}) == 55
    told = {i.stratum["announced"]: i.messages[0]["content"] for i in items if len(i.messages) == 2}
    assert "costs 1," in told["0.5"] and "costs 3," in told["0.75"] and "costs 9," in told["0.9"]
    assert set(told) == {"clause", "0.5", "0.75", "0.9"}

    def says(item: Item) -> str:
        if item.stratum["class"] == "K-clean":
            return item.gold
        guesses = [v for v in WORLD.values[item.meta["attribute"]] if v != item.meta["value"]]
        return say(item, IDK if item.stratum["announced"] in ("0.75", "0.9") else guesses[0])

    result = evaluate(settings, ScriptedTarget(items, says), WORLD, tmp_path).result
    head = result["headline"]
    here = [i for i in items if i.stratum["announced"] == "0.5"]
    right = sum(i.stratum["class"] == "K-clean" for i in here)
    assert head["U@0.5"] == pytest.approx((right - (len(here) - right)) / len(here)) and head["ANSWERED@0.5"] == 1
    for t in ("0.75", "0.9"):
        assert head[f"U@{t}"] == head[f"ANSWERED@{t}"] == pytest.approx(2 / 22)
        assert result["baselines"]["always-abstain"][f"U@{t}"] == 0
    assert sum(cell["n"] for cell in result["strata"]["announced"].values()) == 110
    assert json.loads(json.dumps(result))["headline"] == head


def test_announcing_is_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match="--announce is for the suite facts"):
        build("arith", Setting(WORLD, options={"announce": True}))


def test_rank_correlation() -> None:
    assert spearman([0, 1, 2], [5, 60, 7000]) == pytest.approx(1)
    assert spearman([0, 1, 2], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([0, 0, 1, 1], [1, 2, 1, 2]) == pytest.approx(0)
    assert spearman([0, 0, 1], [1, 1, 2]) == pytest.approx(1)
    assert spearman([1, 1], [1, 2]) is None and spearman([], []) is None
