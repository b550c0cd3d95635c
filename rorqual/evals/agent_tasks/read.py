"""Finding the tasks of a set: a folder of Terminal-Bench's folders, one of them, or a file of SWE-bench's rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError, RorqualError
from rorqual.evals.agent_tasks.swe import TEST_COMMAND, SweTask
from rorqual.evals.agent_tasks.task import AgentTask, InvalidTask
from rorqual.evals.agent_tasks.terminal import TerminalTask


def read_tasks(
    source: Path, *, only: Sequence[str] = (), repos: Path | None = None, test_command: str = TEST_COMMAND
) -> list[AgentTask]:
    """The tasks, in the order of their names or rows; `only` keeps those of these ids.

    One that is malformed or cannot be followed here is an `InvalidTask` among the others.
    Raises: ConfigError for a set that is none, an id that is not in it, or where no task can be followed.
    """
    if source.is_dir():
        source = source.resolve()  # `.` is a folder with a name, too
        folders = [source] if _is_task(source) else sorted(path for path in source.iterdir() if _is_task(path))
        names = {folder.name: folder for folder in folders}
        _check(names, only, source)
        return _made({name: folder for name, folder in names.items() if not only or name in only}, TerminalTask)
    if not source.is_file():
        raise ConfigError(f"{source} is neither a folder of tasks nor a file of instances. Check the path.")
    if repos is None:
        raise ConfigError("instances of SWE-bench need --repos, a folder with a clone OWNER__NAME of each repository.")
    rows = {}
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows[str(row["instance_id"])] = row
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{source}:{number} is no instance: a JSON object with an instance_id.") from None
    _check(rows, only, source)
    clones = repos
    chosen = {name: row for name, row in rows.items() if not only or name in only}
    return _made(chosen, lambda row: SweTask(row, clones, test_command))


def _made(chosen: Mapping[str, Any], make: Callable[[Any], AgentTask]) -> list[AgentTask]:
    """Raises: ConfigError of the first, where none can be made."""
    made: list[AgentTask] = []
    errors: list[RorqualError] = []
    for name, given in chosen.items():
        try:
            made.append(make(given))
        except RorqualError as error:
            errors.append(error)
            made.append(InvalidTask(name, str(error)))
    if len(errors) == len(made):
        raise errors[0]
    return made


def _is_task(folder: Path) -> bool:
    return (folder / "task.toml").is_file() or (folder / "task.yaml").is_file()


def _check(names: dict[str, Path] | dict[str, dict[str, object]], only: Sequence[str], source: Path) -> None:
    if not names:
        raise ConfigError(f"{source} holds no task: a folder with task.toml or task.yaml each, or rows of instances.")
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ConfigError(f"{source} has no task {unknown[0]!r}; it has {', '.join(list(names)[:8])}, ...")
