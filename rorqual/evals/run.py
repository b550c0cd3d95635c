"""A whole run: its settings, its folder, the passes over the items, and the result that is printed and kept.

    result = evaluate(RunSettings(suite="facts", seed=0), target, world)

Folder: `config.json` (what was asked, resolved), `env.json`, `records.jsonl` and `forced.jsonl` (one record an item),
`result.json`, `plots/`, `report.html`. A run that was killed goes on where it stopped when it is started again with the
same settings and folder; with other settings the folder is refused.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rorqual import __version__
from rorqual.data.tasks import World
from rorqual.data.tasks.base import Item, Size, Split
from rorqual.errors import ConfigError
from rorqual.evals.economy import PriceVector
from rorqual.evals.execution import Pass, run_pass
from rorqual.evals.metrics import Counts, accuracy, hallucination_rate, omniscience_index
from rorqual.evals.model_grader import ModelGrader
from rorqual.evals.records import Record, RecordFile, Sampling
from rorqual.evals.suites.base import Figure, Figures, Row, Setting, Suite
from rorqual.evals.suites.registry import build
from rorqual.evals.targets.base import Target

MOST_UNDECIDED = 0.005
"""Share of undecided items above which a run is invalid."""

Progress = Callable[[str, int, int], None]
"""What is being done, items done, and all of them."""


@dataclass(frozen=True)
class RunSettings:
    """What was asked. items, max_tokens: None takes the suite's own. forced: None runs it where it is possible.

    repeat: how often each question is asked, the same way; more than once gives REPEAT.
    """

    suite: str
    seed: int = 0
    size: Size = "small"
    split: Split = "test"
    items: int | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    guard: bool | None = None
    forced: bool | None = None
    repeat: int = 1
    lengths: tuple[int, ...] = ()
    price: PriceVector = PriceVector()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A finished run: the object that is printed, and what the figures are drawn from."""

    result: dict[str, Any]
    suite: Suite
    rows: list[Row]
    forced: list[Row] | None


def evaluate(
    settings: RunSettings,
    target: Target,
    world: World,
    folder: Path,
    on_progress: Progress = lambda *_: None,
    grader: ModelGrader | None = None,
) -> Outcome:
    """Run a suite against a target, or finish the run that `folder` holds. Raises: ConfigError, DataError.

    grader: grades answers that strings cannot, where the suite takes one.
    """
    began = time.monotonic()
    suite = build(settings.suite, _setting(settings, target, world))
    if grader is not None and not suite.takes_grader:
        raise ConfigError(f"{suite.name} grades exactly, so --judge has nothing to do. It is for facts with --set.")
    suite.grader = grader
    items = suite.items(settings.split, settings.seed, settings.items)
    if not items:
        raise ConfigError("--items 0 asks for nothing, so there is nothing to measure. Ask for at least one item.")
    run_id = prepare(folder, settings, suite, target)
    sampling = Sampling(
        temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed,
        max_tokens=settings.max_tokens or suite.max_tokens,
    )  # fmt: skip
    forced_wanted = suite.wants_forced and settings.forced is not False
    if settings.forced and not target.can_force:
        raise ConfigError(
            "--forced needs the model's own scores, to mask abstentions, and a server does not give them. Give the "
            "checkpoint with --model, or leave --forced out."
        )
    notes: list[str] = []
    with ExitStack() as stack:
        stack.callback(getattr(suite, "close", lambda: None))
        file = stack.enter_context(RecordFile(folder / "records.jsonl"))
        records = run_pass(
            suite, items, target, file, Pass(run_id, settings.seed, sampling, guard=settings.guard),
            lambda done, total: on_progress("answering", done, total),
        )  # fmt: skip
        forced: list[Record] | None = None
        if forced_wanted and target.can_force:
            forced_file = stack.enter_context(RecordFile(folder / "forced.jsonl"))
            forced = run_pass(
                suite, items, target, forced_file,
                Pass(f"{run_id}-forced", settings.seed, sampling, is_forced=True, guard=settings.guard),
                lambda done, total: on_progress("answering, abstentions masked", done, total),
            )  # fmt: skip
        elif forced_wanted:
            notes.append("RET, OVER and RESCUE need a forced run, which is not possible through a server.")
        repeats = [records]
        for turn in range(2, settings.repeat + 1):
            more = stack.enter_context(RecordFile(folder / f"repeat-{turn}.jsonl"))
            once = Pass(f"{run_id}-repeat-{turn}", settings.seed, sampling, guard=settings.guard)
            told = f"asking again ({turn} of {settings.repeat})"
            repeats.append(run_pass(suite, items, target, more, once, partial(on_progress, told)))
        rows, forced_rows = _rows(items, records), None if forced is None else _rows(items, forced)
        result = summarise(settings, suite, records, rows, forced_rows, notes)
        if settings.repeat > 1:
            figure = changed_share(repeats)
            result["headline"]["REPEAT"] = figure.value
            result["intervals"] |= _intervals({"REPEAT": figure})
    result |= {"run_id": run_id, "folder": str(folder), "seconds": round(time.monotonic() - began, 3)}
    return Outcome(result, suite, rows, forced_rows)


def changed_share(passes: Sequence[Sequence[Record]]) -> Figure:
    """REPEAT: of the items answered in every pass, the share whose answer is not the same in all of them."""
    answers = [
        {one.output_text for one in same} for same in zip(*passes, strict=True) if all(r.grade != "X" for r in same)
    ]
    return Figure.of_share(len(texts) > 1 for texts in answers)


