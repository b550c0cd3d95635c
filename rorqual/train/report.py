"""What a run tells while it goes on: `metrics.jsonl`, one progress line, `env.json`. The report is `run_report.py`'s.

People get one `rich` line; when the output is not a terminal, JSON lines. Trackers can be fed from
`metrics.jsonl`.
"""

import json
import math
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
from rorqual.ops.device import name as device_name

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
        """Append one record and hand it to the operating system. Numbers that are none become null, as JSON wants."""
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Unwritten:
    """In place of `Metrics` on ranks that write nothing."""

    def write(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


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

    def expect(self, total_tokens: int) -> None:
        """Say how much there is to do, where that was not known before, and begin anew."""
        if self._rich is not None:
            self._rich.update(self._task, total=total_tokens, completed=0)

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
        "device": device_name(torch.device(device)),
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


def _processor() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None
