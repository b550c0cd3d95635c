"""What a distillation says of a phase, and the figure of its divergences."""

import json
from pathlib import Path
from typing import Any

from rorqual import log
from rorqual.errors import MissingExtraError
from rorqual.train.report import duration
from rorqual.train.run_plots import COLOURS, pyplot, smooth

logger = log.get(__name__)


def sentence_of(phase: int, phases: int, figures: dict[str, Any], seconds: float) -> str:
    """One line of progress: a bar, divergences by teacher, and how long it will take."""
    filled = round(20 * phase / phases)
    by_teacher = "  ".join(f"{name} {value:.4f}" for name, value in figures["kl"].items())
    return (
        f"[{'#' * filled}{'.' * (20 - filled)}] {phase}/{phases}  KL {by_teacher}  length {figures['length']:.0f}  "
        f"{duration((phases - phase) * seconds)} left"
    )


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Divergence by teacher over the updates, as metrics.jsonl has it."""
    out: dict[str, list[tuple[int, float]]] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        record = json.loads(line)
        for name, value in (record.get("kl") or {}).items():
            if value is not None:
                out.setdefault(name, []).append((record["step"], value))
    return out


def save_plot(folder: Path) -> bool:
    """Draw plots/kl.png of a run; False without matplotlib (with a line in the log) or without figures."""
    found = curves(folder)
    if not found:
        return False
    try:
        plt = pyplot()
    except MissingExtraError as error:
        logger.warning("No plot was saved: %s", error)
        return False
    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (name, points) in enumerate(sorted(found.items())):
        steps, values = zip(*points, strict=True)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=colour, label=name)
    axes.set(xlabel="updates", ylabel="KL(student || teacher), nats per token", yscale="log")
    axes.legend()
    figure.tight_layout()
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "plots" / "kl.png", dpi=120)
    plt.close(figure)
    return True
