"""GRPO end to end on a network of a few thousand numbers: reward rises, a killed run resumes to the same weights."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_toy import EVERYTHING, toy_config, toy_model, toy_run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_reward_rises_within_thirty_steps(tmp_path: Path) -> None:
    outcome = toy_run(tmp_path, toy_config(eval_every=30, eval_items=8))
    phases = [record for record in records(tmp_path) if "event" not in record]
    held_out = [record["reward"] for record in records(tmp_path) if record.get("event") == "eval"]
    assert outcome.finished and len(phases) == 30
    assert sum(r["reward"] for r in phases[:3]) / 3 < 0.25
    assert sum(r["reward"] for r in phases[-3:]) / 3 > 0.6
    assert len(held_out) == 2 and held_out[1] > held_out[0]
    assert max(r["mismatch"] for r in phases) < 1e-5  # the engine's log-probabilities are the trainer's
    assert (tmp_path / "plots" / "grpo.png").stat().st_size > 10_000


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.endswith("_s")}


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings = toy_config(**EVERYTHING)
    whole = toy_run(tmp_path / "whole", settings)
    broken = tmp_path / "broken"
    for _ in range(30):  # stopped wherever it is asked to stop, most often with answers half drawn
        looks = iter([False] * 7 + [True] * 1000)
        outcome = toy_run(broken, settings, resume=broken.exists(), should_stop=partial(next, looks))
        if outcome.finished:
            break
    assert outcome.finished and whole.finished
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, outcome.model.state_dict()[name]), name
    seen = [[without_times(r) for r in records(folder)] for folder in (tmp_path / "whole", broken)]
    assert seen[0] == seen[1]
    assert any(r.get("mask_share") for r in seen[0]) or any(r.get("clip_share") for r in seen[0])
    assert any(r.get("kl") for r in seen[0])


def test_a_reward_of_trl_s_form_gives_the_same_run(tmp_path: Path) -> None:
    ours = toy_run(tmp_path / "ours", toy_config(steps=2))
    task = {"source": "grpo_toy:items", "rewards": [{"name": "grpo_toy:digits_as_trl"}]}
    theirs = toy_run(tmp_path / "theirs", toy_config(steps=2, tasks=[task]))
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, theirs.model.state_dict()[name]), name


def test_an_update_moves_towards_what_was_rewarded(tmp_path: Path) -> None:
    before = toy_model()
    after = toy_run(tmp_path, toy_config(steps=1, trainable=["layers.1.*", "head.weight"])).model
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.state_dict()[n])}
    assert moved and all(n.startswith("layers.1.") or n == "head.weight" for n in moved)
