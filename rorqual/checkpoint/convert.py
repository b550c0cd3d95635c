"""From one checkpoint layout to another, a matrix at a time: `rorqual convert`.

Memory holds one piece (`pieces.py`), whatever the model's size. Every file is written beside its place and renamed when
it is whole; a list in the target folder names the finished ones with their SHA-256, so a conversion that was
interrupted or killed goes on where it stood. config.json and the index come last: until then the folder is no
checkpoint that anything would load.

Unpacking FP8 and FP4 to bf16 keeps every value (their scales are powers of two); which scales they had is written to
`pieces.SCALES`, because several may hold the same values and packing again by the rule picks the smallest.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint.build import STORABLE
from rorqual.checkpoint.conversion_plan import PlannedFile, Target, plan_files, plan_tensors
from rorqual.checkpoint.conversion_progress import OnBytes, Progress, check_space, fingerprint, opened
from rorqual.checkpoint.packed import Stored, exponents, pack, scale_name
from rorqual.checkpoint.pieces import SCALES, Piece, Source, pieces_of
from rorqual.checkpoint.piecewise import in_file_order, write_streamed
from rorqual.checkpoint.safetensors_io import write_index, write_text
from rorqual.checkpoint.store import COMPANIONS, SHARD_BYTES
from rorqual.checkpoint.verify import Verified, compare
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model.quantised import ExpertFormat, StoredFormat
from rorqual.ops.quant import decode_e8m0


@dataclass(frozen=True)
class Conversion:
    """What was done. `verified` is None when it was not asked for."""

    source: Path
    target: Path
    files: list[Path]
    kept: int
    """Files that an earlier, interrupted run had finished."""
    nbytes: int
    verified: Verified | None


def convert(
    source: str | Path,
    target: str | Path,
    to: Target,
    *,
    dtype: torch.dtype | None = None,
    experts: ExpertFormat | None = None,
    drop_mtp: bool = False,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: OnBytes | None = None,
) -> Conversion:
    """Write the checkpoint in `source` to `target` in the layout `to`.

    dtype: fp32 or bf16 for what is not kept in fp32 anyway. experts: pack as the released ("fp4") or the base ("fp8")
    checkpoints are; official layout only. Without either the official layout keeps what is stored, codes included, and
    the transformers layout has codes unpacked to bf16. drop_mtp: leave `mtp.*` out.
    Raises: ConfigError for what cannot be asked for; CheckpointError for damaged or misfitting weights, a target that
    holds something else, too little space, a failed verification.
    """
    source, target = Path(source), Path(target)
    _check_options(to, dtype, experts)
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"the target is the source, {source}, which would be overwritten. Name another folder.")
    with Source(source, drop_mtp=drop_mtp) as weights:
        stored, description = plan_tensors(weights, to, dtype, experts)
        files = plan_files(weights, stored, to, shard_bytes)
        options = {"to": to, "dtype": str(dtype), "experts": experts, "drop_mtp": drop_mtp, "shard_bytes": shard_bytes}
        with opened(target, {"source": fingerprint(weights), "options": options}) as progress:
            kept = progress.kept(files, on_bytes or _nobody)
            check_space(target, [file for file in files if file.name not in kept])
            _write(weights, files, target, progress, on_bytes or _nobody)
            _finish(weights, files, target, description)
            verified = None
            if verify:
                verified = compare(weights, target, progress.digests, on_bytes or _nobody)
            progress.remove()
    written = [target / file.name for file in files]
    return Conversion(source, target, written, len(kept), sum(file.nbytes for file in files), verified)


def _nobody(_what: str, _done: int, _total: int) -> None:
    """Nobody is told."""


def _check_options(to: str, dtype: torch.dtype | None, experts: ExpertFormat | None) -> None:
    if experts is not None and dtype is not None:
        raise ConfigError(
            f"dtype {dtype} and experts in {experts} were both asked for, but a packed file has the released "
            "checkpoints' dtypes. Leave one of them out."
        )
    if experts is not None and to != "official":
        raise ConfigError(
            f"experts in {experts} were asked for in the transformers layout, whose fused experts have no packed form. "
            "Use --to official, which transformers unpacks itself, or leave --experts out."
        )
    if dtype is not None and dtype not in STORABLE:
        raise ConfigError(f"checkpoints are written in float32 or bfloat16, not in {dtype}. Choose one of the two.")


# ---------------------------------------------------------------- writing


class _Maker:
    """Values of the target's tensors out of the source's pieces; codes and scales that follow each other are made
    together."""

    def __init__(self, weights: Source) -> None:
        self.weights = weights
        self._last: tuple[Piece | None, StoredFormat | None, tuple[Tensor, Tensor]] = (
            None, None, (torch.empty(0), torch.empty(0)),
        )  # fmt: skip

    def pieces(self, item: Stored) -> Iterator[Tensor]:
        """The tensor `item`, in the order of its rows."""
        for piece in pieces_of(item.tensor, self.weights.shapes):
            if item.kind in ("fp4", "fp8"):
                yield self._packed(piece, item)
            else:
                yield self.weights.value(piece).to(item.dtype)

    def _packed(self, piece: Piece, item: Stored) -> Tensor:
        if self.weights.kind(piece) == item.kind:
            if not item.is_scale:
                return self.weights.read(piece).view(item.dtype)
            return _scale_in(self.weights.read_scale(piece), item)
        if self._last[:2] != (piece, item.kind):
            known = self._known_scale(piece)
            self._last = (piece, item.kind, pack(self.weights.value(piece), item.kind, known))
        codes, scale = self._last[2]
        return _scale_in(scale, item) if item.is_scale else codes

    def _known_scale(self, piece: Piece) -> Tensor | None:
        file = self.weights.scale_file
        found = None if file is None else file.read(scale_name(piece.official))
        return None if found is None else exponents(found)


def _scale_in(scale: Tensor, item: Stored) -> Tensor:
    """Scales in the dtype of the target. Raises: CheckpointError for fp32 scales that are no powers of two."""
    if item.dtype == scale.dtype:
        return scale
    if item.dtype == torch.float32:
        return decode_e8m0(scale)
    bits = exponents(scale)
    if bits is None:
        raise CheckpointError(
            f"{item.tensor.name} holds scales that are no powers of two, which a packed file of this kind cannot hold. "
            "Unpack it with --dtype bfloat16 or float32 instead."
        )
    return bits


def _write(weights: Source, files: list[PlannedFile], target: Path, progress: "Progress", on_bytes: OnBytes) -> None:
    total = sum(file.nbytes for file in files)
    done = sum(file.nbytes for file in files if file.name in progress.digests)
    for file in files:
        if file.name in progress.digests:
            continue
        by_entry = {entry.name: item for entry, item in zip(file.entries, file.stored, strict=True)}
        maker, start = _Maker(weights), done

        def values(
            file: PlannedFile = file, by_entry: dict[str, Stored] = by_entry, maker: _Maker = maker
        ) -> Iterator[Tensor]:
            nonlocal done
            for entry in in_file_order(file.entries):
                for piece in maker.pieces(by_entry[entry.name]):
                    yield piece
                    done += piece.nbytes
                    on_bytes("write", done, total)

        digest = write_streamed(target / file.name, file.entries, values())
        progress.finished(file.name, digest)
        done = start + file.nbytes
    on_bytes("write", total, total)


def _finish(weights: Source, files: list[PlannedFile], target: Path, description: dict[str, Any]) -> None:
    """The files that make a checkpoint of the folder."""
    shards = [file for file in files if file.name != SCALES]
    for name in COMPANIONS:
        if (weights.folder / name).is_file():
            _copy(weights.folder / name, target / name)
    if len(shards) > 1:
        weight_map = {entry.name: file.name for file in shards for entry in file.entries}
        write_index(target, weight_map, sum(entry.nbytes for file in shards for entry in file.entries))
    write_text(target / "config.json", json.dumps(description, indent=2) + "\n")


def _copy(source: Path, target: Path) -> None:
    try:
        write_text(target, source.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"cannot copy {source} to {target}: {error}. Check the disk, then run it again."
        ) from error
