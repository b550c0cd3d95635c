"""What the ablations found: tables, figures and the page, all made from the result lines and nothing else."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation_arms import STUDIES, Settings, at_lr
from ablation_runs import DEPTH, Results, best_lr, make_job, search
from ablation_stats import LIMIT, Comparison, Sample, compare
from ablation_text import CLAIMS, PAGE, STUDY_TEXT, sentence


@dataclass(frozen=True)
class Row:
    """One arm of a study."""

    arm: str
    sample: Sample
    bits_per_byte: float | None
    flops: float
    training_flops: float
    parameters: int
    lr: float
    comparison: Comparison | None
    """Against the study's base; None for the base itself."""
    failures: int


@dataclass(frozen=True)
class Table:
    """One study."""

    study: str
    rows: list[Row]

    def as_lines(self) -> Iterator[dict[str, Any]]:
        """One line per claim, as all benchmarks print them; `ours` is the side that has the ingredient."""
        base = self.rows[0]
        for row in self.rows[1:]:
            assert row.comparison is not None
            claim, speaks_for = CLAIMS[row.arm.partition("@")[0]]
            ours, peer = (base, row) if speaks_for == "higher" else (row, base)
            values = {"ours": list(ours.sample.values.values()), "peer": list(peer.sample.values.values())}
            yield {
                "name": f"ablations-{self.study}", "case": claim, "unit": "nats/token", "ours": ours.sample.mean,
                "peer": peer.sample.mean, "peer_name": peer.arm, "ratio": peer.sample.mean / ours.sample.mean,
                "bound": None, "bound_share": None, "spread": {k: [min(v), max(v)] for k, v in values.items()},
                "config": {
                    "ours": ours.arm, "values": values, "variant_against_base": dataclasses.asdict(row.comparison),
                    "flops_per_token": {"ours": ours.flops, "peer": peer.flops},
                    "parameters": {"ours": ours.parameters, "peer": peer.parameters},
                },
            }  # fmt: skip

    def as_text(self) -> str:
        """Lines for a terminal."""
        return "\n".join([f"[{self.study}]", *("  " + " | ".join(cells) for cells in [HEAD, *map(_cells, self.rows)])])

    def as_markdown(self) -> str:
        """A table for the page."""
        lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
        return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in self.rows])


HEAD = [
    "Arm", "Held out, nats/token (sd, seeds)", "bits/byte", "Against base", "in pooled sd", "paired sd",
    "MFLOPs/token (with MTP)", "Parameters",
]  # fmt: skip


def _cells(row: Row) -> list[str]:
    sd = "" if row.sample.sd is None else f"{row.sample.sd:.4f}, "
    failed = f"; {row.failures} diverged" if row.failures else ""
    c = row.comparison
    return [
        f"`{row.arm}`",
        f"{row.sample.mean:.4f} ({sd}{len(row.sample.values)}{failed})",
        "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
        "base" if c is None else f"{c.difference:+.4f}",
        "" if c is None or c.units is None else f"{c.units:+.1f}",
        "" if c is None or c.paired_sd is None else f"{c.paired_sd:.4f}",
        f"{row.flops / 1e6:.3f} ({row.training_flops / 1e6:.3f})" if row.flops else "",
        f"{row.parameters / 1e6:.2f}M" if row.parameters else "",
    ]


