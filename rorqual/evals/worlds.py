"""The world whose facts a checkpoint was taught: the world.json in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from rorqual.data.tasks import World
from rorqual.errors import ConfigError


def read_world(path: Path) -> World:
    """The world of a world.json, or of a folder that holds one. Raises: ConfigError, DataError for another version."""
    file = path / "world.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} tells no world ({error}), so nobody knows which facts the model was taught. Give the world.json "
            "of its checkpoint with --world."
        ) from None
    return World.from_dict(record)


def world_of(folder: Path) -> World | None:
    """The world of a checkpoint's folder; None when the checkpoint names none."""
    return read_world(folder) if (folder / "world.json").is_file() else None
