"""What a run tells: `metrics.jsonl`, one progress line, `env.json`, and the loss plot.

People get one `rich` line; when the output is not a terminal, JSON lines. Trackers can be fed from
`metrics.jsonl`.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from rorqual import log

logger = log.get(__name__)


class Metrics:
    """Appends records to `metrics.jsonl`; on resume, drops those after the checkpoint (they will be made
    again).
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept: list[str] = []
        if resume_step > 0 and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    continue  # a line cut short by a kill
        draft = path.with_suffix(".draft")
        draft.write_text("".join(kept), encoding="utf-8")
        draft.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and hand it to the operating system."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ProgressLine:
    """Step, loss, tokens per second and time left; `mode` is `rich`, `json` or `quiet`."""

    def __init__(self, mode: str, total_tokens: int) -> None:
        self.mode = mode
        self._rich: Any = None
        if mode == "rich":
            from rich.progress import BarColumn, Progress, TextColumn

            self._rich = Progress(
                TextColumn("step {task.fields[step]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>5.1f}%  loss {task.fields[loss]:.4f}"),
                TextColumn("{task.fields[speed]:,.0f} tokens/s  {task.fields[left]} left"),
                refresh_per_second=4,
            )
            self._task = self._rich.add_task(
                "train", total=total_tokens, step=0, loss=float("nan"), speed=0.0, left="?"
            )

    def __enter__(self) -> "ProgressLine":
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def update(self, record: dict[str, Any], seconds_left: float) -> None:
        """Show a step's record (keys `step`, `tokens`, `lm`, `tokens_per_s`)."""
        if self._rich is not None:
            self._rich.update(
                self._task,
                completed=record["tokens"],
                step=record["step"],
                loss=record["lm"],
                speed=record["tokens_per_s"],
                left=duration(seconds_left),
            )
        elif self.mode == "json":
            self.say({**record, "seconds_left": round(seconds_left)})

    def say(self, record: dict[str, Any], text: str = "") -> None:
        """Print an event: its `text` to people, `record` to machines."""
        if self.mode == "json":
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()
        elif self._rich is not None and text:
            self._rich.console.print(text, highlight=False)


def duration(seconds: float) -> str:
    """Seconds as `1h 05m`, `3m 20s` or `12s`."""
    whole = int(max(seconds, 0))
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(seed: int, device: str, threads: int, processes: int) -> dict[str, Any]:
    """Versions, commit, machine and seed of a run, for `env.json`."""
    from rorqual import __version__

    return {
        "rorqual": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": _device_name(torch.device(device)),
        "threads": threads,
        "processes": processes,
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return str(device)
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name(device)) if name is not None else str(device)


def _processor() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def save_plot(metrics: Path, image: Path) -> bool:
    """Draw the loss curve of a run; False (and a log line) where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        logger.warning('No plot was saved, because matplotlib is not installed: pip install "rorqual[plots]".')
        return False
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if "lm" in r]
    evaluations = [r for r in records if "held_out_loss" in r]
    if not steps:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    tokens = [r["tokens"] / 1e6 for r in steps]
    axes.plot(tokens, [r["lm"] for r in steps], linewidth=0.6, alpha=0.35, color="tab:blue", label="one step")
    axes.plot(tokens, _smooth([r["lm"] for r in steps]), linewidth=1.5, color="tab:blue", label="running mean")
    if evaluations:
        at = [r["tokens"] / 1e6 for r in evaluations]
        axes.plot(at, [r["held_out_loss"] for r in evaluations], "o-", color="tab:red", ms=3, lw=1, label="held out")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=120)
    pyplot.close(figure)
    return True


def _smooth(values: list[float]) -> list[float]:
    """Exponential running mean over about a fiftieth of the points, corrected at the start."""
    keep = 1.0 - 1.0 / max(len(values) / 50, 1.0)
    total = weight = 0.0
    out = []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(total / weight)
    return out
