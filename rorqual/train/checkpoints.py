"""Training checkpoints: everything a run needs to continue bit for bit, written so that a kill never leaves
half a file.

A checkpoint is a folder `checkpoints/step-00001234` with `weights.safetensors` (parameters, router biases,
hash tables), `optimizer.safetensors` (momenta, random-generator state) and `state.json` (counters, data
position, config, file sizes). It is written under another name, flushed to the disk and then renamed, so a
folder of that name is always complete. `step-00001234-old` is one that was being replaced when the run was killed.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rorqual import log
from rorqual.checkpoint.safetensors_io import save_tensors
from rorqual.errors import CheckpointError

logger = log.get(__name__)

FORMAT = 1
_FILES = ("weights.safetensors", "optimizer.safetensors")
_FOLDER = re.compile(r"step-(\d+)(-old)?")


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
    """Write a checkpoint and drop the earlier ones but for the `keep` - 1 newest. Returns its folder.

    Later ones (which could not be read, or this run would have begun there) are left alone.
    Raises: CheckpointError when the disk refuses; the earlier checkpoints are then untouched.
    """
    parent = run_folder / "checkpoints"
    final = parent / f"step-{progress.step:08d}"
    draft = parent / f".draft-{progress.step:08d}"
    aside = parent / f"{final.name}-old"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(".draft-*"):
            shutil.rmtree(stale)
        draft.mkdir()
        save_tensors({k: v.detach().contiguous() for k, v in model.state_dict().items()}, draft / _FILES[0])
        save_tensors({**optimizer, "#rng": torch.get_rng_state()}, draft / _FILES[1])
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
        if final.exists():  # saved twice at one step: one of the two is whole at any moment
            if aside.exists():
                shutil.rmtree(aside)
            final.rename(aside)
        draft.rename(final)
        _flush(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"Cannot write the checkpoint {final}: {getattr(error, 'strerror', None) or error}. Training stopped so "
            "that no work is lost unnoticed; earlier checkpoints are intact. Free some space and continue with "
            "--resume."
        ) from error
    shutil.rmtree(aside, ignore_errors=True)
    earlier = [path for path in complete(run_folder) if _order(path) < _order(final)]
    for old in earlier[: max(len(earlier) - (keep - 1), 0)]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def folders(run_folder: Path) -> list[Path]:
    """Folders of a run's checkpoints by step, damaged ones too."""
    parent = run_folder / "checkpoints"
    found = [path for path in parent.iterdir() if _FOLDER.fullmatch(path.name)] if parent.is_dir() else []
    return sorted(found, key=_order)


def complete(run_folder: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    return [path for path in folders(run_folder) if (path / "state.json").is_file()]


def newest(run_folder: Path) -> Saved | None:
    """Open the newest usable checkpoint, or None where there never was one.

    A damaged one (its files have another size than when written) is passed over with a warning.
    Raises: CheckpointError when every one is damaged: starting over would be no continuation.
    """
    found = folders(run_folder)
    reasons = []
    for folder in reversed(found):
        try:
            return read(folder)
        except CheckpointError as error:
            reasons.append(str(error))
            if folder != found[0]:
                logger.warning("%s Trying the one before it.", error)
    if reasons:
        raise CheckpointError(
            f"None of the {len(reasons)} checkpoints in {run_folder / 'checkpoints'} can be read, so there is no "
            "point to continue from:\n  " + "\n  ".join(reasons) + "\nRestore one of them from a copy; or, to begin "
            "again and lose that training, choose another --run-dir or remove that folder, and leave out --resume."
        )
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
        progress = Progress(state["step"], state["tokens"], state["train_seconds"])
        rng = optimizer.pop("#rng")
        return Saved(folder, progress, state["feed"], state["config"], weights, optimizer, rng)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read as a checkpoint ({error}): it is damaged.") from error


def _order(folder: Path) -> tuple[int, bool]:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None, folder
    return int(match.group(1)), match.group(2) is None


def _flush(path: Path) -> None:
    """Make sure that a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
