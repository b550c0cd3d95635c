"""Cut rows and layers through the special stages of a run, and checkpoints of theirs that other numbers read."""

import shutil
from pathlib import Path

import pytest
from parallel_cases import Layout, build_feed, config, curve, run_all

from rorqual.parallel.launch import launch
from rorqual.train import train

pytestmark = pytest.mark.slow

STEPS = 8
STAGES = {
    "warm-up": ("schedule.index_warmup=3",),
    "anticipatory": ("stability.active_from=2", "stability.active_steps=3", "stability.lag=1"),
    "plain": (),
}


def layouts(processes: int, stage: str) -> list[Layout]:
    """Ways of cutting rows and layers, with the settings of a special stage."""
    ways = {2: [("parallel.cp=2",), ("parallel.pp=2",)], 4: [("parallel.cp=2", "parallel.pp=2")]}[processes]
    return [Layout(f"{stage}-{processes}-{i}", processes, (*way, *STAGES[stage])) for i, way in enumerate(ways)]


def check_same_curve(found: Path, expected: Path) -> None:
    ours, theirs = curve(found), curve(expected)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for step, record in theirs.items():
        for name in ("loss", "lm", "mtp", "balance", "grad_norm"):
            assert ours[step][name] == pytest.approx(record[name], rel=1e-4, abs=1e-7), f"{name} at step {step}"


@pytest.mark.parametrize("processes", [2, 4])
def test_special_stages(tmp_path: Path, processes: int) -> None:
    every = {stage: layouts(processes, stage) for stage in ("warm-up", "anticipatory")}
    for stage in every:
        train(config(tmp_path / stage, STEPS, *STAGES[stage]), build_feed=build_feed)
    launch(run_all, (tmp_path, [layout for some in every.values() for layout in some], STEPS), processes)
    for stage, some in every.items():
        for layout in some:
            check_same_curve(tmp_path / layout.name, tmp_path / stage)


def test_a_run_in_stages_and_parts_goes_on_on_two_and_on_one(tmp_path: Path) -> None:
    train(config(tmp_path / "whole", STEPS), build_feed=build_feed)
    cut = ("parallel.cp=2", "parallel.pp=2", "parallel.ep=2")
    launch(run_all, (tmp_path, [Layout("stopped", 4, (*cut, "run.max_steps=4"))], STEPS), 4)
    for name in ("on-two", "on-one"):
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
    launch(run_all, (tmp_path, [Layout("on-two", 2, ("parallel.pp=2",))], STEPS), 2)
    train(config(tmp_path / "on-one", STEPS), resume=True, build_feed=build_feed)
    for name in ("on-two", "on-one"):
        check_same_curve(tmp_path / name, tmp_path / "whole")
