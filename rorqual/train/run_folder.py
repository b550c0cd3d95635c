"""The folder of a run: found for resuming or made for a new one, with a clear refusal where neither is possible."""

import os
from pathlib import Path

from rorqual import log
from rorqual.errors import CheckpointError, ConfigError
from rorqual.train import checkpoints
from rorqual.train.checkpoints import Saved
from rorqual.train.config import TrainConfig
from rorqual.train.recipe_file import load_config, run_recipe, validate
from rorqual.train.settings import breaking_changes, layout_changes

logger = log.get(__name__)


def open_folder(folder: Path, config: TrainConfig, *, resume: bool, allow_changes: bool) -> tuple[Saved | None, bool]:
    """Find the checkpoint to continue from, or make the folder of a new run.

    Also returns whether `config` is not what the folder's config.toml says.
    """
    try:
        return _find_or_make(folder, config, resume=resume, allow_changes=allow_changes)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{folder} cannot hold a run: {error.strerror or error}. A run writes its checkpoints and figures there. "
        "Choose another --run-dir, or correct the permissions."
    )


def write_recipe(folder: Path, config: TrainConfig) -> None:
    """Put the resolved recipe into the folder, whole or not at all. Raises ConfigError when it cannot be written."""
    draft = folder / "config.draft"
    try:
        draft.write_text(run_recipe(config), encoding="utf-8")
        draft.replace(folder / "config.toml")
    except OSError as error:
        raise _unwritable(folder, error) from None


def _find_or_make(folder: Path, config: TrainConfig, *, resume: bool, allow_changes: bool) -> tuple[Saved | None, bool]:
    if not resume:
        if checkpoints.folders(folder):
            raise ConfigError(
                f"{folder} already holds a run with checkpoints. Starting again there would mix two runs. "
                "Add --resume to continue it, or choose another --run-dir."
            )
        folder.mkdir(parents=True, exist_ok=True)
        _check_writable(folder)
        return None, True
    saved = checkpoints.newest(folder)
    recipe = folder / "config.toml"
    if saved is None:
        if not recipe.is_file():
            raise CheckpointError(
                f"{folder} holds no run to resume. Check --run-dir, or leave out --resume to start a new run."
            )
        logger.warning("%s has no checkpoint yet; starting from the beginning.", folder)
    _check_writable(folder)
    before = load_config([recipe]) if saved is None else validate(saved.config)
    changes, moved = breaking_changes(before, config), layout_changes(before, config)
    if changes and not allow_changes:
        where = f"of {recipe}" if saved is None else f"of the checkpoint {saved.folder.name}"
        raise ConfigError(
            f"These settings differ from those {where}:\n  " + "\n  ".join(changes) + "\n"
            "The continued run would not equal the uninterrupted one. Put them back, or add --allow-changes "
            "to go on from these weights anyway."
        )
    if changes:
        logger.warning("Continuing with changed settings: %s.", "; ".join(changes))
    if moved:
        logger.warning(
            "Work is shared out otherwise than before (%s): the curve goes on, but not bit for bit.", "; ".join(moved)
        )
    return saved, bool(changes or moved)


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "it is not writable")
