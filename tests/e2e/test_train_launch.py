"""The ways to start several processes: `--nproc`, torchrun; stopping them, and requests that cannot work."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import command, final_checkpoint, steps_logged, wait_for_step, write_recipe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")


@pytest.mark.slow
def test_stopped_with_sigterm_and_continued_by_torchrun(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, 1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole, "--recipe", str(recipe), "--nproc", "2"), check=True, timeout=240)
    process = subprocess.Popen(command(cut, "--recipe", str(recipe), "--nproc", "2"))
    wait_for_step(process, cut, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    stopped_at = steps_logged(cut)
    saved = sorted((cut / "checkpoints").glob("step-*"))[-1]
    assert saved.name == f"step-{stopped_at:08d}" and stopped_at < 32  # the step in progress was completed

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "rorqual"]
    subprocess.run([*torchrun, *command(cut, "--resume")[3:]], check=True, timeout=240)
    assert final_checkpoint(cut) == final_checkpoint(whole)
    meshes = [json.loads(line)["mesh"] for line in (cut / "env.json").read_text().splitlines()]
    assert [mesh["dp"] for mesh in meshes] == [2, 2]


def test_layouts_that_cannot_be_are_refused_before_anything_starts(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, 1)
    cases = {
        ("--nproc", "4", "--set", "parallel.cp=3"): "4 processes, which parallel.cp = 3 and parallel.pp = 1 do not",
        ("--nproc", "4", "--set", "parallel.dp=2"): "parallel.dp to 4, or to 0",
        ("--nproc", "3", "--set", "parallel.ep=2"): "parallel.ep = 2 does not divide the 3 data ranks",
        ("--nproc", "3", "--set", "parallel.ep=3"): "parallel.ep = 3 does not divide the model's 4 experts",
        ("--nproc", "2", "--set", "parallel.ep=2", "--set", "parallel.waves=3"): "Choose at most 2 waves",
    }
    from rorqual.errors import ConfigError
    from rorqual.train import build, load_config

    for arguments, message in cases.items():
        settings = [value for option, value in zip(arguments[::2], arguments[1::2], strict=True) if option == "--set"]
        config = load_config([recipe], [f"run.processes={arguments[1]}", *settings])
        with pytest.raises(ConfigError) as refused:
            build.check_layout(config)
        assert message in str(refused.value), str(refused.value)
