"""Layers cut into stages, alone and with cut rows, give the losses and gradients of one process."""

import random
from itertools import combinations, pairwise

import pipeline_cases
import pytest
import torch
from context_cases import build_model, cases
from ranks import run_ranks

from rorqual.errors import ConfigError
from rorqual.parallel.stages import costs, stage_bounds
from rorqual.train.losses import LossParts

pytestmark = pytest.mark.slow  # tests/parity/test_parallel_training.py trains in two stages in the quick suite


@pytest.fixture(scope="module")
def whole() -> dict[str, dict]:
    torch.set_num_threads(1)
    model, batches = build_model(), pipeline_cases.micro_batches()
    return {
        "few": pipeline_cases.step(model, None, batches[:1]),
        "many": pipeline_cases.step(model, None, batches),
        "logits": pipeline_cases.logits(model, None, cases()[0].rows),
    }


@pytest.fixture(scope="module")
def stages() -> list[dict[str, dict]]:
    return run_ranks(pipeline_cases.steps_in_stages, 4)


def total(parts: list[LossParts], name: str) -> float:
    return sum(getattr(part, name) for part in parts)


@pytest.mark.parametrize("layout", list(pipeline_cases.LAYOUTS))
@pytest.mark.parametrize("count", ["few", "many"])
def test_stages_are_the_whole(whole: dict, stages: list[dict], layout: str, count: str) -> None:
    expected = whole[count]
    ranks = [rank[layout] for rank in stages if rank[layout]["place"][1] == 0]  # each replica has the same rows here
    parts = [part for rank in ranks for part in rank[count]["parts"]]
    for name in ("lm", "mtp", "balance", "index"):
        assert total(parts, name) == pytest.approx(total(expected["parts"], name), abs=1e-5), name
    seen = set()
    for name, gradient in expected["gradients"].items():
        holders = [rank for rank in ranks if name in rank[count]["gradients"]]
        by_stage: dict[int, torch.Tensor] = {}
        for rank in holders:
            stage = rank["place"][0]
            share = rank[count]["gradients"][name]
            by_stage[stage] = by_stage[stage] + share if stage in by_stage else share
        assert len(by_stage) == (2 if name == "embed.weight" else 1), f"{name} lies on stages {list(by_stage)}"
        for share in by_stage.values():
            difference = float((share - gradient).abs().max())
            assert difference <= 1e-5 * max(1.0, float(gradient.abs().max())), f"{name} is off by {difference}"
        seen.add(name)
    assert seen == {name for rank in ranks for name in rank[count]["gradients"]}


@pytest.mark.parametrize("layout", list(pipeline_cases.LAYOUTS))
def test_forward_only(whole: dict, stages: list[dict], layout: str) -> None:
    every = {rank[layout]["place"]: rank[layout]["logits"] for rank in stages}
    for stage in {place[0] for place in every}:  # every stage is told
        parts = [every[place] for place in sorted(every) if place[0] == stage and place[1] == 0]
        torch.testing.assert_close(torch.cat(parts, 1), whole["logits"], rtol=0, atol=1e-5)


def test_copies_of_the_embedding_agree(stages: list[dict]) -> None:
    for layout in pipeline_cases.LAYOUTS:
        gradients = {
            rank[layout]["place"]: rank[layout]["many"]["gradients"]["embed.weight"]
            for rank in stages
            if "embed.weight" in rank[layout]["many"]["gradients"]
        }
        last = max(place[0] for place in gradients)
        for (stage, replica, part), gradient in gradients.items():
            assert torch.equal(gradient, gradients[last - stage, replica, part]), layout


def test_recompute_in_stages_changes_no_bit(stages: list[dict]) -> None:
    for rank in stages:
        plain = rank["pp2 x cp2"]["many"]["gradients"]
        for mode in ("mhc", "block"):
            again = rank[f"pp2 x cp2, {mode}"]["many"]["gradients"]
            assert all(torch.equal(again[name], gradient) for name, gradient in plain.items()), mode


def largest_stage(layers: list[float], tail: float, bounds: tuple[int, ...]) -> float:
    sizes = [sum(layers[begin:end]) for begin, end in pairwise(bounds)]
    return max([*sizes[:-1], sizes[-1] + tail])


def test_stages_are_balanced() -> None:
    draw = random.Random(5)
    for _ in range(40):
        layers = [float(draw.randint(1, 9)) for _ in range(draw.randint(1, 7))]
        stages, tail = draw.randint(1, len(layers)), float(draw.randint(0, 12))
        found = stage_bounds(layers, tail, stages)
        assert found[0] == 0 and found[-1] == len(layers) and all(a < b for a, b in pairwise(found))
        inner = combinations(range(1, len(layers)), stages - 1)
        least = min(largest_stage(layers, tail, (0, *cut, len(layers))) for cut in inner)
        assert largest_stage(layers, tail, tuple(found)) == least
    layers, tail = costs(build_model(), 64)
    assert len(layers) == 4 and min(layers) > 0 and tail > 0
    with pytest.raises(ConfigError, match="parallel.pp = 3, but the model has 2 layers"):
        stage_bounds([1, 1], 0.0, 3)
