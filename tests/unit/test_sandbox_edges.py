"""What an edge takes away beside its own folder, and what it leaves; when a sandbox without processes is over."""

import time
from pathlib import Path

from rorqual.sandbox import home as home_module
from rorqual.sandbox import sweep
from rorqual.sandbox.drivers.base import Process, Running
from rorqual.sandbox.edge import LEASES, LOCK, _clear_up
from rorqual.sandbox.home import Home, Record
from rorqual.sandbox.spec import SandboxSpec


def edge(folder: Path, *leases: str) -> Path:
    (folder / LEASES).mkdir(parents=True)
    (folder / LOCK).touch()
    for name in leases:
        (folder / LEASES / f"{name}.json").write_text("{}")
    return folder


def test_only_edges_that_hold_nothing_are_cleared_up(tmp_path: Path) -> None:
    own, empty, holding = edge(tmp_path / "own"), edge(tmp_path / "empty"), edge(tmp_path / "holding", "a")
    store = tmp_path / "layers"  # another part of the data folder, with a lock of its own
    (store / "objects").mkdir(parents=True)
    (store / "lock").touch()
    with_more = edge(tmp_path / "with more")
    (with_more / "notes").write_text("somebody's")
    _clear_up(own)
    assert own.is_dir() and not empty.exists()
    assert (holding / LEASES / "a.json").exists() and (store / "objects").is_dir() and (store / "lock").exists()
    assert (with_more / "notes").exists()


def test_p2_a_sweep_leaves_alone_what_another_client_makes(tmp_path: Path) -> None:
    """Before it has a record; the lock is held by another open file, as another process's would be."""
    made = Home.make("container", tmp_path)
    home_module._driven.discard(str(made.path))
    assert sweep.sweep(tmp_path) == [] and made.path.is_dir()
    made.unlock()
    assert sweep.sweep(tmp_path) == [made.id] and not made.path.exists()


def paused_to_disk(tmp_path: Path, **left_s: float) -> Home:
    home = Home.make("vm", tmp_path)
    record = Record(home.id, "qemu-tcg", SandboxSpec("vm"), time.time())
    record.state = "paused"
    record.running = Running([Process(2**22 - 1, 1)], {"unix": "channel"}, "00")  # no such process
    home.write(record)
    (home.path / "suspended").touch()
    home.set_deadlines(left_s)
    return home


def test_a_machine_whose_memory_is_on_disk_is_not_dead(tmp_path: Path) -> None:
    home = paused_to_disk(tmp_path, paused=100.0, lifetime=50.0)
    assert sweep._dead(home) is None
    (home.path / "suspended").unlink()
    assert sweep._dead(home) == "crashed"


def test_its_times_end_all_the_same(tmp_path: Path) -> None:
    assert sweep._dead(paused_to_disk(tmp_path / "a", paused=-1.0, lifetime=50.0)) == "paused"
    assert sweep._dead(paused_to_disk(tmp_path / "b", paused=-1.0, lifetime=-2.0)) == "lifetime"
