"""Writes pages and checkpoints into a disk cache until somebody kills it: contents follow from the keys alone.

    python disk_writer.py FOLDER SEED

Prints `ready` once it writes. Used by tests of what a killed writer leaves behind.
"""

import hashlib
import sys
import threading
import time

import numpy as np
import torch

from rorqual.engine.store import DiskStore
from rorqual.engine.store.tree import chain_key

FINGERPRINT = b"0123456789abcdef"
PAGE_TOKENS, PAGE_BYTES, POINT_BYTES = 8, 5000, 30_016
BUDGET = 6 << 20


def content(key: bytes, count: int, kind: str) -> torch.Tensor:
    """Bytes that nobody but the owner of this key has: uint8 [count]."""
    seed = int.from_bytes(hashlib.blake2b(key + kind.encode(), digest_size=8).digest(), "little")
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8))


def blocks(seed: int, count: int) -> list[tuple[bytes, bytes, bytes]]:
    """(key before, key, token ids) of the first pages of text number `seed`."""
    draw, key, out = np.random.default_rng(seed), FINGERPRINT, []
    for _ in range(count):
        block = draw.integers(0, 64, PAGE_TOKENS, dtype=np.int32).tobytes()
        out.append((key, chain_key(key, block), block))
        key = out[-1][1]
    return out


def write(store: DiskStore, seed: int, count: int) -> None:
    """Text number `seed`: its pages and a checkpoint behind every third."""
    for i, (parent, key, block) in enumerate(blocks(seed, count)):
        store.put_page(parent, key, block, i * PAGE_TOKENS, content(key, PAGE_BYTES, "page"))
        if i % 3 == 2:
            hidden = torch.full((16,), float(i))
            store.put_point(key, b"", (i + 1) * PAGE_TOKENS, content(key, POINT_BYTES, "point"), hidden)


def main(folder: str, seed: int) -> None:
    store = DiskStore(folder, FINGERPRINT, BUDGET)
    threading.Timer(60, lambda: sys.exit(1)).start()  # nobody killed it
    print("ready", flush=True)
    while True:
        write(store, seed, 40)
        seed += 1
        while store._queued_bytes > 1 << 20:
            time.sleep(0.001)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
