"""`benchmarks/expert_exchange.py`: its arithmetic, a small run over a real link, and that nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import expert_exchange  # noqa: E402
from expert_exchange import Point, Time, hidden_share  # noqa: E402
from throttled_link import DEVICE, reason_against  # noqa: E402

COMMAND = [
    sys.executable, str(BENCHMARKS / "expert_exchange.py"), "--json", "--quick", "--repeats", "1", "--preset", "minke",
    "--tokens", "64",
]  # fmt: skip
needs_link = pytest.mark.skipif(reason_against() is not None, reason=str(reason_against()))


def seconds(forward: float, backward: float, waited: float = 0.0) -> Time:
    return Time(forward, backward, 0.0, waited)


def test_the_limit_is_taken_pass_by_pass() -> None:
    plain, overlapped = seconds(5, 7), seconds(3.5, 4.5, waited=0.2)
    point = Point(1e6, 4, plain, overlapped, compute=seconds(2, 4), comm=seconds(3, 3), spread={})
    assert point.limit == 3 + 4  # not max(6, 6)
    assert point.hidden == pytest.approx((12 - 8) / (12 - 7))
    assert point.hidden_of_whole == pytest.approx((12 - 8) / (12 - 6))
    assert point.waited_share == pytest.approx(0.2 / 8)
    assert hidden_share(10, 10, 5) == 0 and hidden_share(10, 5, 5) == 1 and hidden_share(5, 5, 5) is None


def test_without_root_or_tools_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("throttled_link.sys.platform", "linux")
    monkeypatch.setattr("throttled_link.shutil.which", lambda tool: None if tool == "tc" else f"/bin/{tool}")
    assert "lacks tc" in str(reason_against()) and "iproute2" in str(reason_against())
    monkeypatch.setattr("throttled_link.shutil.which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr("throttled_link.os.geteuid", lambda: 1000)
    assert "need root" in str(reason_against()) and "sudo" in str(reason_against())
    with pytest.raises(SystemExit, match="need root"):
        expert_exchange.main(["--quick"])


@needs_link
@pytest.mark.slow
def test_a_small_run_prints_the_houses_lines(tmp_path: Path) -> None:
    png = tmp_path / "steps.png"
    done = subprocess.run([*COMMAND, "--plot", str(png)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    assert [line["is_equal_point"] for line in lines] == [False, False, True]
    for line in lines:
        assert {"name", "case", "unit", "ours", "peer", "peer_name", "ratio", "bound", "bound_share", "spread"} <= set(
            line
        )
        assert line["ratio"] == pytest.approx(line["peer"] / line["ours"]) and line["config"]["sent_bytes"] > 0
        # the link is what takes the time: each direction carried the bytes at the bandwidth it was given, or slower
        fastest = line["config"]["sent_bytes"] / line["config"]["bytes_per_s"]
        assert sum(line["comm_ms"]) / 1e3 > 0.5 * fastest
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert DEVICE not in subprocess.run(["ip", "link"], capture_output=True, text=True).stdout


@needs_link
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_behind(how: signal.Signals) -> None:
    bench = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert bench.stdout is not None
    children: list[str] = []
    deadline = time.monotonic() + 200
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split()
        children = [pid for pid in children if "expert_exchange_rank" in arguments_of(pid)]
    assert len(children) == 2
    os.kill(bench.pid, how)
    bench.wait(timeout=60)
    while any("expert_exchange_rank" in arguments_of(pid) for pid in children):
        assert time.monotonic() < deadline, "a rank outlived the benchmark"
        time.sleep(0.2)


def arguments_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
