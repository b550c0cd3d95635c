"""GRPO whose next phases are drawn while it trains: the same run with a bound of 0, and one that learns above it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_toy import EVERYTHING, toy_config, toy_run

from rorqual.posttrain.rollout_log import RolloutLog

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def phases(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "event" not in record]


def test_a_bound_of_0_is_the_synchronous_run(tmp_path: Path) -> None:
    turns = toy_run(tmp_path / "turns", toy_config(**EVERYTHING))
    ahead = toy_run(tmp_path / "ahead", toy_config(**EVERYTHING, max_staleness=0))
    for name, tensor in turns.model.state_dict().items():
        assert torch.equal(tensor, ahead.model.state_dict()[name]), name
    assert all(set(record["staleness"]) == {"0"} for record in phases(tmp_path / "ahead"))
    assert not any("staleness" in record for record in phases(tmp_path / "turns"))


def test_reward_rises_while_phases_are_drawn_ahead(tmp_path: Path) -> None:
    # answers of older weights teach less, and how old they are depends on the machine's load: 30 phases may end at 0.4
    outcome = toy_run(tmp_path, toy_config(max_staleness=2, steps=60))
    found = phases(tmp_path)
    assert outcome.finished and len(found) == 60
    assert sum(r["reward"] for r in found[:3]) / 3 < 0.25
    assert sum(r["reward"] for r in found[-3:]) / 3 > 0.6
    ages = {int(age) for record in found for age in record["staleness"]}
    assert max(ages) <= 2 and ages & {1, 2}  # some were old, none too old
    assert all(sum(r["staleness"].values()) == r["tokens"] and r["dropped"] == 0 for r in found)
    assert all(0 <= r["trainer_idle_share"] <= 1 and 0 <= r["engine_idle_share"] <= 1 for r in found)


RUN = """
import sys
from pathlib import Path
import torch
from grpo_toy import toy_config, toy_run
folder = Path(sys.argv[1])
torch.set_num_threads(1)
toy_run(folder, toy_config(steps=8, max_staleness=1), resume=(folder / "metrics.jsonl").exists())
"""


def drawn(folder: Path) -> dict[str, tuple[list[int], list[float], list[int]]]:
    """Ids, log probabilities and versions of every rollout that the log has, whole or not."""
    with RolloutLog(folder / "rollouts", take_over=True) as log:
        out = {}
        for name, number in log._numbers.items():
            entry = log._entries[number]
            part = entry.drawn if entry.drawn is not None else log._read([entry])[0]
            out[name] = list(part.ids), list(part.logprobs), list(part.versions)
        return out


def test_a_killed_run_loses_no_durable_token_and_trains_again_what_it_trained_on(tmp_path: Path) -> None:
    before: dict[str, Any] = {}
    figures: dict[int, float] = {}
    kills = 0
    for _ in range(6):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], env=env)
        lines = sum(1 for _ in (tmp_path / "metrics.jsonl").open()) if (tmp_path / "metrics.jsonl").exists() else 0
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            path = tmp_path / "metrics.jsonl"
            if kills < 2 and path.exists() and sum(1 for _ in path.open()) >= lines + 2:
                process.send_signal(signal.SIGKILL)
                kills += 1
                process.wait()
            time.sleep(0.002)
        code = process.wait(timeout=1)
        after = drawn(tmp_path)
        for name, parts in before.items():
            for old, new in zip(parts, after[name], strict=True):
                assert new[: len(old)] == old, name
        before = after
        for record in phases(tmp_path):
            assert figures.setdefault(record["phase"], record["loss"]) == record["loss"], record["phase"]
        if code == 0:
            break
    assert code == 0 and kills == 2 and len(before) == 8 * 2 * 8
    assert sorted(figures) == list(range(1, 9))
