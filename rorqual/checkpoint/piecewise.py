"""Safetensors files written a piece at a time, so that a file may be larger than memory.

The library's own writer wants all tensors of a file at once. Here the header is written first (names, dtypes and
shapes are known before any value is) and the values follow in pieces. Tensors of wide elements come first, as in files
of the library, so that every one begins at a multiple of its element size.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rorqual.checkpoint.safetensors_io import sync, temporary
from rorqual.errors import CheckpointError

_WORDS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """The order in which `write_streamed` wants values: wide elements first, otherwise as given."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def header_of(entries: Iterable[Entry]) -> bytes:
    """The first bytes of a file with these tensors: length and description, padded to a multiple of 8."""
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in in_file_order(entries):
        offsets = [at, at + entry.nbytes]
        document[entry.name] = {"dtype": _WORDS[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_streamed(path: Path, entries: list[Entry], pieces: Iterable[Tensor]) -> str:
    """Write `path` from the values of its tensors, cut into pieces as they lie in the file; returns its SHA-256.

    `pieces`: the values of `in_file_order(entries)`, each tensor in any number of pieces, row-major. The file appears
    under its name when it is whole and on the disk; until then nothing of that name is touched.
    Raises: CheckpointError when the disk refuses, naming the space left when it is full.
    """
    beside = temporary(path)
    digest = hashlib.sha256()
    expected = len(header_of(entries)) + sum(entry.nbytes for entry in entries)
    written = 0
    try:
        with beside.open("wb") as file:
            for chunk in _chunks(header_of(entries), pieces):
                file.write(chunk)
                digest.update(chunk)
                written += len(chunk)
        assert written == expected, f"{written} bytes made for {path.name}, whose header describes {expected}"
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(error, path, written, expected) from error
    finally:
        beside.unlink(missing_ok=True)
    return digest.hexdigest()


def _chunks(header: bytes, pieces: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for piece in pieces:
        flat = piece.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def disk_error(error: OSError, path: Path, written: int, expected: int) -> CheckpointError:
    """The error for a disk that refused `path` after so many of its bytes."""
    if error.errno == errno.ENOSPC:
        return CheckpointError(
            f"the disk of {path.parent} is full: {path.name} needs {expected:,} bytes and only {written:,} could be "
            "written, so it was removed again. Free some space, then run the same command: finished files are kept."
        )
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}. Nothing of it is left. Check the disk and its permissions, "
        "then run the same command again."
    )


@contextlib.contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Make `folder` if need be, and keep other processes that would write to it out.

    Raises: CheckpointError when it cannot be made, or another process is `doing` the same.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot make {folder}: {error.strerror or error}. Name another folder.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"another process is {doing} into {folder}. Wait for it, or name another folder."
            ) from None
        yield
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read a few megabytes at a time. Raises: CheckpointError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}. Check the disk.") from error
    return digest.hexdigest()
