"""A run as one HTML page that needs nothing else: figures beside the baselines', strata, images, raw failures."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError, MissingExtraError
from rorqual.evals import plots
from rorqual.evals.run import Outcome
from rorqual.evals.suites.base import Row

MOST_FAILURES = 20
MOST_CHARACTERS = 1200

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; }
td, th { text-align: right; padding: .15rem .8rem .15rem 0; vertical-align: top; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } th { font-weight: 600; border-bottom: 1px solid #ccc; }
td { font-variant-numeric: tabular-nums; } img { max-width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 0 1.5rem; }
figure { margin: 1rem 0; } figcaption { font-weight: 600; } .note { color: #8a3b12; }
pre { white-space: pre-wrap; background: #f5f5f5; padding: .5rem; font-size: .82rem; overflow-wrap: anywhere; }
"""


def write(outcome: Outcome, folder: Path) -> list[str]:
    """Write `plots/*.png` and `report.html`; returns the paths of the images. They are told in the result, too.

    Without matplotlib there are no images, and the result's notes say so. Raises: ConfigError when a file cannot be
    written.
    """
    rows = [r for r in outcome.rows if r.grade != "X"]
    forced = None if outcome.forced is None else [r for r in outcome.forced if r.grade != "X"]
    try:
        drawn = plots.figures(outcome.suite, rows, forced)
    except MissingExtraError as error:
        drawn = []
        outcome.result["notes"].append(str(error))
    paths = []
    try:
        (folder / "plots").mkdir(exist_ok=True)
        for name, _, image in drawn:
            path = folder / "plots" / f"{name}.png"
            path.write_bytes(image)
            paths.append(str(path))
        (folder / "report.html").write_text(page(outcome, drawn), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {folder} ({error.strerror or error}). Make room or choose another --out; "
            "the records are kept."
        ) from None
    return paths


def page(outcome: Outcome, drawn: Sequence[tuple[str, str, bytes]]) -> str:
    """The page's text."""
    result = outcome.result
    title = f"{result['suite']} of {result['model']['id']}"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_sentence(result))}</p>"]
    parts += [f'<p class="note">{escape(note)}</p>' for note in result["notes"]]
    parts += ["<h2>Headline, beside programs without a model</h2>", _headline(result)]
    parts += ['<div class="plots">']
    for _, caption, image in drawn:
        data = base64.b64encode(image).decode()
        alt = html.escape(caption, quote=True)
        parts.append(
            f'<figure><figcaption>{alt}</figcaption><img alt="{alt}" src="data:image/png;base64,{data}"></figure>'
        )
    parts += ["</div>", "<h2>Strata</h2>"]
    for key, cells in result["strata"].items():
        parts += [f"<h3>{escape(key)}</h3>", _strata(cells)]
    parts += ["<h2>Failures, as they came</h2>", *_failures(outcome.rows)]
    parts += ["<h2>What was run</h2>", table(("", ""), _facts(result))]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n{body}\n</html>\n'


def shown(value: Any) -> str:
    """A figure for people: three digits behind the point, a dash where it is not defined."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _sentence(result: Mapping[str, Any]) -> str:
    return (
        f"{result['n']} items of split {result['split']}, seed {result['seed']}; run {result.get('run_id', '')}. "
        f"{result['undecided']['n']} undecided. A synthetic suite: its figures stand beside no public leaderboard's."
    )


def _headline(result: Mapping[str, Any]) -> str:
    names, intervals = result["baselines"], result["intervals"]
    rows = []
    for metric, value in result["headline"].items():
        bounds = intervals.get(metric)
        between = "" if bounds is None else f"{shown(bounds[0])} to {shown(bounds[1])}"
        rows.append([metric, shown(value), between, *(shown(names[name].get(metric)) for name in names)])
    return table(("metric", "model", "95 % interval", *names), rows)


def _strata(cells: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for cell in cells.values() for name in cell))
    return table(("", *columns), ([name, *(shown(cell.get(c)) for c in columns)] for name, cell in cells.items()))


def _failures(rows: Sequence[Row]) -> Iterable[str]:
    """The first failures of each stratum in turn, so that one kind does not fill the gallery."""
    failed = [r for r in rows if not r.passed]
    kinds: dict[str, list[Row]] = {}
    for row in failed:
        kinds.setdefault(str(next(iter(row.item.stratum.values()), "")), []).append(row)
    chosen = [group[i] for i in range(MOST_FAILURES) for group in kinds.values() if i < len(group)][:MOST_FAILURES]
    yield f"<p>{len(failed)} of {len(rows)} items were not right; {len(chosen)} of them:</p>"
    for row in chosen:
        asked = str(row.item.messages[-1].get("content", "")) if row.item.messages else str(row.item.prompt)
        yield f"<h3>{escape(row.item.id)} · {row.grade} · {escape(row.item.stratum)}</h3>"
        for text in (asked, row.text, f"gold: {row.item.gold}"):
            yield f"<pre>{escape(_cut(text))}</pre>"


def _facts(result: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name in ("model", "engine", "guard", "usage", "cost", "grades", "undecided", "spec", "seconds", "folder"):
        yield name, result.get(name)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in HTML; its cells are plain text."""
    lines = ["<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _cut(text: str) -> str:
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]}\n[...]\n{text[-half:]}"


def escape(value: Any) -> str:
    """A value as text that is safe inside an element or a quoted attribute."""
    return html.escape(str(value), quote=True)
