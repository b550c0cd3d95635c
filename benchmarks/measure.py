"""What the benchmarks share: the line they print, interleaved timing, and the machine's own limits.

A line is one JSON object: `name`, `case` (LENGTH/MODEL/THREADS/DTYPE), `unit`, `ours`, `peer`, `peer_name`,
`ratio` (how many times better ours is), `bound` and `bound_share` (the machine's limit for this work,
measured in the same run, and the share of it that ours reaches), `spread` (min and max over repeats) and
`config` (what exactly was run).
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def length_name(length: int) -> str:
    """`32768` -> `32K`."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def print_line(line: Mapping[str, Any], *, as_json: bool) -> None:
    """One finished measurement, for machines or for people."""
    if as_json:
        print(json.dumps(line), flush=True)
        return
    peer = "did not run" if line["peer"] is None else _figure(line["peer"])
    ratio = "" if line["ratio"] is None else f"  ratio {line['ratio']:.2f}"
    known = line["bound_share"] is not None
    share = f"  ({100 * line['bound_share']:.0f}% of the machine's limit)" if known else ""
    print(
        f"{line['name']} {line['case']}: ours {_figure(line['ours'])} {line['unit']}, "
        f"{line['peer_name']} {peer}{ratio}"
        f"{share}",
        flush=True,
    )
    if line.get("peer_failure"):
        print(f"  {line['peer_name']}: {line['peer_failure']}", flush=True)


def _figure(value: float) -> str:
    """Whole numbers where they have three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def note(text: str) -> None:
    """Progress, on stderr so that stdout stays machine-readable."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Rate:
    """How much work a second was done: by the clock, and by the processor time of this process.

    On a quiet machine and one thread the two are equal; on a busy one the second still compares fairly.
    """

    wall: float
    cpu: float


class Stopwatch:
    """Measures from its creation."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def rate(self, work: float) -> Rate:
        """`work` per second since the creation."""
        return Rate(work / (time.perf_counter() - self._wall), work / (time.process_time() - self._cpu))


def interleaved(ours: Callable[[], Rate], peer: Callable[[], Rate], repeats: int) -> tuple[list[Rate], list[Rate]]:
    """Run the two by turns, so that a slow moment of the machine hits both; the first pair is thrown away."""
    a: list[Rate] = []
    b: list[Rate] = []
    for number in range(repeats + 1):
        for run, kept in ((ours, a), (peer, b)) if number % 2 else ((peer, b), (ours, a)):
            value = run()
            if number:
                kept.append(value)
    return a, b


def middle(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def spread(ours: list[float], peer: list[float]) -> dict[str, list[float]]:
    """Smallest and largest of each side."""
    return {
        "ours": [min(ours), max(ours)] if ours else [],
        "peer": [min(peer), max(peer)] if peer else [],
    }


def matmul_flops_per_s(size: int = 768, seconds: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """Best rate of a matrix product on the threads torch may use; int8 is summed in 32 bits."""
    a, b = (10 * torch.randn(size, size)).to(dtype), (10 * torch.randn(size, size)).to(dtype)
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def weight_bytes_per_s(num_bytes: int, seconds: float = 1.0) -> float:
    """Best rate at which a matrix of this size is read by matrix-vector products (so caches count as they do
    in decoding).
    """
    rows = max(1, num_bytes // (4 * 512))
    matrix, vector = torch.randn(rows, 512), torch.randn(512)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - start)
    return matrix.numel() * 4 / best


def process_bytes(field: str) -> int:
    """A memory figure of this process in bytes: `VmRSS` (now), `VmHWM` (peak since `forget_peak`) or
    `VmSize`.

    Off Linux only the peak since the start is known (`resource`), and it stands for all three.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Start the peak (`VmHWM`) again at the present size, where the system lets a process do so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        note("cannot reset the peak of this process; the figures include what loading needed")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {"processor": model, "torch": torch.__version__, "threads": torch.get_num_threads()}
