"""After a conversion: are the files what was written, and do they hold the source's numbers?

Files are read back and their SHA-256 compared with that of the bytes as they were made; then every matrix of the target
is compared with the source's, as numbers, signs of zeros included. Where the target's format is narrower the difference
is measured and told; anywhere else a difference is a failure.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rorqual.checkpoint.pieces import Piece, Source
from rorqual.checkpoint.piecewise import sha256_of
from rorqual.errors import CheckpointError


@dataclass
class Loss:
    """What one kind of cast did to the matrices it changed."""

    tensors: int = 0
    """Matrices with at least one other number."""
    values: int = 0
    """Numbers that differ."""
    of: int = 0
    """Numbers of those matrices."""
    largest_relative: float = 0.0
    """Largest difference over the largest magnitude of its matrix."""
    worst: str = ""
    """The matrix that is in."""


@dataclass
class Verified:
    """What was compared, and what the conversion lost by kind of cast (`bfloat16 -> fp4`); empty: nothing."""

    files: int = 0
    matrices: int = 0
    exact: int = 0
    loss: dict[str, Loss] = field(default_factory=dict)

    @property
    def is_lossless(self) -> bool:
        return not self.loss


def compare(
    source: Source, target: Path, digests: Mapping[str, str], on_bytes: Callable[[str, int, int], None]
) -> Verified:
    """Check the files in `target` against their digests and every matrix against `source`.

    Raises: CheckpointError for a file that is not what was written (it is removed, so the same command writes it
    again), and for numbers that differ where the format could hold them.
    """
    result = Verified(files=len(digests))
    sizes = {name: (target / name).stat().st_size for name in digests}
    total, done = 2 * sum(sizes.values()), 0
    for name, digest in digests.items():
        if sha256_of(target / name) != digest:
            (target / name).unlink()
            raise CheckpointError(
                f"{target / name} does not read back as it was written, so the disk or the memory of this machine "
                "altered it. The file was removed. Run the same command to write it again; check the disk."
            )
        done += sizes[name]
        on_bytes("verify", done, total)
    with Source(target) as written:
        for piece in source.pieces():
            value = written.value(piece)
            _compare_piece(piece, source, written, value, result)
            done += value.nbytes * (sum(sizes.values())) // max(1, _value_bytes(written))
            on_bytes("verify", min(done, total), total)
    on_bytes("verify", total, total)
    return result


def _value_bytes(written: Source) -> int:
    return sum(tensor.numel() for tensor in written.state.values()) * 4


def _compare_piece(piece: Piece, source: Source, written: Source, value: Tensor, result: Verified) -> None:
    before = source.value(piece)
    result.matrices += 1
    if _same(before, value):
        result.exact += 1
        return
    old, new = source.kind(piece) or _word(source.dtype(piece)), written.kind(piece) or _word(written.dtype(piece))
    cast = f"{old} -> {new}"
    if not before.is_floating_point() or not _narrows(old, new):
        raise CheckpointError(
            f"{piece.official} in {written.folder} differs from {source.folder} although {cast} loses nothing. Please "
            "report this; do not use the target."
        )
    first, second = before.double(), value.double()
    loss = result.loss.setdefault(cast, Loss())
    loss.tensors += 1
    loss.values += int((first != second).sum())
    loss.of += first.numel()
    relative = float((first - second).abs().max() / first.abs().max().clamp(min=1e-300))
    if relative >= loss.largest_relative:
        loss.largest_relative, loss.worst = relative, piece.official


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, signs of zeros and NaNs included, whatever their dtypes."""
    if not a.is_floating_point():
        return torch.equal(a.to(torch.int64), b.to(torch.int64))
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    bits = torch.int64 if wide is torch.float64 else torch.int32
    return torch.equal(a.to(wide).view(bits), b.to(wide).view(bits))


_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8, "fp8": 4, "fp4": 2}


def _narrows(old: str, new: str) -> bool:
    """Whether `new` cannot hold everything that `old` can: fewer digits, or codes whose scales are extreme."""
    return old != new and (new in ("fp4", "fp8") or old in ("fp4", "fp8") or _BITS[new] < _BITS[old])


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