def summarise(
    settings: RunSettings,
    suite: Suite,
    records: Sequence[Record],
    rows: Sequence[Row],
    forced: Sequence[Row] | None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The result as one JSON-ready object: figures under `headline`, intervals, strata and baselines below."""
    decided = [r for r in rows if r.grade != "X"]
    decided_forced = None if forced is None else [r for r in forced if r.grade != "X"]
    figures = suite.figures(decided, decided_forced, settings.price)
    tally = Counts.of(r.grade for r in rows)
    rate = tally.undecided_rate or 0.0
    found = list(notes) + [f"{name} is not defined here." for name, figure in figures.items() if figure.value is None]
    if rate > MOST_UNDECIDED:
        found.insert(0, f"Invalid: {tally.X:.0f} of {len(rows)} items could not be decided, more than 0.5 %.")
    items = [r.item for r in rows]
    first = records[0]
    return {
        "suite": suite.name,
        "suite_version": suite.version,
        "seed": settings.seed,
        "split": settings.split,
        "size": settings.size,
        "model": {"id": first.model_id, "sha": first.model_sha, "tokenizer_sha": first.tokenizer_sha},
        "engine": first.engine.model_dump(),
        "guard": settings.guard,
        "n": len(rows),
        "valid": rate <= MOST_UNDECIDED,
        "headline": {name: figure.value for name, figure in figures.items()},
        "intervals": _intervals(figures),
        "grades": {letter: int(getattr(tally, letter)) for letter in ("C", "P", "I", "A", "X")},
        "undecided": {"n": int(tally.X), "rate": rate, "reasons": _reasons(records), "worst_case": _worst(tally)},
        "strata": suite.cells(decided),
        "baselines": baselines(suite, items, settings, decided_forced),
        "usage": _usage(records),
        "cost": {"price": asdict(settings.price), "total": sum(settings.price.cost(r.usage) for r in records)},
        "notes": found,
        "spec": suite.spec(),
    }


def baselines(
    suite: Suite, items: Sequence[Item], settings: RunSettings, forced: Sequence[Row] | None
) -> dict[str, dict[str, float | None]]:
    """The same figures for programs without a model; `always-answer` is the model with abstentions masked."""
    out: dict[str, dict[str, float | None]] = {}
    for name in suite.programs():
        figures = suite.figures(suite.run_program(name, items, settings.seed), None, settings.price)
        out[name] = {key: figure.value for key, figure in figures.items() if figure.value is not None}
    if forced is not None:
        figures = suite.figures(forced, forced, settings.price)
        shared = set(figures) - set(suite.confidence_ids) - {"RET", "OVER", "RESCUE"}
        out["always-answer"] = {key: figures[key].value for key in figures if key in shared}
    return out


def prepare(folder: Path, settings: RunSettings, suite: Suite, target: Target) -> str:
    """Make the folder, or see that it holds this very run; returns the run's id. Raises: ConfigError."""
    who = target.identity
    asked = asdict(settings) | {
        "spec": suite.spec(),
        "target": {
            "model": who.model_id,
            "sha": who.model_sha,
            "tokenizer": who.tokenizer_sha,
            "engine": who.engine.name,
        },
    }
    asked = json.loads(json.dumps(asked, default=str))
    run_id = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    keep_settings(folder, asked)
    return run_id


def keep_settings(folder: Path, asked: dict[str, Any]) -> None:
    """Write what was asked into a new folder, or see that it holds the same. Raises: ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.json"
        if config.exists():
            before = json.loads(config.read_text())
            different = sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key))
            if different:
                raise ConfigError(
                    f"{folder} holds a run with other settings ({', '.join(different)}). Two runs would mix in its "
                    "records. Choose another --out, or repeat the settings to finish that one."
                )
        else:
            _write(config, asked)
            _write(
                folder / "env.json",
                {"rorqual": __version__, "python": platform.python_version(), "platform": platform.platform()},
            )
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{folder} cannot hold a run ({getattr(error, 'strerror', None) or error}). Choose another --out."
        ) from None


def _write(path: Path, data: Any) -> None:
    """Put JSON into a file, whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def save_result(folder: Path, result: dict[str, Any]) -> None:
    """Keep the printed object beside the records."""
    _write(folder / "result.json", result)


def _setting(settings: RunSettings, target: Target, world: World) -> Setting:
    return Setting(world, settings.size, target.count_tokens, settings.lengths, settings.options)


def _rows(items: Sequence[Item], records: Sequence[Record]) -> list[Row]:
    return [Row.of(item, record) for item, record in zip(items, records, strict=True)]


def _intervals(figures: Figures) -> dict[str, list[float]]:
    return {name: [f.interval.low, f.interval.high] for name, f in figures.items() if f.interval is not None}


def _worst(tally: Counts) -> dict[str, float | None]:
    """Figures with every undecided item counted as incorrect."""
    worst = tally.worst()
    return {"ACC": accuracy(worst), "OI": omniscience_index(worst), "HR": hallucination_rate(worst)}


def _reasons(records: Sequence[Record]) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for record in records:
        if record.grade == "X":
            reason = (record.error or "not told")[:120]
            reasons[reason] = reasons.get(reason, 0) + 1
    return reasons


def _usage(records: Sequence[Record]) -> dict[str, int]:
    names = ("prompt", "completion", "reasoning", "cached", "referee_prompt", "referee_completion")
    return {name: sum(getattr(r.usage, name) for r in records) for name in names}
