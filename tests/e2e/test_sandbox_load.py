"""P1 to P5 of the specification, small: the cases of `benchmarks/sandbox_load.py`, judged by what they count.

How long things take is for the benchmark on a quiet machine; nothing here hangs on a clock.
"""

import asyncio
import os
import shutil
import time
from pathlib import Path

import pytest
import sandbox_load
from sandboxes import need

from rorqual.sandbox.drivers import driver
from rorqual.sandbox.drivers.base import Driver

pytestmark = pytest.mark.slow


@pytest.fixture
def bwrap() -> Driver:
    need(("container", "bwrap"))
    return driver("container", "bwrap")


def test_p1_idle_sandboxes_take_their_share_of_the_memory(bwrap: Driver) -> None:
    line = asyncio.run(sandbox_load.p1(bwrap, share=0.02))
    assert line["ours"] == line["bound"] == 4
    assert 0 < line["config"]["bytes"] <= line["config"]["within"] < 200 << 20 and line["config"]["kept"]


def test_p2_creations_that_overlap_do_not_harm_one_another(bwrap: Driver) -> None:
    config = asyncio.run(sandbox_load.p2(bwrap, rate=30, seconds=1))["config"]
    assert (config["done"], config["failed"]) == (30, 0), config["first_failure"]


class SlowDisk(sandbox_load.CountingDisk):
    """As one whose syncs take so long that requests have to share them."""

    def write(self, descriptor: int, data: bytes, offset: int, *, synced: bool) -> None:
        """See `Disk`."""
        if synced and any(data):
            time.sleep(0.02)
        super().write(descriptor, data, offset, synced=synced)


def test_p3_many_requests_share_syncs(tmp_path: Path) -> None:
    config = sandbox_load.p3(str(tmp_path), requests=32, rate=400, seconds=1, disk=SlowDisk())["config"]
    assert config["tokens"] == 384 and 0 < config["syncs"] < 384 / 3


def test_p4_nothing_grows_while_things_are_killed(bwrap: Driver, tmp_path: Path) -> None:
    lines = {line["name"]: line for line in asyncio.run(sandbox_load.p4([bwrap], 24, str(tmp_path)))}
    made, killed = (lines["sandbox_load.P4.files"]["config"][name] for name in ("made", "killed"))
    assert made > 20 and killed > 5, "nothing happened, so nothing is shown"
    last = {name.rpartition(".")[2]: line["config"]["last"] for name, line in lines.items()}
    for name in ("mounts", "files", "processes", "control_groups"):
        assert last[name] == 0, f"{last[name]} {name} are left"
    assert lines["sandbox_load.P4.descriptors"]["ours"] < 8 and last["descriptors"] < 60


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts layers; for others they are unpacked whole")
@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="the image is made of this machine's Debian packages")
def test_p5_a_task_reads_a_small_share_of_its_image(bwrap: Driver, tmp_path: Path) -> None:
    config = asyncio.run(sandbox_load.p5(bwrap, parent=str(tmp_path)))["config"]
    assert config["image_bytes"] > 50 << 20 and config["verified_bytes"] >= config["image_bytes"]
    assert all(0 < share < 0.15 for share in config["shares"].values()), config["shares"]
