"""`benchmarks/serving.py`: its arithmetic, and that a small burst gives the lines it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import serving  # noqa: E402
from serving import Burst, Side  # noqa: E402


def test_figures_of_a_burst() -> None:
    burst = Burst([[1, 2], [3]], [[0.5, 2.0], [1.0]])
    assert burst.tokens_per_s == 3 / 2.0
    assert (burst.first, burst.gaps) == ([0.5, 1.0], [1.5])
    values = [float(i) for i in range(1, 101)]
    assert [serving.percentile(values, share) for share in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert serving.percentile([4.0], 0.5) == 4.0


def test_ratios_say_how_many_times_better_ours_is() -> None:
    fast, slow = Side("a", lambda rows: burst, [Burst([[1]], [[1.0]])]), Side("b", lambda rows: burst)
    burst = Burst([[1]], [[4.0]])
    slow.bursts.append(burst)
    rate = serving.report("x", "c", "tokens/s", fast, slow, lambda one: one.tokens_per_s, 2.0, {})
    assert (rate["ratio"], rate["bound_share"]) == (4.0, 0.5)
    wait = serving.report("x", "c", "s", fast, slow, lambda one: one.first[0], 0.5, {})
    assert (wait["ratio"], wait["bound_share"]) == (4.0, 0.5)
    refused = Side("c", lambda rows: burst, failure="ValueError: no")
    line = serving.report("x", "c", "s", fast, refused, lambda one: one.first[0], 0.5, {})
    assert (line["peer"], line["ratio"], line["peer_failure"]) == (None, None, "ValueError: no")


@pytest.mark.slow
def test_a_small_burst_prints_the_houses_lines() -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(BENCHMARKS / "serving.py"), "--json", "--quick", "--clients", "5", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    peers = [line["peer_name"] for line in lines if line["name"] == "serving.throughput"]
    assert peers == [
        "one at a time", "transformers, equal lengths", "transformers, padded", "transformers, continuous batching",
    ]  # fmt: skip
    for line in lines:
        assert line["ours"] > 0 and 0 < line["bound_share"] < 1
        assert line["peer"] is not None or line["peer_failure"]
        assert line["config"]["rows_as_alone"] == 5
        facts = line["config"]
        assert facts["rows_as_transformers"] + len(facts["differences"]) == 5
        for one in facts["differences"]:  # drawn weights: the best two scores of a token may be equal but for rounding
            assert abs(one["our_margin"]) <= 2 * one["scores_differ_by"] < 1e-5
    decoding = [line["peer_name"] for line in lines if line["name"] == "serving.decoding"]
    assert decoding == ["one at a time", "transformers, equal lengths"]
