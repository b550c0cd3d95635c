"""Reading back what a run wrote: its steps without those that a roll-back undid, evaluations, events, settings."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError

Record = dict[str, Any]


@dataclass
class RunRecords:
    """A run folder, read."""

    folder: Path
    steps: list[Record] = field(default_factory=list)
    undone: list[Record] = field(default_factory=list)
    """Steps that a roll-back took back, as they were."""
    evaluations: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """Every setting of config.toml by dotted name."""
    environments: list[Record] = field(default_factory=list)
    """One per sitting."""

    @property
    def name(self) -> str:
        """What the run is called: its folder's name."""
        return self.folder.resolve().name

    def series(self, *path: str) -> tuple[list[float], list[float]]:
        """Tokens (millions) and values of one figure, of the steps that have it; `path` goes into nested tables."""
        tokens, values = [], []
        for record in self.steps:
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                tokens.append(record["tokens"] / 1e6)
                values.append(float(value))
        return tokens, values

    def keys(self, *path: str) -> list[str]:
        """Names in a nested table, in the order of their first appearance."""
        found: dict[str, None] = {}
        for record in self.steps:
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, dict):
                found.update(dict.fromkeys(value))
        return list(found)


def read_run(folder: str | Path) -> RunRecords:
    """Read a run folder. Raises: ConfigError when there is no metrics.jsonl in it."""
    folder = Path(folder)
    run = RunRecords(folder)
    for record in _lines(folder / "metrics.jsonl"):
        if "event" in record:
            run.events.append(record)
            if record["event"] == "rollback":
                _undo(run, record["step"])
        elif "held_out_loss" in record:
            run.evaluations.append(record)
        elif "step" in record:
            run.steps.append(record)
    run.settings = _settings(folder / "config.toml")
    if (folder / "env.json").is_file():
        run.environments = _lines(folder / "env.json")
    return run


def _undo(run: RunRecords, step: int) -> None:
    run.undone += [record for record in run.steps if record["step"] > step]
    run.steps = [record for record in run.steps if record["step"] <= step]
    run.evaluations = [record for record in run.evaluations if record["step"] <= step]


def _lines(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error.strerror or error}. A report is made from the figures that a run wrote there. "
            "Name the folder of a run (its --run-dir)."
        ) from error
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # a line cut short by a kill
    return records


def _settings(recipe: Path) -> dict[str, Any]:
    from rorqual.train.recipe_file import load_config
    from rorqual.train.settings import flatten

    return flatten(load_config([recipe])) if recipe.is_file() else {}
