"""A run as one HTML page that needs nothing else: figures as embedded images, events, settings, machine.

`write_report` makes `report.html` in a run's folder from what the run wrote there, `write_comparison` lays several runs
over each other. Where matplotlib is not installed the page says so and keeps its tables.
"""

import base64
import html
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rorqual import log
from rorqual.errors import ConfigError, MissingExtraError, RorqualError
from rorqual.train import run_plots
from rorqual.train.run_records import Record, RunRecords, read_run

logger = log.get(__name__)

REFRESH_SECONDS = 120.0
"""Drawing takes seconds."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
figure { margin: 1.2rem 0; } figcaption { font-weight: 600; margin-bottom: .3rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; } td, th { text-align: left; padding: .15rem .9rem .15rem 0;
  vertical-align: top; } th { font-weight: 600; border-bottom: 1px solid #ccc; }
td.n { font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 0 1.5rem; }
code { font-size: .88em; } .note { color: #666; }
"""


class Reporter:
    """Keeps the report of a run that is going on up to date; a refusal is a warning, for training matters more."""

    def __init__(self, folder: Path, is_on: bool) -> None:
        self.folder, self.is_on = folder, is_on
        self._next = 0.0

    def write(self, *, is_last: bool = False) -> None:
        """Write `report.html`; while the run goes on, not more often than every `REFRESH_SECONDS`."""
        if not self.is_on or (not is_last and time.monotonic() < self._next):
            return
        try:
            write_report(self.folder)
        except RorqualError as error:
            logger.warning("The run has no report. %s", error)
        except Exception:  # whatever a drawing library raises, the run must not end for want of a picture
            logger.exception("The report could not be drawn; the run goes on without")
        self._next = time.monotonic() + REFRESH_SECONDS


def write_report(folder: str | Path) -> Path:
    """Write `report.html` of the run in `folder` and return its path.

    Raises: ConfigError when the folder holds no run, or the page cannot be written.
    """
    run = read_run(folder)
    last = run.steps[-1] if run.steps else None
    parts = [f"<h1>{_text(run.name)}</h1>", _facts(_summary(run))]
    parts += _figures(lambda: run_plots.figures(run))
    if run.events:
        rows = [[e["step"], e["event"], _details(e, ("step", "event", "tokens", "time"))] for e in run.events]
        parts += ["<h2>Events</h2>", _table(("step", "event", "details"), rows)]
    if run.evaluations:
        parts += [
            "<h2>Held-out text</h2>",
            _table(("step", "group", "nats per token", "bits per byte"), _held_out(run)),
        ]
    if last is not None:
        shown = {key: value for key, value in last.items() if not isinstance(value, dict)}
        parts += ["<h2>Last logged step</h2>", _facts(shown.items())]
    if run.settings:
        parts += ["<h2>Settings that differ from the defaults</h2>", _facts(_changed(run.settings))]
        parts += ["<details><summary>All settings</summary>", _facts(run.settings.items()), "</details>"]
    for index, environment in enumerate(run.environments, start=1):
        title = "Machine" if len(run.environments) == 1 else f"Machine, sitting {index}"
        parts += [f"<h2>{title}</h2>", _facts(environment.items())]
    return _write(run.folder / "report.html", f"{run.name} - run report", parts)


def write_comparison(folders: Sequence[str | Path], target: str | Path | None = None) -> Path:
    """Write a page that lays the runs in `folders` over each other (`compare.html` in the first) and return its path.

    Raises: ConfigError for fewer than two folders, a folder without a run, or a page that cannot be written.
    """
    if len(folders) < 2:
        raise ConfigError(
            f"A comparison of {len(folders)} run has nothing to compare. Name two or more run folders, or use --report."
        )
    runs = [read_run(folder) for folder in folders]
    head = ("", *(run.name for run in runs))
    summaries = [dict(_summary(run)) for run in runs]
    names = dict.fromkeys(name for summary in summaries for name in summary)
    rows: list[list[Any]] = [[name, *(summary.get(name, "") for summary in summaries)] for name in names]
    parts = ["<h1>Runs compared</h1>", _table(head, rows)]
    parts += _figures(lambda: run_plots.comparisons(runs))
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    different: list[list[Any]] = [
        [key, *(repr(run.settings.get(key, "")) for run in runs)]
        for key in keys
        if key != "run.folder" and len({repr(run.settings.get(key, "")) for run in runs}) > 1
    ]
    parts += ["<h2>Settings that differ</h2>", _table(head, different) if different else "<p>None.</p>"]
    return _write(Path(target) if target else runs[0].folder / "compare.html", "Runs compared", parts)


def _summary(run: RunRecords) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = []
    if run.steps:
        last = run.steps[-1]
        facts += [("steps", last["step"]), ("tokens", f"{last['tokens']:,}")]
        losses = run.series("lm")[1]
        if losses:
            tail = losses[-max(1, len(losses) // 50) :]
            facts.append(
                ("training loss, mean of the last logged steps", f"{sum(tail) / len(tail):.4f} nats per token")
            )
        speed = run.series("tokens_per_s")[1]
        if speed:
            facts.append(("speed, median", f"{sorted(speed)[len(speed) // 2]:,.0f} tokens per second"))
    for _, group, nats, bits in _held_out(run)[-_num_groups(run) :] if run.evaluations else []:
        facts.append((f"held out, {group}", f"{nats} nats per token" + (f", {bits} bits per byte" if bits else "")))
    spikes = sum(event["event"] == "spike" for event in run.events)
    rollbacks = sum(event["event"] == "rollback" for event in run.events)
    facts.append(("spikes noticed, roll-backs", f"{spikes}, {rollbacks}"))
    return facts


def _num_groups(run: RunRecords) -> int:
    return len(run.evaluations[-1]["held_out"])


def _held_out(run: RunRecords) -> list[list[Any]]:
    rows = []
    for record in run.evaluations:
        for group, figures in record["held_out"].items():
            bits = figures["bits_per_byte"]
            nats = figures["nats_per_token"]
            rows.append([record["step"], group, f"{nats:.4f}", "" if bits is None else f"{bits:.4f}"])
    return rows


def _changed(settings: Record) -> Iterable[tuple[str, Any]]:
    from rorqual.train.config import TrainConfig
    from rorqual.train.settings import flatten

    defaults = flatten(TrainConfig())
    return [(name, value) for name, value in settings.items() if defaults.get(name) != value]


def _figures(draw: Any) -> list[str]:
    try:
        images = draw()
    except MissingExtraError as error:
        logger.warning("The report has no figures. %s", error)
        return [f'<p class="note">{_text(error)}</p>']
    cells = [
        f"<figure><figcaption>{_text(title)}</figcaption>"
        f'<img alt="{_text(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for title, png in images
    ]
    return ['<div class="plots">', *cells, "</div>"] if cells else ['<p class="note">No step was logged yet.</p>']


def _details(record: Record, left_out: Sequence[str]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in record.items() if key not in left_out)


def _facts(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f'<tr><td>{_text(name)}</td><td class="n">{_text(_short(value))}</td></tr>' for name, value in pairs)
    return f"<table>{rows}</table>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="n">{_text(_short(cell))}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _text(value: object) -> str:
    return html.escape(str(value))


def _write(path: Path, title: str, parts: Sequence[str]) -> Path:
    page = (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{_text(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )
    draft = path.with_suffix(".draft")
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. The report is kept beside the run. Free some space or "
            "correct the permissions."
        ) from error
    return path
