"""Figures of docs/guard.md from the lines of `needle_guard.py` and `guard_attribution.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LENGTH_ORDER = ("1K", "4K", "16K", "64K", "256K")


def draw_all(lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """One PNG a figure, of those whose lines are there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    hits = [line for line in lines if line.get("kind") == "nbh" and line["overlap"] == "literal"]
    if hits:
        _depths(plt, hits, folder / "guard_depth.png")
        _phases(plt, hits, folder / "guard_phase.png")
    if len([line for line in lines if line.get("kind") == "nbh"]) > 2:
        _lengths(plt, [line for line in lines if line.get("kind") == "nbh"], folder / "guard_length.png")
    labels = [line for line in lines if line.get("kind") == "labels"]
    if labels:
        _labels(plt, labels[-1], folder / "guard_attribution.png")


def _of(lines: Sequence[dict[str, Any]], policy: str, overlap: str = "literal") -> dict[str, dict[str, Any]]:
    found = {
        line["case"].split("/")[0]: line for line in lines if (line["policy"], line["overlap"]) == (policy, overlap)
    }
    return {length: found[length] for length in LENGTH_ORDER if length in found}


def _heat(plt: Any, axis: Any, rows: dict[str, dict[str, Any]], key: str, columns: int, title: str) -> Any:
    cells, texts = [], []
    for line in rows.values():
        counts = [line["config"][key].get(str(i), [0, 0]) for i in range(columns)]
        cells.append([100 * a / b if b else float("nan") for a, b in counts])
        texts.append([str(b - a) if b > a else "" for a, b in counts])
    image = axis.imshow(cells, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            axis.text(x, y, text, ha="center", va="center", fontsize=6, color="white")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_title(title, fontsize=9)
    return image


def _depths(plt: Any, lines: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True, layout="constrained")
    for axis, (policy, title) in zip(
        axes, (("trained", "without the guard"), ("default", "with the guard")), strict=True
    ):
        image = _heat(plt, axis, _of(lines, policy), "by_depth", 16, title)
        axis.set_xlabel("depth of the needle, sixteenths of the text")
    axes[0].set_ylabel("tokens")
    figure.colorbar(image, ax=axes, label="needles shown, %")
    figure.suptitle("Needles whose entry a query is shown (numbers: missed)", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _phases(plt: Any, lines: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True, layout="constrained")
    for axis, (policy, title) in zip(
        axes, (("trained", "without the guard"), ("default", "with the guard")), strict=True
    ):
        image = _heat(plt, axis, _of(lines, policy), "by_phase", 16, title)
        axis.set_xlabel("4 × (needle's place mod 4) + text's length mod 4")
    axes[0].set_ylabel("tokens")
    figure.colorbar(image, ax=axes, label="needles shown, %")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lengths(plt: Any, lines: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for policy, overlap, style in (
        ("trained", "literal", "o-"), ("default", "literal", "s-"), ("trained", "paraphrased", "o--"),
        ("default", "paraphrased", "s--"),
    ):  # fmt: skip
        rows = _of(lines, policy, overlap)
        if rows:
            share = [100 * line["ours"] for line in rows.values()]
            low, high = zip(*(line["spread"]["ours"] for line in rows.values()), strict=True)
            axis.plot(list(rows), share, style, label=f"{overlap}, {'guard' if policy == 'default' else 'no guard'}")
            axis.fill_between(list(rows), [100 * x for x in low], [100 * x for x in high], alpha=0.15)
    rows = _of(lines, "trained")
    axis.plot(
        list(rows), [100 * line["config"]["random"] for line in rows.values()], ":", color="grey", label="random k"
    )
    axis.set_xlabel("tokens of the text")
    axis.set_ylabel("needles shown, %")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _labels(plt: Any, line: dict[str, Any], path: Path) -> None:
    by_length: dict[str, dict[str, int]] = line["config"]["by_length"]
    names = sorted({name for counts in by_length.values() for name in counts})
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    base = [0] * len(by_length)
    for name in names:
        values = [counts.get(name, 0) for counts in by_length.values()]
        axis.bar(list(by_length), values, bottom=base, label=name)
        base = [a + b for a, b in zip(base, values, strict=True)]
    axis.set_xlabel("estimated tokens of the text")
    axis.set_ylabel("failed items")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
