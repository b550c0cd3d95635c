"""`benchmarks/needle_guard.py` in small: the guard misses no literal needle, lines are whole, figures are drawn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    script = [sys.executable, str(BENCHMARKS / "needle_guard.py")]
    few = ["--json", "--lengths", "1024", "--haystacks", "2", "12", "--seed", "7"]
    done = subprocess.run([*script, *few], capture_output=True, text=True, check=True, timeout=300)
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    hits = {(line["policy"], line["overlap"]): line for line in lines if line["kind"] == "nbh"}
    assert set(hits) == {(policy, kind) for policy in ("trained", "default") for kind in ("literal", "paraphrased")}
    literal = hits["default", "literal"]
    assert literal["config"]["misses"] == 0 and literal["config"]["probes"] == 24
    assert literal["ours"] >= hits["trained", "literal"]["ours"]
    assert sum(count for _, count in literal["config"]["by_depth"].values()) == 24
    cost = next(line for line in lines if line["kind"] == "decode")
    assert cost["config"]["entries_added"] > 0 and cost["ours"] > 0 and cost["peer"] > 0
    (tmp_path / "lines").write_text(done.stdout)
    subprocess.run([*script, "--plot", str(tmp_path / "lines"), str(tmp_path)], check=True, timeout=120)
    assert {"guard_depth.png", "guard_phase.png", "guard_length.png"} <= {path.name for path in tmp_path.iterdir()}
