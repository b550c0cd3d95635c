"""Memory of the page pool: reserved at once, brought as it is touched, in the system's huge pages where it has them."""

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_BYTES = 16 << 20
"""Parts of at least this size ask for huge pages of the system."""

_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE, which Python's mmap does not name."""


def reserve(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, mmap.mmap | None]:
    """A tensor that holds anything, and its memory where that can be asked for more.

    Huge pages make the first use of a page of ours some times cheaper, and long scans too.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size < HUGE_BYTES:
        return torch.empty(*shape, dtype=dtype, device=device), None
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape), memory  # which keeps the memory alive


def populate(memory: mmap.mmap, num_bytes: int) -> None:
    """Let the system bring the first bytes of reserved memory now, whatever they hold; nothing where it cannot."""
    end = num_bytes // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):  # a system that does not know the request
        for at in range(0, end, HUGE_BYTES):  # not all at once: other threads wait
            memory.madvise(_POPULATE_WRITE, at, min(HUGE_BYTES, end - at))
