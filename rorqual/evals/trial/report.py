"""A trial's result as rows for a terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError
from rorqual.evals.records import Record, read_records
from rorqual.evals.report import STYLE, escape, shown, table

MOST_SHOWN = 20
_GRADES = {"C": "right", "P": "partly right", "I": "wrong", "A": "not answered"}
_BARS = (  # what became of a question, its colour, and that of the number on it
    ("right", "#2b7a78", "#fff"),
    ("rightly declined", "#8fb8b6", "#222"),
    ("partly right", "#e3c878", "#222"),
    ("not answered", "#c9c4b5", "#222"),
    ("wrong", "#c8553d", "#fff"),
)
_SVG_STYLE = """
td { white-space: normal; } svg text { font: 13px system-ui, sans-serif; fill: #222; }
svg { max-width: 100%; height: auto; }
"""


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, before, after, change) of the table."""
    before, after, change = result["before"], result["after"], result["change"]
    out = [
        ("wrong answers", _share(before["wrong"]), _share(after["wrong"]), _tested(change["wrong"])),
        ("right", _share(before["right"]), _share(after["right"]), _tested(change["right"])),
        ("HR, of what was not right", _percent(before["HR"]), _percent(after["HR"]), ""),
        ("RET, right ones kept", "", _percent(change["RET"]), _between(change["RET_interval"])),
        ("OI", shown(before["OI"]), shown(after["OI"]), _less(after["OI"], before["OI"])),
        ("right before, wrong after", "", str(change["right_to_wrong"]["n"]), ""),
        ("wrong before, right after", "", str(change["wrong_to_right"]), ""),
    ]
    times = change["latency_ms"]
    for name in ("p50", "p95"):
        told = _mean(times, "ms") if name == "p50" else ""
        out.append((f"latency {name}, ms", shown(before["latency_ms"][name]), shown(after["latency_ms"][name]), told))
    tokens = _mean(change["completion_tokens"], "")
    out.append(("tokens written", str(before["tokens"]["completion"]), str(after["tokens"]["completion"]), tokens))
    out.append(("tokens read", str(before["tokens"]["prompt"]), str(after["tokens"]["prompt"]), ""))
    out.append(("VER, referee's tokens a token", "", shown(change["VER"]), ""))
    if "cost" in before:
        currency = result["price"]["currency"]
        more = "" if not before["cost"] else f"{after['cost'] / before['cost'] - 1:+.1%}"
        out.append((f"cost, {currency}", f"{before['cost']:.6f}", f"{after['cost']:.6f}", more))
        out.append((f"cost a right answer, {currency}", _money(before["CPS"]), _money(after["CPS"]), ""))
    return out


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html`; returns its path. Raises: ConfigError when it cannot be written, DataError."""
    path = folder / "report.html"
    arms = [{r.item_id: r for r in read_records(folder / f"{name}.jsonl")} for name in ("bare", "referee")]
    try:
        path.write_text(page(result, *arms), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {folder} ({error.strerror or error}). Make room or choose another --out; "
            "the answers are kept."
        ) from None
    return path


def page(result: Mapping[str, Any], bare: Mapping[str, Record], after: Mapping[str, Record]) -> str:
    """The page's text."""
    title = f"Referee on trial: {result['model']}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}{_SVG_STYLE}</style>"
    settings = result["settings"]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{result['n']} questions of {escape(result['set'])}, each asked once of {escape(result['upstream'])}: as "
        f"the answer came, and as it left the referee (mode {escape(settings['mode'])}, policy "
        f"{escape(settings['policy_id'])}). {result['undecided']['n']} undecided, left out of both columns.</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in result["notes"]),
        table(("", "before", "after", "change"), rows(result)),
        "<h2>What became of the answers</h2>",
        bars(result),
        "<h2>By kind of question</h2>",
        table(("", "n", "wrong before", "wrong after", "right before", "right after"), _kinds(result)),
        "<h2>What the referee said</h2>",
        table(("verdict", "questions"), result["verdicts"].items()),
        table(("reason", "questions"), result["reasons"].items()) if result["reasons"] else "<p>No reasons.</p>",
        "<h2>Answers that changed</h2>",
        *_changed(bare, after),
        "<h2>What was run</h2>",
        table(("", ""), ((key, result[key]) for key in ("run_id", "set_sha", "settings", "undecided", "seconds"))),
    ]
    return f'<!doctype html>\n<html lang="en">{head}\n' + "\n".join(parts) + "\n</html>\n"


def bars(result: Mapping[str, Any]) -> str:
    """Two bars of what became of the questions, as SVG with the numbers in words."""
    width, left, high = 700, 70, 34
    words, shapes = [], list[str]()
    for row, name in enumerate(("before", "after")):
        sizes, n = _became(result[name]), max(1, result[name]["n"])
        y, x = row * (high + 12), float(left)
        shapes.append(f'<text x="0" y="{y + 22}">{name}</text>')
        for (_, colour, ink), count in zip(_BARS, sizes, strict=True):
            size = (width - left) * count / n
            if not size:
                continue
            shapes.append(f'<rect x="{x:.1f}" y="{y}" width="{size:.1f}" height="{high}" fill="{colour}"/>')
            if size > 30:
                shapes.append(f'<text x="{x + 6:.1f}" y="{y + 22}" style="fill:{ink}">{count}</text>')
            x += size
        words.append(f"{name}: " + ", ".join(f"{n} {bar[0]}" for bar, n in zip(_BARS, sizes, strict=True)))
    y = 2 * (high + 12)
    for i, (name, colour, _) in enumerate(_BARS):
        x = left + i * 126
        shapes.append(f'<rect x="{x}" y="{y}" width="13" height="13" fill="{colour}"/>')
        shapes.append(f'<text x="{x + 19}" y="{y + 12}">{name}</text>')
    alt = escape("; ".join(words))
    return f'<svg role="img" aria-label="{alt}" viewBox="0 0 {width} {y + 18}" width="{width}">{"".join(shapes)}</svg>'


def _became(arm: Mapping[str, Any]) -> tuple[int, ...]:
    """Questions of an arm in the order of `_BARS`."""
    grades, declined = arm["grades"], arm["rightly_declined"]
    return grades["C"], declined, grades["P"], grades["A"] - declined, grades["I"]


def _changed(bare: Mapping[str, Record], after: Mapping[str, Record]) -> Iterable[str]:
    """Answers that went out otherwise than they came; those that became wrong first."""
    changed = [(b, after[i]) for i, b in bare.items() if i in after and b.output_text != after[i].output_text]
    changed.sort(key=lambda pair: (not (pair[0].score >= 1 and pair[1].score < 1), pair[0].item_id))
    yield f"<p>{len(changed)} answers; {min(len(changed), MOST_SHOWN)} of them:</p>"
    for one, other in changed[:MOST_SHOWN]:
        yield f"<h3>{escape(one.item_id)}: {_word(one)} before, {_word(other)} after</h3>"
        yield f"<p>right: {escape(one.gold[:300])}</p>"
        yield from (f"<pre>{escape(text[:800]) or '(nothing)'}</pre>" for text in (one.output_text, other.output_text))


def _kinds(result: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    for kind, cell in result["by_kind"].items():
        yield [kind, cell["n"], *cell["wrong"], *cell["right"]]


def _word(record: Record) -> str:
    if record.grade == "A" and record.score >= 1:
        return "rightly declined"
    return _GRADES.get(record.grade, "undecided")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _between(bounds: Mapping[str, float] | None) -> str:
    return "" if bounds is None else f"95 %: {_percent(bounds['low'])} to {_percent(bounds['high'])}"


def _share(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{_percent(found['value'])} ({100 * found['low']:.1f}-{100 * found['high']:.1f})"


def _tested(change: Mapping[str, float | None]) -> str:
    difference, p = change["difference"], change["p"]
    return "-" if difference is None or p is None else f"{100 * difference:+.1f} points, p = {p:.3g}"


def _mean(found: Mapping[str, float] | None, unit: str) -> str:
    if found is None:
        return ""
    return f"{found['value']:+.1f} {unit} a question ({found['low']:+.1f} to {found['high']:+.1f})".replace("  ", " ")


def _less(after: float | None, before: float | None) -> str:
    return "" if after is None or before is None else f"{after - before:+.1f}"


def _money(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
