"""Training checkpoints: everything a run needs to continue bit for bit, written so that a kill never leaves
half a file.

A checkpoint is a folder `checkpoints/step-00001234` with `weights.safetensors` (parameters, router biases,
hash tables), `optimizer.safetensors` (momenta, random-generator state) and `state.json` (counters, data
position, config, file sizes). It is written under another name, flushed to the disk and then renamed, so a
folder of that name is always complete. `step-00001234-old` is one that was being replaced when the run was killed.

Several ranks write `weights-00001-of-00004.safetensors` and so on, each what it owns (`pieces.py`); rank 0 waits for
all of them and then commits. Whole tensors have the same names in both, so either is read by any number of ranks. The
folder must be one that every rank sees.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rorqual import log
from rorqual.checkpoint.safetensors_io import save_tensors
from rorqual.errors import CheckpointError
from rorqual.parallel.mesh import Mesh, gather_objects
from rorqual.train.pieces import Piece, Tensors, whole

logger = log.get(__name__)

FORMAT, SHARDED_FORMAT = 1, 2
"""One file of each kind, or one from every rank."""
_KINDS = ("weights", "optimizer")
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
    weights: Tensors
    optimizer: Tensors
    torch_rng: Tensor
    """State of torch's generator. Nothing in a training step draws from it today; saved so that nothing can
    start to.
    """
    stability: dict[str, Any] = field(default_factory=dict)
    """What spike detection and anticipatory routing remember; empty in checkpoints from before there were any."""


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
    weights = [whole(name, tensor) for name, tensor in model.state_dict().items()]
    state = [whole(name, tensor) for name, tensor in optimizer.items()]
    return save_pieces(run_folder, weights, state, feed, progress, config, keep=keep, mesh=Mesh.alone())


def save_pieces(
    run_folder: Path,
    weights: Sequence[Piece],
    optimizer: Sequence[Piece],
    feed: dict[str, Any],
    progress: Progress,
    config: dict[str, Any],
    *,
    keep: int,
    mesh: Mesh,
    stability: dict[str, Any] | None = None,
) -> Path:
    """As `save`, from every rank of `mesh` at once with the pieces it owns. `stability`: see `Saved`.

    Raises: CheckpointError on every rank when the disk refuses one of them.
    """
    parent = run_folder / "checkpoints"
    final = parent / f"step-{progress.step:08d}"
    draft = parent / f".draft-{progress.step:08d}"
    if mesh.is_main:
        _together(mesh, final, lambda: _begin(parent, draft))
        optimizer = [*optimizer, whole("#rng", torch.get_rng_state())]
    else:
        _together(mesh, final, None)
    written = _together(mesh, final, lambda: _write(draft, {"weights": weights, "optimizer": optimizer}, mesh))
    if not mesh.is_main:
        _together(mesh, final, None)
        return final
    state = {
        "format": FORMAT if mesh.is_alone else SHARDED_FORMAT,
        "step": progress.step,
        "tokens": progress.tokens,
        "train_seconds": progress.train_seconds,
        "feed": feed,
        "config": config,
        "stability": stability or {},
        "bytes": {name: size for part in written for name, size in part["bytes"].items()},
    }
    if not mesh.is_alone:
        state["shapes"] = {
            kind: {name: shape for part in written for name, shape in part["shapes"][kind].items()} for kind in _KINDS
        }
    _together(mesh, final, lambda: _commit(draft, final, state))
    earlier = [path for path in complete(run_folder) if _order(path) < _order(final)]
    for old in earlier[: max(len(earlier) - (keep - 1), 0)]:
        _remove(old)
    return final


def _together(mesh: Mesh, final: Path, action: Callable[[], Any] | None) -> list[Any]:
    """Do it on this rank and wait for the others; all results by rank.

    Raises: CheckpointError on every rank when one could not.
    """
    result, problem = None, None
    try:
        result = None if action is None else action()
    except (OSError, SafetensorError) as error:
        problem = error
    reason = None if problem is None else str(getattr(problem, "strerror", None) or problem)
    told = gather_objects((reason, result), mesh)
    reasons = [reason for reason, _ in told if reason is not None]
    if reasons:
        if mesh.is_main:
            shutil.rmtree(final.with_name(f".draft-{final.name.removeprefix('step-')}"), ignore_errors=True)
        raise CheckpointError(
            f"Cannot write the checkpoint {final}: {reasons[0]}. Training stopped so "
            "that no work is lost unnoticed; earlier checkpoints are intact. Free some space and continue with "
            "--resume."
        ) from problem
    return [result for _, result in told]


def _begin(parent: Path, draft: Path) -> None:
    parent.mkdir(parents=True, exist_ok=True)
    for stale in (*parent.glob(".draft-*"), *parent.glob(".old-*")):
        shutil.rmtree(stale)
    draft.mkdir()


def _remove(folder: Path) -> None:
    """Delete a checkpoint; out of sight first, so that one cut short by a kill leaves nothing that looks like one."""
    hidden = folder.with_name(f".old-{folder.name}")
    with contextlib.suppress(OSError):  # what cannot be deleted costs room and nothing else
        if hidden.exists():
            shutil.rmtree(hidden)
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _write(draft: Path, kinds: Mapping[str, Sequence[Piece]], mesh: Mesh) -> dict[str, Any]:
    """This rank's files, on the disk; their sizes, and the shapes of tensors that are not whole in them."""
    sizes, shapes = {}, {}
    for kind, pieces in kinds.items():
        path = draft / _file(kind, mesh.rank, mesh.world)
        save_tensors({piece.key: piece.stored() for piece in pieces}, path)
        _flush(path)
        sizes[path.name] = path.stat().st_size
        shapes[kind] = {piece.name: piece.shape for piece in pieces if not piece.is_whole}
    return {"bytes": sizes, "shapes": shapes}


