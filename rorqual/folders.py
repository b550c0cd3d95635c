"""Where files of a user lie: what must be kept (`data_folder`) and what can be made again (`cache_folder`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def data_folder() -> Path:
    """What must not be lost: $RORQUAL_HOME, $XDG_DATA_HOME/rorqual, or ~/.local/share/rorqual. Not made here."""
    home = os.environ.get("RORQUAL_HOME")
    return Path(home) if home else _below_home("XDG_DATA_HOME", ".local/share")


def cache_folder() -> Path:
    """What can be made again: $XDG_CACHE_HOME/rorqual, ~/.cache/rorqual, or a folder of the user's in /tmp."""
    return _below_home("XDG_CACHE_HOME", ".cache")


def _below_home(variable: str, usual: str) -> Path:
    named = os.environ.get(variable)
    try:
        return (Path(named) if named else Path.home() / usual) / "rorqual"
    except RuntimeError:  # no home folder, as for an arbitrary user in a container
        return Path(tempfile.gettempdir()) / f"rorqual-{os.getuid()}"
