"""Training checkpoints: everything a run needs to continue bit for bit, written so that a kill never leaves
half a file.

A checkpoint is a folder `checkpoints/step-00001234` with `weights.safetensors` (parameters, router biases,
hash tables), `optimizer.safetensors` (momenta, random-generator state) and `state.json` (counters, data
position, config, file sizes). It is written under another name, flushed to the disk and then renamed, so a
folder of that name is always complete.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rorqual import log
from rorqual.errors import CheckpointError

logger = log.get(__name__)

FORMAT = 1
_FILES = ("weights.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens consumed; every schedule is a function of it."""
    train_seconds: float = 0.0
    """Time spent training, over all sittings."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, opened."""

    folder: Path
    progress: Progress
    feed: dict[str, Any]
    """Position of the data feed."""
    config: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    torch_rng: Tensor
    """State of torch's generator. Nothing in a training step draws from it today; saved so that nothing can
    start to.
    """


def save(
    run_folder: Path,
    model: nn.Module,
    optimizer: dict[str, Tensor],
    feed: dict[str, Any],
    progress: Progress,
    config: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint and drop all but the `keep` newest. Returns its folder.

    Raises: CheckpointError when the disk refuses; the earlier checkpoints are then untouched.
    """
    parent = run_folder / "checkpoints"
    final = parent / f"step-{progress.step:08d}"
    draft = parent / f".draft-{progress.step:08d}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(".draft-*"):
            shutil.rmtree(stale)
        draft.mkdir()
        save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, draft / _FILES[0])
        save_file({**optimizer, "#rng": torch.get_rng_state()}, draft / _FILES[1])
        state = {
            "format": FORMAT,
            "step": progress.step,
            "tokens": progress.tokens,
            "train_seconds": progress.train_seconds,
            "feed": feed,
            "config": config,
            "bytes": {name: (draft / name).stat().st_size for name in _FILES},
        }
        (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for name in (*_FILES, "state.json"):
            _flush(draft / name)
        _flush(draft)
        if final.exists():  # saved twice at one step: the contents are the same
            shutil.rmtree(final)
        draft.rename(final)
        _flush(parent)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write the checkpoint {final}: {error.strerror or error}. Training stopped so that no "
            "work is lost unnoticed; earlier checkpoints are intact. Free some space and continue with --resume."
        ) from error
    for old in complete(run_folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def complete(run_folder: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_folder / "checkpoints").glob("step-*") if (p / "state.json").is_file())


def newest(run_folder: Path) -> Saved | None:
    """Open the newest usable checkpoint, or None where there is none.

    A damaged one (its files have another size than when written) is passed over with a warning.
    """
    for folder in reversed(complete(run_folder)):
        try:
            return read(folder)
        except CheckpointError as error:
            logger.warning("%s Trying the one before it.", error)
    return None


def read(folder: Path) -> Saved:
    """Open one checkpoint. Raises: CheckpointError when a file is missing, cut short or of another format."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder} has checkpoint format {state.get('format')!r}, this version reads {FORMAT}. "
                "Continue with the version that wrote it."
            )
        for name, size in state["bytes"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{folder / name} has {found:,} bytes, but {size:,} were written: it is damaged.")
        weights, optimizer = (load_file(folder / name) for name in _FILES)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read as a checkpoint ({error}): it is damaged.") from error
    progress = Progress(state["step"], state["tokens"], state["train_seconds"])
    rng = optimizer.pop("#rng")
    return Saved(folder, progress, state["feed"], state["config"], weights, optimizer, rng)


def _flush(path: Path) -> None:
    """Make sure that a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