def _file(kind: str, rank: int, ranks: int) -> str:
    return f"{kind}.safetensors" if ranks == 1 else f"{kind}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def _commit(draft: Path, final: Path, state: dict[str, Any]) -> None:
    (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
    _flush(draft / "state.json")
    _flush(draft)
    aside = final.with_name(f"{final.name}-old")
    if final.exists():  # saved twice at one step: one of the two is whole at any moment
        if aside.exists():
            _remove(aside)
        final.rename(aside)
    draft.rename(final)
    _flush(final.parent)
    if aside.exists():
        _remove(aside)


def folders(run_folder: Path) -> list[Path]:
    """Folders of a run's checkpoints by step, damaged ones too."""
    parent = run_folder / "checkpoints"
    found = [path for path in parent.iterdir() if _FOLDER.fullmatch(path.name)] if parent.is_dir() else []
    return sorted(found, key=_order)


def step_of(folder: Path) -> int:
    """Optimizer steps of a checkpoint, from its folder's name."""
    return _order(folder)[0]


def newest_until(run_folder: Path, step: int) -> Saved | None:
    """Open the newest checkpoint of at most `step` steps that can be read, or None."""
    for folder in reversed([path for path in complete(run_folder) if step_of(path) <= step]):
        try:
            return read(folder)
        except CheckpointError as error:
            logger.warning("%s Trying the one before it.", error)
    return None


def drop_after(run_folder: Path, step: int) -> None:
    """Remove checkpoints of more than `step` steps, the latest first."""
    for folder in reversed([path for path in folders(run_folder) if step_of(path) > step]):
        _remove(folder)


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
        if state.get("format") not in (FORMAT, SHARDED_FORMAT):
            raise CheckpointError(
                f"{folder} has checkpoint format {state.get('format')!r}, this version reads {FORMAT} and "
                f"{SHARDED_FORMAT}. Continue with the version that wrote it."
            )
        for name, size in state["bytes"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{folder / name} has {found:,} bytes, but {size:,} were written: it is damaged.")
        weights, optimizer = (
            Tensors([folder / n for n in state["bytes"] if n.startswith(kind)], state.get("shapes", {}).get(kind))
            for kind in _KINDS
        )
        progress = Progress(state["step"], state["tokens"], state["train_seconds"])
        rng = optimizer.pop("#rng")
        stability = state.get("stability", {})
        return Saved(folder, progress, state["feed"], state["config"], weights, optimizer, rng, stability)
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
