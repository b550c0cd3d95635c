"""Runs of two and four processes against one: the same curve, the same model, checkpoints that any number reads."""

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parallel_cases import LAYOUTS, Layout, build_feed, config, curve, held_out, run_all

from rorqual.checkpoint import load_official
from rorqual.parallel.launch import launch
from rorqual.train import checkpoints, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over the loopback device")

FIGURES = ("loss", "lm", "mtp", "balance", "index", "grad_norm")
LOSS_TOLERANCE = 1e-4
STEPS = 6
QUIET = "hc_"
"""Streams begin as copies, so some mixing coefficients have no gradient but rounding, which Muon brings to full size.
They move freely, and nothing the model computes depends on it."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a single process's run of so many steps."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def run(steps: int) -> Path:
        train(config(folder / str(steps), steps), build_feed=build_feed)
        return folder / str(steps)

    return run


def check_same_training(found: Path, expected: Path, steps: int) -> None:
    """Curves within `LOSS_TOLERANCE`, and a final model that is the same but for float error."""
    ours, theirs = curve(found), curve(expected)
    assert list(ours) == list(theirs) == list(range(1, steps + 1))
    for step, record in theirs.items():
        assert ours[step]["loss"] == pytest.approx(record["loss"], rel=LOSS_TOLERANCE), f"step {step}"
        for name in FIGURES:
            assert ours[step][name] == pytest.approx(record[name], rel=2e-3, abs=1e-6), f"{name} at step {step}"
        assert ours[step]["tokens"] == record["tokens"] and ours[step]["lr"] == record["lr"]
    assert held_out(found) == pytest.approx(held_out(expected), rel=LOSS_TOLERANCE)
    check_same_weights(found, expected)


def check_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = checkpoints.newest(found), checkpoints.newest(expected)
    assert ours is not None and theirs is not None
    assert ours.progress.step == theirs.progress.step and set(ours.weights) == set(theirs.weights)
    assert set(ours.optimizer) == set(theirs.optimizer)
    for name in theirs.weights:
        if QUIET in name:
            continue
        mine, reference = ours.weights[name].double(), theirs.weights[name].double()
        error = (mine - reference).norm() / reference.norm().clamp_min(1e-3)
        assert error < 2e-3, f"{name}: relative error {error:.2e}"
    exported, single = (load_official(folder / "model").state_dict() for folder in (found, expected))
    for name, tensor in exported.items():
        assert torch.equal(tensor, ours.weights[name]), name
        assert tensor.shape == single[name].shape


def of_size(processes: int, *, quick: bool = False) -> list[Layout]:
    return [layout for layout in LAYOUTS if layout.processes == processes and (layout.is_quick or not quick)]


def check_zero(zero: Path, redundant: Path, processes: int) -> None:
    """Owners update as every rank would by itself, and each keeps its share of the optimizer's state."""
    ours, theirs = checkpoints.newest(zero), checkpoints.newest(redundant)
    assert ours is not None and theirs is not None
    for found, expected in ((ours.weights, theirs.weights), (ours.optimizer, theirs.optimizer)):
        for name in expected:
            assert torch.equal(found[name], expected[name]), f"{zero.name}: {name}"
    sizes = [file.stat().st_size for file in sorted(ours.folder.glob("optimizer-*"))]
    assert len(sizes) == processes and max(sizes) < 1.25 * sum(sizes) / processes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_layouts_train_as_one_process_does(tmp_path: Path, alone: Callable[[int], Path], processes: int) -> None:
    layouts = of_size(processes, quick=True)
    launch(run_all, (tmp_path, layouts, STEPS), processes)
    for layout in layouts:
        check_same_training(tmp_path / layout.name, alone(STEPS), STEPS)
        assert (tmp_path / layout.name / "samples.txt").read_text() == (alone(STEPS) / "samples.txt").read_text()
    for zero, redundant in {2: [("dp2-zero", "dp2"), ("ep2-waves", "ep2")], 4: [("ep2-zero", "ep2-dp2")]}[processes]:
        check_zero(tmp_path / zero, tmp_path / redundant, processes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [2, 4])
def test_fifty_steps_stay_within_a_ten_thousandth(tmp_path: Path, alone: Callable[[int], Path], processes: int) -> None:
    launch(run_all, (tmp_path, of_size(processes), 50), processes)
    for layout in of_size(processes):
        check_same_training(tmp_path / layout.name, alone(50), 50)


@pytest.mark.slow
def test_two_go_on_where_one_stopped_and_one_where_two_did(tmp_path: Path, alone: Callable[[int], Path]) -> None:
    train(config(tmp_path / "grown", STEPS, "run.max_steps=3"), build_feed=build_feed)
    shrunk = Layout("shrunk", 2, ("parallel.ep=2", "run.max_steps=4"))
    launch(run_all, (tmp_path, [Layout("grown", 2, ("parallel.ep=2",)), shrunk], STEPS), 2)
    train(config(tmp_path / "shrunk", STEPS), resume=True, build_feed=build_feed)
    for name in ("grown", "shrunk"):
        check_same_training(tmp_path / name, alone(STEPS), STEPS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_saved_on_four_goes_on_on_four_two_and_one(tmp_path: Path, alone: Callable[[int], Path]) -> None:
    spread = ("parallel.ep=2",)
    stopped = Layout("stopped", 4, (*spread, "run.max_steps=4"))
    launch(run_all, (tmp_path, [stopped, Layout("whole", 4, spread)], STEPS), 4)
    for name in ("on-four", "on-two", "on-one"):
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
    launch(run_all, (tmp_path, [Layout("on-four", 4, spread)], STEPS), 4)
    launch(run_all, (tmp_path, [Layout("on-two", 2, ())], STEPS), 2)
    train(config(tmp_path / "on-one", STEPS), resume=True, build_feed=build_feed)
    for name in ("on-four", "on-two", "on-one"):
        check_same_training(tmp_path / name, alone(STEPS), STEPS)
    same, whole = checkpoints.newest(tmp_path / "on-four"), checkpoints.newest(tmp_path / "whole")
    assert same is not None and whole is not None
    for ours, theirs in ((same.weights, whole.weights), (same.optimizer, whole.optimizer)):
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), f"{name}, resumed on as many processes as saved it"
