"""Writes an empty qcow2 disk: what a machine changes goes there, what it reads comes from the disk below.

Source: QEMU's docs/interop/qcow2.txt (version 3). Written here because starting qemu-img takes longer than a restored
machine. The disk below is named on QEMU's command line and not in the file, so no file can name one of the host's.
"""

from __future__ import annotations

import struct
from pathlib import Path

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
COPIED = 1 << 63


def write_empty(path: Path, size: int) -> None:
    """An overlay of `size` bytes (a multiple of 512) with nothing in it; four clusters of 64 KiB for up to 4 TiB."""
    entries = -(-size // (CLUSTER * (CLUSTER // 8)))
    if size % 512 or entries > CLUSTER // 8:
        raise ValueError(f"a disk of {size} bytes cannot be: whole sectors, and at most 4 TiB")
    header = HEADER.pack(
        *(b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, size, 0, entries, 3 * CLUSTER, CLUSTER, 1, 0, 0),
        *(0, 0, 0, 4, HEADER.size),
    )
    counts = b"".join(struct.pack(">H", 1) for _ in range(4))  # header, count table, counts, L1 table
    with open(path, "xb") as file:
        file.write(header)
        file.seek(CLUSTER)
        file.write(struct.pack(">Q", 2 * CLUSTER))
        file.seek(2 * CLUSTER)
        file.write(counts)
        file.truncate(4 * CLUSTER)
