"""`benchmarks/exactness.py` and `benchmarks/kill_disk_cache.py` in small: no token differs, and the controls do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rorqual.ops.native import load

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def lines_of(name: str, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCHMARKS / name), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_random_schedules_change_no_token(tmp_path: Path) -> None:
    options = ["--requests", "150", "--control-requests", "12", "--resume", str(tmp_path / "lives.jsonl")]
    [line] = lines_of("exactness.py", *options)
    assert line["ours"] == 0 < line["peer"] and line["config"]["requests"] >= 150  # a life is finished
    assert line["config"]["ours"]["tokens"] >= 150 * 64 and line["config"]["ours"]["cached_tokens"] > 0
    assert (tmp_path / "lives.jsonl").exists()


@pytest.mark.slow
def test_kills_and_damage_serve_no_wrong_token() -> None:
    kills, damage = lines_of("kill_disk_cache.py", "--quick", "--kills", "8")
    assert kills["ours"] == damage["ours"] == 0 < kills["peer"]
    assert damage["config"]["damaged"] == 28 and damage["config"]["logged"]
