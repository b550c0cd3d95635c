"""Training killed with SIGKILL at random steps and resumed ends with the bits of training left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """
[model.overrides]
vocab_size = 384
hidden_size = 32
num_hidden_layers = 2
compress_ratios = [0, 4, 0]
num_attention_heads = 2
head_dim = 16
qk_rope_head_dim = 8
q_lora_rank = 16
o_lora_rank = 16
n_routed_experts = 4
moe_intermediate_size = 32
sliding_window = 8
index_topk = 2
index_n_heads = 2
index_head_dim = 16

[[data.sources]]
kind = "path"
path = "CORPUS"
fim_rate = 0.3

[data]
held_out = 0.2

[data.tasks]
weight = 0.5
families = { arith = 1.0, facts = 1.0 }

[schedule]
total_tokens = 4096
tokens_per_step = 128
seq_lens = [[0.0, 32], [0.5, 64]]
warmup_steps = 4

[run]
processes = PROCESSES
threads = 1
micro_batch_tokens = 64
checkpoint_every_s = 0.001
eval_every = 7
eval_tokens = 256
log_every = 1
"""


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "rorqual", "train", "--quiet", "--run-dir", str(folder), *arguments]


def steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"lm"') if path.is_file() else 0


def kill_at(arguments: list[str], folder: Path, step: int) -> None:
    """Run until `step` is logged, then SIGKILL the main process only: its workers must notice."""
    process = subprocess.Popen(arguments)
    deadline = time.monotonic() + 240
    while steps_logged(folder) < step:
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline, "training made no progress"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def final_checkpoint(folder: Path) -> dict[str, bytes]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000032"
    return {name: (newest / name).read_bytes() for name in ("weights.safetensors", "optimizer.safetensors")}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_and_resume_gives_the_same_bits(tmp_path: Path, processes: int) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    source = Path(__file__).parents[2] / "rorqual"
    for path in [*source.glob("*.py"), *(source / "train").glob("*.py")]:
        (corpus / f"{path.parent.name}-{path.name}").write_text(path.read_text())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("CORPUS", str(corpus)).replace("PROCESSES", str(processes)))

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
