"""Runs on disk: one folder each, with what it is, its journal and its outbox.

agents/NAME/settings.json   the task and its options
agents/NAME/journal/        everything that happened, `rorqual journal show` reads it
agents/NAME/outbox/         mail on its way out
agents/NAME/out/            what the run made, unless it was to go elsewhere
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rorqual.agents.errors import AgentError
from rorqual.agents.settings import RunSettings
from rorqual.errors import ConfigError
from rorqual.folders import data_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class RunFolder:
    """One run's folder."""

    path: Path

    @property
    def name(self) -> str:
        """By which `--resume` finds it."""
        return self.path.name

    @property
    def journal(self) -> Path:
        """The folder of the run's journal."""
        return self.path / "journal"

    @property
    def outbox(self) -> Path:
        """The folder of the run's mails; see courier.Outbox."""
        return self.path / "outbox"

    @property
    def settings(self) -> RunSettings:
        """Raises: AgentError when the folder holds no run."""
        return RunSettings.load(self.path / "settings.json")

    def out(self) -> Path:
        """Where its results go."""
        chosen = self.settings.out
        return self.path / "out" if chosen is None else Path(chosen)


def runs_folder() -> Path:
    """Where runs lie unless told otherwise."""
    return data_folder() / "agents"


def create_run(settings: RunSettings, name: str | None = None) -> RunFolder:
    """A new run. Raises: ConfigError for a name that is taken or none, and for what the run needs and has not."""
    settings.check()
    if name is None:
        digest = hashlib.sha256(f"{settings.task}{time.time_ns()}".encode()).hexdigest()[:6]
        name = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + digest
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a run. Use letters, digits, dots and hyphens, 64 at most.")
    path = runs_folder() / name
    try:
        path.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        if (path / "settings.json").exists():  # else whoever began it was killed before there was a run
            raise ConfigError(
                f"there is a run {name!r} already. Go on with it by --resume, or choose another name."
            ) from None
    settings.save(path / "settings.json")
    return RunFolder(path)


def find_run(name: str) -> RunFolder:
    """The run of that name. Raises: AgentError when there is none."""
    path = runs_folder() / name
    if not _NAME.fullmatch(name) or not (path / "settings.json").is_file():
        raise AgentError(f"there is no run {name!r} in {runs_folder()}. `rorqual agent list` names them.")
    return RunFolder(path)


def all_runs() -> Iterator[RunFolder]:
    """Every run, newest first."""
    found = list(runs_folder().glob("*/settings.json"))
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        yield RunFolder(path.parent)