def lines_of(arm: str, results: Results, settings: Settings, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """The result lines of an arm under these settings; `muon` and `adamw` mean each at its best learning rate."""
    seeds = list(seeds)
    if arm in ("muon", "adamw"):
        best = best_lr(arm, seeds[0], settings, results)
        if best is None:
            return []
        arm = at_lr(arm, best, settings).name
    keys = [make_job(arm, seed, settings).key for seed in seeds]
    return [results[key] for key in keys if key in results]


def tables(results: Results, settings: Settings, seeds: list[int]) -> list[Table]:
    """Every study of which the base and one variant have run."""
    found = []
    for study, (base_name, variants) in STUDIES.items():
        base = _row(base_name, results, settings, seeds, None)
        rows = [_row(name, results, settings, seeds, base) for name in variants] if base else []
        if base and any(rows):
            found.append(Table(study, [base, *(row for row in rows if row)]))
    return found


def _row(arm: str, results: Results, settings: Settings, seeds: list[int], base: Row | None) -> Row | None:
    lines = _known(arm, results, settings, seeds)
    good = [line for line in lines if "failure" not in line]
    if not good:
        return None
    sample = Sample({line["seed"]: line["nats_per_token"] for line in good})
    bits = [line["bits_per_byte"] for line in good if line["bits_per_byte"] is not None]
    label = good[0]["arm"] if arm not in ("muon", "adamw") else f"{arm}@{good[0]['lr']:g}"
    return Row(
        label, sample, statistics.fmean(bits) if bits else None, good[0]["flops_per_token"],
        good[0]["training_flops_per_token"], good[0]["parameters"], good[0]["lr"],
        None if base is None else compare(sample, base.sample), len(lines) - len(good),
    )  # fmt: skip


def _known(arm: str, results: Results, settings: Settings, seeds: list[int]) -> list[dict[str, Any]]:
    """As `lines_of`; nothing for an arm that this checkout does not have."""
    try:
        return lines_of(arm, results, settings, seeds)
    except KeyError:
        return []


# ---------------------------------------------------------------- the page


def render(results: Results, settings: Settings, seeds: list[int], machine: Mapping[str, Any]) -> str:
    """docs/ablations.md."""
    found = tables(results, settings, seeds)
    parts = [PAGE.format(
        tokens=f"{settings.tokens:,}", step=f"{settings.tokens_per_step:,}",
        steps=f"{-(-settings.tokens // settings.tokens_per_step):,}",
        seq_len=settings.seq_len, lr=f"{settings.lr:g}", held_out=f"{settings.eval_tokens:,}", seeds=len(seeds),
        processor=machine["processor"], torch=machine["torch"], limit=f"{LIMIT:g}",
    )]  # fmt: skip
    parts.append("## In short\n\n" + "\n".join(_summary(found)))
    for table in found:
        title, text = STUDY_TEXT[table.study]
        verdicts = [sentence(row.arm, table.rows[0].arm, row.comparison) for row in table.rows[1:] if row.comparison]
        image = f"![Training loss of the arms]({_image(table.study)})"
        parts.append(f"## {title}\n\n{text}\n\n{table.as_markdown()}\n\n" + "\n".join(verdicts) + f"\n\n{image}")
        if table.study == "optimizer":
            parts.append(_grid(results, settings, seeds))
    depth = _depth_lines(results, settings, seeds)
    if depth:
        parts.append(_depth_text(depth, settings))
    return "\n\n".join(parts) + "\n"


def _image(study: str) -> str:
    return f"img/ablation_{study.replace('-', '_')}.png"


def _summary(found: list[Table]) -> list[str]:
    """Every claim under what the runs say of it; the figure in brackets is how much lower the loss is."""
    groups: dict[str, list[str]] = {"gain": [], "loss": [], "same": [], "unknown": []}
    for table in found:
        for row in table.rows[1:]:
            if row.comparison is None:
                continue
            claim, speaks_for = CLAIMS[row.arm.partition("@")[0]]
            gain = row.comparison.difference * (1 if speaks_for == "higher" else -1)
            verdict = row.comparison.verdict
            kind = verdict if verdict in groups else "gain" if verdict == speaks_for else "loss"
            groups[kind].append(f"{claim} ({gain:+.3f})")
    words = {
        "gain": "**Gains** beyond the noise, in nats/token: ",
        "loss": "**Losses** beyond the noise: ",
        "same": f"**Not separable** at this size (within {LIMIT:g} standard deviations): ",
        "unknown": "Too few seeds for a verdict: ",
    }
    return [f"- {words[kind]}{'; '.join(names)}." for kind, names in groups.items() if names]


def _grid(results: Results, settings: Settings, seeds: list[int]) -> str:
    """Every learning rate that was tried on the first seed."""
    lines = ["| Optimiser | Learning rate | Held out, nats/token (first seed) |", "| --- | --- | --- |"]
    for kind in ("muon", "adamw"):
        for lr in search(kind, seeds[0], settings, results):
            line = results.get(make_job(at_lr(kind, lr, settings).name, seeds[0], settings).key)
            value = (
                "not run" if line is None else f"{line['nats_per_token']:.4f}" if "failure" not in line else "diverged"
            )
            lines.append(f"| {kind} | {lr:g} | {value} |")
    return "\n".join(lines)


def _depth_lines(results: Results, settings: Settings, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    found = {arm: lines_of(arm, results, settings, seeds) for arm in DEPTH}
    return {arm: lines for arm, lines in found.items() if lines}


def _depth_text(depth: dict[str, list[dict[str, Any]]], settings: Settings) -> str:
    title, text = STUDY_TEXT["depth"]
    table = "\n".join(_depth_rows(depth, settings))
    picture = f"![Gains and gradients by depth]({_image('depth')})"
    return f"## {title}\n\n{text.format(layers=settings.depth_layers)}\n\n{table}\n\n{picture}"


def depth_table(results: Results, settings: Settings, seeds: list[int]) -> str:
    """The depth study for a terminal; nothing where it has not run."""
    depth = _depth_lines(results, settings, seeds)
    return "\n".join(["[depth]", *_depth_rows(depth, settings)]) if depth else ""


def _depth_rows(depth: dict[str, list[dict[str, Any]]], settings: Settings) -> list[str]:
    head = ["Residual path", "When", "Signal, last layer", "Gradient, first layer", "Gain forward (largest)",
            "Gain backward (largest)", "Largest gradient norm", "Held out, nats/token"]  # fmt: skip
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for arm, lines in depth.items():
        runs = [line for line in lines if "depth" in line]
        losses = [line["nats_per_token"] for line in lines if "failure" not in line]
        for when, words in (("start", "start"), ("end", f"after {settings.depth_tokens:,} tokens")):
            figure = {
                key: statistics.fmean(pick(run["depth"][when][key]) for run in runs) if runs else math.nan
                for key, pick in (("signal", _last), ("gradient", _first), ("forward", _last), ("backward", _last),
                                  ("forward_largest", _last), ("backward_largest", _last))
            }  # fmt: skip
            cells = [
                f"`{arm.removeprefix('depth-')}`", words, f"{figure['signal']:.3g}", f"{figure['gradient']:.3g}",
                f"{figure['forward']:.4g} ({figure['forward_largest']:.4g})",
                f"{figure['backward']:.4g} ({figure['backward_largest']:.4g})",
            ]  # fmt: skip
            failed = sum("failure" in line for line in lines)
            largest = max((line["grad_norm_largest"] for line in runs), default=math.nan)
            after = [f"{largest:.3g}", f"{_spread(losses)}{f', {failed} diverged' if failed else ''}"]
            rows.append("| " + " | ".join(cells + (after if when == "end" else ["", ""])) + " |")
    return rows


def _first(values: list[float]) -> float:
    return values[0]


def _last(values: list[float]) -> float:
    return values[-1]


def _spread(values: list[float]) -> str:
    if not values:
        return "none finished"
    sd = f" (sd {statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{sd}"


# ---------------------------------------------------------------- figures


def figures(results: Results, settings: Settings, seeds: list[int], folder: Path, prefix: str) -> None:
    """One PNG per study into `folder`; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables(results, settings, seeds):
        base, variants = STUDIES[table.study]
        curves = {name: _curves(_known(name, results, settings, seeds)) for name in (base, *variants)}
        _draw_study(
            {k: v for k, v in curves.items() if v}, base, folder / f"{prefix}_{table.study.replace('-', '_')}.png"
        )
    depth = _depth_lines(results, settings, seeds)
    if any("depth" in line for lines in depth.values() for line in lines):
        _draw_depth(depth, settings, folder / f"{prefix}_depth.png")


Curves = dict[int, tuple[list[float], list[float]]]
"""By seed: tokens (millions) and smoothed training loss."""


def _curves(lines: list[dict[str, Any]]) -> Curves:
    found: Curves = {}
    for line in lines:
        if "curve" in line:
            values, smooth = [loss for _, loss in line["curve"]], []
            for i in range(len(values)):
                near = values[max(0, i - 2) : i + 3]
                smooth.append(sum(near) / len(near))
            found[line["seed"]] = ([tokens / 1e6 for tokens, _ in line["curve"]], smooth)
    return found


def _draw_study(curves: dict[str, Curves], base: str, image: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for number, (name, by_seed) in enumerate(curves.items()):
        colour = f"C{number}"
        _band(left, list(by_seed.values()), name, colour)
        if name != base:
            pairs = [
                (by_seed[s][0], [a - b for a, b in zip(by_seed[s][1], curves[base][s][1], strict=False)])
                for s in by_seed
                if s in curves[base]
            ]
            _band(right, pairs, f"{name} minus {base}", colour)
    right.axhline(0, color="black", linewidth=0.8)
    for axes, label in (
        (left, "training cross-entropy (nats per token)"),
        (right, "difference, same seed (nats per token)"),
    ):
        axes.set_xlabel("training tokens (millions)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    if len(curves[base]) > 0:
        longest = next(iter(curves[base].values()))[1]
        tail = longest[len(longest) // 10 :]
        left.set_ylim(top=max(tail) * 1.05)
    _save(figure, image)


def _band(axes: Any, series: list[tuple[list[float], list[float]]], label: str, colour: str) -> None:
    """Mean over seeds as a line, smallest to largest as a band."""
    if not series:
        return
    x = min((s[0] for s in series), key=len)
    columns = list(zip(*(s[1] for s in series), strict=False))
    style = "-" if colour == "C0" else "--"  # arms that agree lie on each other
    axes.plot(x, [statistics.fmean(c) for c in columns], style, label=label, color=colour, linewidth=1.4)
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, linewidth=0)


def _draw_depth(depth: dict[str, list[dict[str, Any]]], settings: Settings, image: Path) -> None:
    from matplotlib import pyplot

    panels = (("signal", "streams' RMS over the embeddings'"), ("gradient", "gradient norm over the last layer's"),
              ("forward", "composed mix, forward gain"), ("backward", "composed mix, backward gain"))  # fmt: skip
    figure, grid = pyplot.subplots(2, len(panels), figsize=(16, 7), sharex=True)
    for row, (when, words) in zip(
        grid, (("start", "at the start"), ("end", f"after {settings.depth_tokens:,} tokens")), strict=True
    ):
        for axes, (key, label) in zip(row, panels, strict=True):
            for number, (arm, lines) in enumerate(depth.items()):
                series = [line["depth"][when][key] for line in lines if "depth" in line]
                _band(axes, [(list(range(1, len(s) + 1)), s) for s in series], arm.removeprefix("depth-"), f"C{number}")
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.5), max(high, 2.0))  # a flat line shall look flat
            axes.set_title(f"{label}\n{words}", fontsize=9)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    _save(figure, image)


def _save(figure: Any, image: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(image, dpi=110)
    pyplot.close(figure)
