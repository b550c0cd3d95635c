"""What a GRPO run writes down of each phase, and the figure it draws of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rorqual import log
from rorqual.errors import MissingExtraError
from rorqual.posttrain.grpo import Objective
from rorqual.posttrain.rewards.base import Answer, Score
from rorqual.posttrain.trainer import Update
from rorqual.train.run_plots import COLOURS, pyplot, smooth

logger = log.get(__name__)


@dataclass
class Tally:
    """Sums over the updates of one phase. `begin` is called before each update."""

    updates: list[Update] = field(default_factory=list)
    tokens: int = 0
    rows: int = 0
    clipped: float = 0.0
    masked: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    ratio: float = 0.0
    drift: float = 0.0
    drift_tokens: int = 0
    begun: int = 0

    def begin(self) -> None:
        self.begun += 1

    def add(self, found: Objective, entropy: float, rows: int) -> None:
        """A micro-batch of `rows` answers. entropy: sum over its tokens."""
        self.tokens += found.num_tokens
        self.rows += rows
        self.clipped += found.clipped
        self.masked += found.masked
        self.kl += found.kl
        self.ratio += found.ratio
        self.entropy += entropy
        if self.begun == 1:  # later ones differ from the sampling policy because the policy moved
            self.drift += found.drift
            self.drift_tokens += found.num_tokens

    def figures(self) -> dict[str, Any]:
        """Means over the tokens or answers that were trained on, NaN where nothing was.

        mismatch: mean |log pi_train - log pi_infer| before the first update, which should be rounding and no more.
        """
        tokens, rows = self.tokens or float("nan"), self.rows or float("nan")
        return {
            "loss": sum(u.loss for u in self.updates) / len(self.updates),
            "grad_norm": sum(u.grad_norm for u in self.updates) / len(self.updates),
            "lr": self.updates[-1].lr,
            "clip_share": self.clipped / tokens,
            "mask_share": self.masked / rows,
            "kl": self.kl / tokens,
            "ratio": self.ratio / tokens,
            "entropy": self.entropy / tokens,
            "mismatch": self.drift / (self.drift_tokens or float("nan")),
            "trained_tokens": self.tokens,
        }


def answer_figures(answers: Sequence[Answer], scores: Sequence[Score], advantages: Tensor) -> dict[str, Any]:
    """Figures of the answers of a phase. idle_share: answers without advantage, which teach nothing."""
    count = len(answers)
    values = [score.value for score in scores if score.value is not None]
    lengths = [answer.num_tokens for answer in answers]
    figures: dict[str, Any] = {
        "reward": sum(values) / len(values) if values else float("nan"),
        "accuracy": sum(bool(score.is_correct) for score in scores) / count,
        "abstention_share": sum(bool(score.is_abstention) for score in scores) / count,
        "undecided": count - len(values),
        "length": sum(lengths) / count,
        "length_max": max(lengths),
        "truncated_share": sum(answer.finish == "length" for answer in answers) / count,
        "idle_share": float((advantages == 0).double().mean()),
        "tokens": sum(lengths),
    }
    modes = dict.fromkeys(answer.mode for answer in answers)
    if len(modes) > 1:
        figures["length_by_mode"] = {
            mode: sum(own) / len(own)
            for mode in modes
            if (own := [answer.num_tokens for answer in answers if answer.mode == mode])
        }
    return figures


PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward",)),
    ("tokens an answer", ("length",)),
    ("share of answers", ("accuracy", "abstention_share", "truncated_share")),
    ("entropy (nats)", ("entropy",)),
    ("KL to the reference (nats)", ("kl",)),
    ("share clipped, masked", ("clip_share", "mask_share")),
    ("|log pi_train - log pi_infer|", ("mismatch",)),
    ("seconds", ("rollout_s", "train_s")),
)
"""Label of the y axis, and the figures drawn there."""


def save_plot(folder: Path) -> bool:
    """Draw the metrics of the run in `folder` into its plots/grpo.png; False (and a log line) without matplotlib."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    phases = [record for record in records if "event" not in record]
    held_out = [record for record in records if record.get("event") == "eval"]
    try:
        plots = pyplot()
    except MissingExtraError:
        logger.warning('No plot was saved, because matplotlib is not installed: pip install "rorqual[plots]".')
        return False
    figure, grid = plots.subplots(2, 4, figsize=(15, 6.2), layout="constrained")
    for axes, (label, names) in zip(grid.flat, PANELS, strict=True):
        for colour, name in zip(COLOURS, names, strict=False):
            points = [(r["phase"], r[name]) for r in phases if r.get(name) is not None]
            if points:
                at, values = zip(*points, strict=True)
                axes.plot(at, values, linewidth=0.6, alpha=0.35, color=colour)
                axes.plot(at, smooth(values), linewidth=1.4, color=colour, label=name)
        name = names[0]
        points = [(r["phase"], r[name]) for r in held_out if r.get(name) is not None]
        if points and name in ("reward", "accuracy"):
            axes.plot(*zip(*points, strict=True), "o--", color=COLOURS[3], markersize=3, linewidth=1, label="held out")
        axes.set_xlabel("phase")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, linewidth=0.6)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize=7, frameon=False)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "plots" / "grpo.png", dpi=110)
    plots.close(figure)
    return True


def line_of(phase: int, steps: int, figures: dict[str, Any]) -> str:
    """A phase in one line, for people."""
    return (
        f"phase {phase}/{steps}  reward {figures['reward']:.3f}  right {100 * figures['accuracy']:.0f}%  "
        f"abstained {100 * figures['abstention_share']:.0f}%  {figures['length']:.0f} tokens  "
        f"entropy {figures['entropy']:.2f}  {figures['rollout_s']:.1f}+{figures['train_s']:.1f} s"
        + (
            f"  age {figures['staleness_mean']:.2f}  waited {100 * figures['trainer_idle_share']:.0f}%"
            if "staleness_mean" in figures
            else ""
        )
    )


def sentence_of(phase: int, figures: dict[str, Any]) -> str:
    """An evaluation in one line, for people."""
    reward, retention = figures["reward"], figures["retention"]
    return (
        f"held out after {phase}: reward {'-' if reward is None else f'{reward:.3f}'}, right "
        f"{100 * figures['accuracy']:.1f}%, abstained {100 * figures['abstention_share']:.1f}%"
        + ("" if retention is None else f", retention {100 * retention:.1f}%")
    )
