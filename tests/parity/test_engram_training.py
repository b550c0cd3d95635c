"""Training with Engram memories: two processes get one's curve and model, and runs go on where they stopped."""

import sys
from pathlib import Path

import pytest
import torch
from engram_runs import DENSE, LAYOUTS, SPARSE, STEPS, run_all, run_one
from parallel_cases import Layout, config, curve, held_out

from rorqual.checkpoint import load_official
from rorqual.model import Transformer
from rorqual.parallel.launch import launch
from rorqual.seeds import derive
from rorqual.train import checkpoints

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over the loopback device")

TABLE = "layers.1.engram.table"


def check_same(found: Path, expected: Path) -> None:
    ours, theirs = curve(found), curve(expected)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for step, record in theirs.items():
        assert ours[step]["loss"] == pytest.approx(record["loss"], rel=1e-4), f"{found.name}, step {step}"
        assert ours[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=2e-3), f"{found.name}, step {step}"
    assert held_out(found) == pytest.approx(held_out(expected), rel=1e-4)
    mine, single = checkpoints.newest(found), checkpoints.newest(expected)
    assert mine is not None and single is not None
    assert set(mine.weights) == set(single.weights) and set(mine.optimizer) == set(single.optimizer)
    for part, whole in ((mine.weights, single.weights), (mine.optimizer, single.optimizer)):
        for name in (n for n in whole if ".engram." in n or n.endswith("#step")):
            assert part[name].shape == whole[name].shape
            gap = (part[name].double() - whole[name].double()).norm() / whole[name].double().norm().clamp_min(1e-3)
            assert gap < 2e-3, f"{found.name}, {name}: {gap:.1e}"
    exported = load_official(found / "model").state_dict()
    assert all(torch.equal(tensor, mine.weights[name]) for name, tensor in exported.items())


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    run_one(tmp_path / "dense", *DENSE)
    run_one(tmp_path / "sparse", *SPARSE)
    stopped = Layout("stopped", 2, (*SPARSE, "run.max_steps=2"))
    launch(run_all, (tmp_path, [*LAYOUTS, stopped]), 2)
    for layout in LAYOUTS:
        check_same(tmp_path / layout.name, tmp_path / ("sparse" if "sparse" in layout.name else "dense"))
    run_one(tmp_path / "stopped", *SPARSE)  # saved on two, continued on one
    check_same(tmp_path / "stopped", tmp_path / "sparse")
    state = checkpoints.newest(tmp_path / "dense")
    assert state is not None and f"tables/{TABLE}#exp_avg" in state.optimizer
    assert not any(name.startswith(("muon/", "adamw/")) and name.endswith("table") for name in state.optimizer)
    assert torch.equal(state.weights["layers.1.engram.hash.compression"], torch.arange(48) // 2)


@pytest.mark.slow
def test_stopping_and_going_on_changes_nothing(tmp_path: Path) -> None:
    for name, settings in (("dense", DENSE), ("sparse", SPARSE)):
        run_one(tmp_path / f"whole{name}", *settings)
        run_one(tmp_path / f"cut{name}", *settings, "run.max_steps=2")
        run_one(tmp_path / f"cut{name}", *settings)
        ours, theirs = (checkpoints.newest(tmp_path / f"{kind}{name}") for kind in ("cut", "whole"))
        assert ours is not None and theirs is not None
        for mine, whole in ((ours.weights, theirs.weights), (ours.optimizer, theirs.optimizer)):
            assert set(mine) == set(whole) and all(torch.equal(mine[n], whole[n]) for n in whole)
        assert not torch.equal(theirs.weights[TABLE], at_start(tmp_path / f"whole{name}"))


def at_start(folder: Path) -> torch.Tensor:
    """The table as it was drawn."""
    settings = config(folder, STEPS, *DENSE)
    return Transformer(settings.model.build(), derive(settings.run.seed, "init")).state_dict()[TABLE]
