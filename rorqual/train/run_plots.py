"""The figures of a run report, as PNG images in memory. Needs matplotlib (the `plots` extra)."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rorqual import log
from rorqual.errors import MissingExtraError
from rorqual.train.run_records import RunRecords, read_run

logger = log.get(__name__)

COLOURS = ("#2a6f97", "#c8553d", "#588157", "#8a5a9e", "#b08900", "#3d405b", "#7f8c8d", "#d17a9c")
"""Of runs in a comparison, and of the few lines of one figure."""

Draw = Callable[[RunRecords, Any], bool]
"""Draws a run on axes; False when the run has nothing to show there."""


def pyplot() -> Any:
    """matplotlib's drawing module, without a window. Raises: MissingExtraError where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as module
    except ImportError as error:
        raise MissingExtraError(
            'Figures need matplotlib, which is not installed. Install it with: pip install "rorqual[plots]".'
        ) from error
    return module


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential running mean over about a fiftieth of the points, corrected at the start."""
    keep = 1.0 - 1.0 / max(len(values) / 50, 1.0)
    total = weight = 0.0
    out = []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def save_plot(folder: Path) -> bool:
    """Draw the loss of the run in `folder` into its plots/loss.png; False (and a log line) without matplotlib."""
    try:
        run = read_run(folder)
        image = _figure("cross-entropy (nats per token)", False, partial(_loss, run), run.events)
    except MissingExtraError:
        logger.warning('No plot was saved, because matplotlib is not installed: pip install "rorqual[plots]".')
        return False
    if image is not None:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        (folder / "plots" / "loss.png").write_bytes(image)
    return image is not None


def figures(run: RunRecords) -> list[tuple[str, bytes]]:
    """(title, PNG) of every figure that the run has data for."""
    out = []
    for title, label, is_log, draw in FIGURES:
        image = _figure(label, is_log, partial(draw, run), run.events)
        if image is not None:
            out.append((title, image))
    return out


def comparisons(runs: Sequence[RunRecords]) -> list[tuple[str, bytes]]:
    """(title, PNG) of the figures in which several runs lie over each other."""
    out = []
    for title, label, is_log, path in COMPARED:

        def draw(axes: Any, path: tuple[str, ...] = path) -> bool:
            drawn = [_compared(axes, run, path, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)]
            return any(drawn)

        image = _figure(label, is_log, draw, [])
        if image is not None:
            out.append((title, image))
    return out


MOST_NAMES = 36
"""Lines a figure names at most; more leave no room for the lines."""


def _figure(label: str, is_log: bool, draw: Callable[[Any], bool], events: Sequence[dict[str, Any]]) -> bytes | None:
    plots = pyplot()
    figure, axes = plots.subplots(figsize=(7.6, 3.4))
    try:
        if not draw(axes):
            return None
        for event in events:
            if event["event"] == "rollback" and "tokens" in event:
                axes.axvline(event["tokens"] / 1e6, color="#c8553d", linewidth=0.8, linestyle=":")
        if is_log:
            axes.set_yscale("log")
        axes.set_xlabel("training tokens (millions)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        handles, names = axes.get_legend_handles_labels()
        every = max(1, -(-len(names) // MOST_NAMES))  # of very many lines (a deep network's layers) only some are named
        handles, names = handles[::every], names[::every]
        columns = -(-len(names) // 18)
        is_outside = len(names) > 4
        figure.subplots_adjust(left=0.1, right=0.97 - 0.2 * columns * is_outside, top=0.96, bottom=0.15)
        if len(names) > 1:
            place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02)} if is_outside else {"loc": "best"}
            axes.legend(handles, names, fontsize=7, frameon=False, ncols=columns, **place)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
        return out.getvalue()
    finally:
        plots.close(figure)


def _loss(run: RunRecords, axes: Any) -> bool:
    tokens, values = run.series("lm")
    if not values:
        return False
    axes.plot(tokens, values, linewidth=0.6, alpha=0.35, color=COLOURS[0], label="one step")
    axes.plot(tokens, smooth(values), linewidth=1.5, color=COLOURS[0], label="running mean")
    undone = [(r["tokens"] / 1e6, r["lm"]) for r in run.undone if isinstance(r.get("lm"), float)]
    if undone:
        axes.plot(*zip(*undone, strict=True), ".", markersize=2, color=COLOURS[6], label="undone by a roll-back")
    if run.evaluations:
        at = [record["tokens"] / 1e6 for record in run.evaluations]
        held_out = [record["held_out_loss"] for record in run.evaluations]
        axes.plot(at, held_out, "o-", color=COLOURS[1], markersize=3, linewidth=1, label="held out")
    # Spikes are what the figure is for only when they were kept; undone ones may lie far above it.
    low, high = min(values), max(values)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low) if high > low else high + 1)
    return True


def _lines(*paths: tuple[str, tuple[str, ...]]) -> Draw:
    """One line for each (label, path) that the run has."""

    def draw(run: RunRecords, axes: Any) -> bool:
        found = False
        for index, (label, path) in enumerate(paths):
            tokens, values = run.series(*path)
            if values:
                axes.plot(tokens, values, linewidth=1, color=COLOURS[index % len(COLOURS)], label=label)
                found = True
        return found

    return draw


def _table(*path: str) -> Draw:
    """One line (running mean) for each entry of a nested table, coloured from first (dark) to last."""

    def draw(run: RunRecords, axes: Any) -> bool:
        names = run.keys(*path)
        colours = pyplot().get_cmap("viridis")
        for index, name in enumerate(names):
            tokens, values = run.series(*path, name)
            axes.plot(tokens, smooth(values), linewidth=0.9, color=colours(index / max(len(names), 2)), label=name)
        return bool(names)

    return draw


def _compared(axes: Any, run: RunRecords, path: tuple[str, ...], colour: str) -> bool:
    if path == ("held_out_loss",):
        tokens = [record["tokens"] / 1e6 for record in run.evaluations]
        values = [record["held_out_loss"] for record in run.evaluations]
        style = "o-"
    else:
        tokens, values = run.series(*path)
        values, style = smooth(values), "-"
    if values:
        axes.plot(tokens, values, style, markersize=3, linewidth=1.2, color=colour, label=run.name)
    return bool(values)


FIGURES: tuple[tuple[str, str, bool, Draw], ...] = (
    ("Loss", "cross-entropy (nats per token)", False, _loss),
    ("Parts of the loss", "unweighted value", True, _lines(
        ("MTP", ("mtp",)), ("indexers", ("index",)), ("balance", ("balance",)),
    )),
    ("Balance of the experts: busiest over mean, minus one", "MaxVio", False, _table("max_violation")),
    ("Gradient norm", "norm before clipping", True, _lines(("all", ("grad_norm",)))),
    ("Gradient norm by part", "norm before clipping", True, _table("grad_norms")),
    ("Weight norm by part", "norm", True, _table("weight_norms")),
    ("Muon update at learning rate 1", "root mean square", False, _lines(("update", ("muon_update_rms",)))),
    ("Amplification of the composed residual mix", "largest row or column sum", False, _lines(
        ("forward (rows)", ("health", "gain_forward")), ("backward (columns)", ("health", "gain_backward")),
    )),
    ("Residual mix: share that stays in its stream", "mean diagonal", False, _table("health", "mix_diagonal")),
    ("Residual mix: distance of column sums from 1", "largest error", True, _table("health", "mix_column_error")),
    ("Recall of the indexers' picks", "share of attention mass caught", False, _lines(("recall", ("index_recall",)))),
    ("Log-normaliser z of the output head", "nats", False, _lines(("mean", ("z",)), ("largest", ("z_max",)))),
    ("Largest router logit", "logit", False, _table("health", "router_logit")),
    ("SwiGLU inputs beyond the clamp", "share", False, _lines(("clamped", ("health", "clamp_rate")))),
    ("Learning rate", "learning rate", False, _lines(("lr", ("lr",)))),
    ("Speed", "tokens per second", False, _lines(("all processes", ("tokens_per_s",)))),
)  # fmt: skip
"""Title, label of the y axis, whether it is logarithmic, and what draws it."""

COMPARED: tuple[tuple[str, str, bool, tuple[str, ...]], ...] = (
    ("Loss, running mean", "cross-entropy (nats per token)", False, ("lm",)),
    ("Held-out loss", "cross-entropy (nats per token)", False, ("held_out_loss",)),
    ("Gradient norm, running mean", "norm before clipping", True, ("grad_norm",)),
    ("Forward amplification of the composed residual mix", "largest row sum", False, ("health", "gain_forward")),
    ("Backward amplification of the composed residual mix", "largest column sum", False, ("health", "gain_backward")),
    ("Recall of the indexers' picks", "share of attention mass caught", False, ("index_recall",)),
    ("Log-normaliser z of the output head", "nats, mean", False, ("z",)),
    ("Speed", "tokens per second", False, ("tokens_per_s",)),
)
