"""Texts for a disk cache whose contents follow from the keys alone, and a writer of them to be killed."""

import hashlib
import os
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


def write_forever(folder: str, seed: int, ready: int) -> None:
    """Text after text, until somebody kills this process; a byte into file `ready` says that it has begun."""
    store = DiskStore(folder, FINGERPRINT, BUDGET)
    os.write(ready, b"!")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        write(store, seed, 40)
        seed += 1
        while store._queued_bytes > 1 << 20:
            time.sleep(0.001)
