"""The figures of a run as PNG images: depth x length, reliability, risk over coverage, shares by stratum."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rorqual.evals.context_metrics import cells
from rorqual.evals.metrics import auroc, reliability, risk_coverage
from rorqual.evals.statistics import Interval, bootstrap_mean
from rorqual.evals.suites.base import Row, Suite
from rorqual.train.run_plots import COLOURS, pyplot

MOST_BARS = 24
Draw = Callable[[Any], bool]


def figures(suite: Suite, rows: Sequence[Row], forced: Sequence[Row] | None) -> list[tuple[str, str, bytes]]:
    """(file name, title, PNG) of every figure the run has data for; `rows` and `forced` hold no undecided item.

    Raises: MissingExtraError without matplotlib.
    """
    judged = [r for r in (forced if forced is not None else rows) if r.confidence is not None]
    scores, right = [r.confidence or 0.0 for r in judged], [r.passed and r.grade == "C" for r in judged]
    wanted: list[tuple[str, str, Draw]] = []
    if rows and {"length", "depth"} <= set(rows[0].item.stratum):
        mapped = suite.mapped(rows)
        right_at = cells((_place(r), r.passed) for r in mapped)
        wanted.append(
            ("depth-length", "Share right by length and depth", lambda axes: _heat(axes, right_at, "share right"))
        )
        hits = _hits(mapped)
        wanted.append(
            ("nbh-depth-length", "Block hit rate (NBH) by length and depth", lambda axes: _heat(axes, hits, "NBH"))
        )
    if suite.wants_forced and judged:
        wanted += [
            ("reliability", "Reliability of the answers' confidence", lambda axes: _reliability(axes, scores, right)),
            ("risk-coverage", "Risk over coverage", lambda axes: _risk(axes, scores, right)),
        ]
    wanted += [
        (f"by-{key.replace('_', '-')}", f"Share right by {key.replace('_', ' ')}", _bars_of(rows, key))
        for key in (suite.strata or tuple(rows[0].item.stratum if rows else ()))
    ]
    found = []
    for name, title, draw in wanted:
        image = _image(draw)
        if image is not None:
            found.append((name, title, image))
    return found


def _image(draw: Draw) -> bytes | None:
    plots = pyplot()
    figure, axes = plots.subplots(figsize=(7.2, 3.8))
    try:
        if not draw(axes):
            return None
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
        return out.getvalue()
    finally:
        plots.close(figure)


def _place(row: Row) -> tuple[int, float]:
    return row.item.stratum["length"], row.item.stratum["depth"]


def _hits(rows: Sequence[Row]) -> dict[tuple[int, float], Interval]:
    """Mean NBH over the layers of each length and depth, with a bootstrap interval, where it was recorded."""
    found = defaultdict[tuple[int, float], list[float]](list)
    for row in rows:
        if "nbh" in row.signals:
            found[_place(row)].append(row.signals["nbh"])
    means = {place: bootstrap_mean(values, seed=0) for place, values in found.items()}
    return {place: mean for place, mean in means.items() if mean is not None}


def _heat(axes: Any, table: Mapping[tuple[int, float], Interval], label: str) -> bool:
    """A cell for each length and depth, its value in it and half the width of its interval in small print."""
    if not table:
        return False
    lengths, depths = sorted({key[0] for key in table}), sorted({key[1] for key in table})
    nan = float("nan")
    values = [[table[(n, d)].value if (n, d) in table else nan for n in lengths] for d in depths]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.figure.colorbar(image, label=label)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * d:.0f}" for d in depths], fontsize=7)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth (%)")
    if len(lengths) * len(depths) <= 200:
        for x, n in enumerate(lengths):
            for y, d in enumerate(depths):
                if (cell := table.get((n, d))) is not None:
                    half = (cell.high - cell.low) / 2
                    colour = "black" if cell.value > 0.6 else "white"
                    text = f"{100 * cell.value:.0f} ±{100 * half:.0f}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=5, color=colour)
    return True


def _reliability(axes: Any, scores: Sequence[float], right: Sequence[bool]) -> bool:
    bins = reliability(scores, right)
    axes.plot([0, 1], [0, 1], linestyle=":", color=COLOURS[6], label="calibrated")
    axes.plot([b.confidence for b in bins], [b.right for b in bins], "o-", color=COLOURS[0], label="bins of equal mass")
    axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    return len(bins) > 1


def _risk(axes: Any, scores: Sequence[float], right: Sequence[bool]) -> bool:
    if auroc(scores, right) is None:
        return False
    n = len(scores)
    coverage = [(i + 1) / n for i in range(n)]
    axes.plot(coverage, risk_coverage(scores, right), color=COLOURS[0], label="by confidence")
    axes.plot(coverage, risk_coverage([float(y) for y in right], right), color=COLOURS[2], label="perfect order")
    axes.axhline(1 - sum(right) / n, linestyle=":", color=COLOURS[6], label="no order")
    axes.set(xlabel="coverage (share of items answered)", ylabel="risk (share wrong among them)", xlim=(0, 1))
    axes.legend(frameon=False)
    return True


def _bars_of(rows: Sequence[Row], key: str) -> Draw:
    def draw(axes: Any) -> bool:
        table = cells((str(r.item.stratum[key]), r.passed) for r in rows if r.item.stratum.get(key) is not None)
        if not 1 < len(table) <= MOST_BARS:
            return False
        names = sorted(table, key=lambda name: (0, float(name), "") if _is_number(name) else (1, 0.0, name))
        values = [table[name].value for name in names]
        # rounding may put the share outside its interval by an ulp, which matplotlib refuses
        below = [max(0.0, table[name].value - table[name].low) for name in names]
        above = [max(0.0, table[name].high - table[name].value) for name in names]
        axes.bar(range(len(names)), values, yerr=[below, above], color=COLOURS[0], ecolor=COLOURS[5], capsize=2)
        axes.set_xticks(
            range(len(names)), names, rotation=30 if len(names) > 6 else 0, ha="right" if len(names) > 6 else "center"
        )
        axes.set(xlabel=key.replace("_", " "), ylabel="share right, 95 % interval", ylim=(0, 1))
        return True

    return draw


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
