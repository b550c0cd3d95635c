"""A small run from a recipe, as a command: started, watched and killed by the end-to-end tests."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

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
total_tokens = TOKENS
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

[parallel]
ep = EXPERT_RANKS
"""


def write_recipe(folder: Path, processes: int, *, steps: int = 32, expert_ranks: int = 1) -> Path:
    """A recipe of `steps` steps on a corpus of Python files, in `folder`."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    source = Path(__file__).parents[2] / "rorqual"
    for path in [*source.glob("*.py"), *(source / "train").glob("*.py")]:
        (corpus / f"{path.parent.name}-{path.name}").write_text(path.read_text())
    recipe = folder / f"recipe-{processes}.toml"
    values = {"CORPUS": corpus, "TOKENS": 128 * steps, "PROCESSES": processes, "EXPERT_RANKS": expert_ranks}
    recipe.write_text(re.sub("|".join(values), lambda match: str(values[match[0]]), RECIPE))
    return recipe


def command(folder: Path, *arguments: str) -> list[str]:
    """`rorqual train` into `folder`."""
    return [sys.executable, "-m", "rorqual", "train", "--quiet", "--run-dir", str(folder), *arguments]


def steps_logged(folder: Path) -> int:
    """Steps in the run's metrics."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"lm"') if path.is_file() else 0


def wait_for_step(process: "subprocess.Popen[bytes]", folder: Path, step: int) -> None:
    """Until `step` is logged."""
    deadline = time.monotonic() + 240
    while steps_logged(folder) < step:
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline, "training made no progress"
        time.sleep(0.01)


def ranks_of(supervisor: int) -> list[int]:
    """Process ids of the ranks that a supervisor started (Linux)."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def final_checkpoint(folder: Path, steps: int = 32) -> dict[str, bytes]:
    """The files of the last step's checkpoint, but for `state.json`."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{steps:08d}"
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


KILLED = -signal.SIGKILL
