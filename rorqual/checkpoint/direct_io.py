"""Reading parts of files past the page cache, so that reading does not take memory that was promised to something else.

Where the system lets files be opened for direct input (O_DIRECT), the disk writes straight into the reader's memory.
Elsewhere parts are read as usual and the kernel is told that their pages are not needed any more.
"""

import contextlib
import mmap
import os
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

from rorqual.errors import CheckpointError

ALIGNMENT = 4096
"""Bytes of which place in the file, length and address in memory must be multiples."""
PIECE_BYTES = 32 << 20
"""Bytes read at a time of a tensor that is copied or cast on the way."""


def aligned(begin: int, end: int) -> tuple[int, int]:
    """The smallest range of whole blocks around a range of bytes."""
    return begin // ALIGNMENT * ALIGNMENT, -(-end // ALIGNMENT) * ALIGNMENT


def room(nbytes: int) -> Tensor:
    """uint8 [nbytes] that direct input can fill; it takes memory as it is touched."""
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)


class DirectFiles:
    """Files opened once and read by any number of threads."""

    def __init__(self) -> None:
        self._handles: dict[Path, tuple[int, bool]] = {}
        self._retired: list[int] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._handles, self._retired)

    def read(self, path: Path, begin: int, end: int, into: Tensor) -> None:
        """Bytes `begin` to `end` of a file -> the first of `into` uint8, whose address and `begin` are aligned.

        Some of `into` behind them may be overwritten, up to a whole block. Raises: CheckpointError when the disk
        refuses or the file is shorter.
        """
        view = into.numpy().data
        done, whole = 0, aligned(begin, end)[1] - begin
        try:
            handle, is_direct = self._open(path)
            while begin + done < end:
                try:
                    count = os.preadv(handle, [view[done:whole]], begin + done)
                except OSError:
                    if not is_direct:
                        raise
                    handle, is_direct = self._open_plainly(path), False  # opens so, but cannot read so
                    continue
                if not count:
                    raise CheckpointError(
                        f"{path} ends at byte {begin + done}, but its header has data up to {end}: it became shorter "
                        "since it was opened. Copy or download the file again."
                    )
                if not is_direct and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(handle, begin + done, count, os.POSIX_FADV_DONTNEED)
                done += count
                if is_direct and done % ALIGNMENT and begin + done < end:  # the rest begins inside a block
                    handle, is_direct = self._open_plainly(path), False
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be read at byte {begin + done} ({error.strerror or error}). Check the disk, or copy "
                "or download this file again."
            ) from error

    def _open(self, path: Path) -> tuple[int, bool]:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = _open_file(path)
            return self._handles[path]

    def _open_plainly(self, path: Path) -> int:
        """From now on read this file through the page cache."""
        with self._lock:
            handle, is_direct = self._handles[path]
            if is_direct:
                self._retired.append(handle)  # other threads may be reading by it
                self._handles[path] = handle, _ = (os.open(path, os.O_RDONLY), False)
            return handle


def _close(handles: dict[Path, tuple[int, bool]], retired: list[int]) -> None:
    for handle in [*retired, *(handle for handle, _ in handles.values())]:
        os.close(handle)


def _open_file(path: Path) -> tuple[int, bool]:
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    return os.open(path, os.O_RDONLY), False


def copy_numbers(files: DirectFiles, path: Path, start: int, dtype: torch.dtype, target: Tensor) -> None:
    """Numbers of `dtype` from byte `start` of a file on -> the contiguous `target`, cast, piece by piece."""
    flat, done = target.view(-1), 0
    each = PIECE_BYTES // dtype.itemsize
    buffer = room(min(PIECE_BYTES, target.numel() * dtype.itemsize) + 2 * ALIGNMENT)
    while done < flat.numel():
        count = min(each, flat.numel() - done)
        begin = start + done * dtype.itemsize
        end, first = begin + count * dtype.itemsize, aligned(begin, begin)[0]
        files.read(path, first, end, buffer)
        piece = buffer[begin - first : end - first]
        if piece.data_ptr() % dtype.itemsize:
            piece = piece.clone()
        flat[done : done + count].copy_(piece.view(dtype))
        done += count
