"""Training killed with SIGKILL at random moments and resumed ends with the bits of training left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from full import often
from small_run import (
    KILLED,
    command,
    final_checkpoint,
    is_running,
    ranks_of,
    steps_logged,
    wait_for_step,
    write_recipe,
)

from rorqual.train import checkpoints

NUM_KILLS = often(6, 20)
NUM_STEPS = 12 + 3 * NUM_KILLS


def kill_at(arguments: list[str], folder: Path, step: int) -> None:
    """Run until `step` is logged, then SIGKILL the main process only: ranks it started must notice."""
    process = subprocess.Popen(arguments)
    wait_for_step(process, folder, step)
    ranks = ranks_of(process.pid) if sys.platform == "linux" else []
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == KILLED
    deadline = time.monotonic() + 60
    while any(map(is_running, ranks)):
        assert time.monotonic() < deadline, "ranks outlived the process that started them"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_and_resume_gives_the_same_bits(tmp_path: Path, processes: int) -> None:
    recipe = write_recipe(tmp_path, processes)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole, "--recipe", str(recipe)), check=True, timeout=240)
    steps = sorted(random.sample(range(2, 30), processes))
    kill_at(command(cut, "--recipe", str(recipe)), cut, steps[0])
    for step in steps[1:]:
        kill_at(command(cut, "--resume"), cut, step)
    subprocess.run(command(cut, "--resume"), check=True, timeout=240)

    assert final_checkpoint(cut) == final_checkpoint(whole), f"killed at {steps}"
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (cut, whole)]
    assert weights[0] == weights[1]


def kill_a_rank(process: "subprocess.Popen[bytes]", folder: Path, make: random.Random) -> str:
    """SIGKILL one rank at a random moment, every other time while a checkpoint is being written."""
    ranks = ranks_of(process.pid)
    victim = make.randrange(len(ranks))
    is_saving = make.random() < 0.5
    if is_saving:
        deadline = time.monotonic() + 60
        while not list((folder / "checkpoints").glob(".draft-*")) and process.poll() is None:
            assert time.monotonic() < deadline, "no checkpoint is written"
    else:
        time.sleep(make.random() * 0.2)
    os.kill(ranks[victim], signal.SIGKILL)
    killed_at = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, "the command must fail"
    assert time.monotonic() - killed_at < 100, "the others did not end promptly"
    assert not any(map(is_running, ranks)), "a rank outlived the job"
    message = " ".join(errors.decode().split())
    assert f"Training process {victim} of {len(ranks)} was killed by signal 9" in message, message
    return f"rank {victim} {'while saving' if is_saving else ''} after {steps_logged(folder)} steps"


def check_every_checkpoint_reads(folder: Path) -> None:
    """All of them, whole: none that has a final name may be unreadable."""
    for path in checkpoints.folders(folder):
        saved = checkpoints.read(path)
        for tensors in (saved.weights, saved.optimizer):
            for name in tensors:
                assert tensors[name].shape == tensors.shape(name)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks through /proc")
def test_any_rank_killed_at_many_moments(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    make = random.Random(seed)
    recipe = write_recipe(tmp_path, 4, steps=NUM_STEPS, expert_ranks=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole, "--recipe", str(recipe)), check=True, timeout=600)
    moments = sorted(make.sample(range(1, NUM_STEPS - 4), NUM_KILLS))
    told = [f"seed {seed}"]
    for number, step in enumerate(moments):
        start = ["--recipe", str(recipe)] if number == 0 else ["--resume"]
        process = subprocess.Popen(command(cut, *start), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for_step(process, cut, step)
        told.append(kill_a_rank(process, cut, make))
        check_every_checkpoint_reads(cut)
    subprocess.run(command(cut, "--resume"), check=True, timeout=600)
    assert final_checkpoint(cut, NUM_STEPS) == final_checkpoint(whole, NUM_STEPS), "; ".join(told)
