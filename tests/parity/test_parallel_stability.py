"""Anticipatory routing and roll-backs on several processes: what one process would have done."""

import dataclasses
import sys
from pathlib import Path

import pytest
from parallel_cases import LAYOUTS, Layout, build_feed, config, curve, run_all
from stability_cases import run_hurt
from tiny_run import records

from rorqual.parallel.launch import launch
from rorqual.train import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over the loopback device")

STEPS = 8
AHEAD = ("stability.active_from=2", "stability.active_steps=3", "stability.lag=2")


def named(names: set[str], *settings: str) -> list[Layout]:
    return [dataclasses.replace(x, settings=(*x.settings, *settings)) for x in LAYOUTS if x.name in names]


def events(folder: Path) -> list[tuple[str, int, str]]:
    return [(r["event"], r["step"], r.get("source", "")) for r in records(folder) if "event" in r]


def check(processes: int, names: set[str], folder: Path, tmp_path: Path) -> None:
    layouts = named(names, *AHEAD)
    launch(run_all, (tmp_path, layouts, STEPS), processes)
    expected = curve(folder)
    for layout in layouts:
        found = curve(tmp_path / layout.name)
        for step, record in expected.items():
            assert found[step]["loss"] == pytest.approx(record["loss"], rel=1e-4), (layout.name, step)
            assert found[step].get("routing_age") == record.get("routing_age")
            assert found[step]["z"] == pytest.approx(record["z"], rel=1e-3)
            for family, norm in record["grad_norms"].items():
                assert found[step]["grad_norms"][family] == pytest.approx(norm, rel=5e-3, abs=1e-6), (step, family)
        assert events(tmp_path / layout.name) == events(folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_routing_ahead_is_the_same_on_every_layout(tmp_path: Path, processes: int) -> None:
    train(config(tmp_path / "alone", STEPS, *AHEAD), build_feed=build_feed)
    train(config(tmp_path / "plain", STEPS), build_feed=build_feed)
    assert curve(tmp_path / "alone")[7]["loss"] != curve(tmp_path / "plain")[7]["loss"]
    check(processes, {x.name for x in LAYOUTS if x.processes == processes}, tmp_path / "alone", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", ["ep2-waves", "pp2"])
def test_all_processes_go_back_together(tmp_path: Path, in_memory: str) -> None:
    live = ("stability.active_steps=0", "run.report=false")
    memory = (*live, "stability.snapshot_every=2")
    disk = (*live, "stability.snapshot_every=0", "run.checkpoint_every_s=1e-9", "run.keep_checkpoints=4")
    train(config(tmp_path / "alone", STEPS), build_feed=build_feed)
    layouts = [dataclasses.replace(x, name=f"{x.name}-memory") for x in named({in_memory}, *memory)]
    layouts += [dataclasses.replace(x, name=f"{x.name}-disk") for x in named({"dp2-zero"}, *disk)]
    launch(run_hurt, (tmp_path, layouts, STEPS), 2)
    for layout in layouts:
        source = "memory" if "memory" in layout.name else "checkpoint"
        assert events(tmp_path / layout.name) == [("spike", 6, ""), ("rollback", 4, source)], layout.name
        for step, record in curve(tmp_path / "alone").items():
            found = curve(tmp_path / layout.name)[step]
            assert found["loss"] == pytest.approx(record["loss"], rel=1e-4), (layout.name, step)
