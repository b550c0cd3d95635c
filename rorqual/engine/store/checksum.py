"""A checksum that costs less than the memory it reads: two multilinear sums over 64-bit words.

    sum of w[i] a[i]  +  sum of (w[i] >> 32) b[i]        modulo 2^64, a odd, a and b fixed random numbers

taken over chunks of words, and the chunks' sums combined in order. A change of one word is always seen; of several,
with a chance of at most 2^-32 that it is not, also when only the top bits differ (which is what the second sum is for).
It guards against torn writes and rotten bits, not against malice. In C it runs at the speed of memory, in numpy at a
few GiB/s, where zlib's crc32 makes one or two.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.native import library

CHUNK = 4096
"""Words summed at a time, so that the factors stay in the processor's cache."""

_STEP = np.uint64(0x9E3779B97F4A7C15)


@cache
def _factors() -> NDArray[np.uint64]:
    """a, then b."""
    raw = np.random.PCG64(20260424).random_raw(2 * CHUNK)  # a stream that numpy keeps from version to version
    return raw | np.uint64(1)


@cache
def _factors_tensor() -> Tensor:
    return torch.from_numpy(_factors().view(np.int64))


def checksum(words: NDArray[np.uint64]) -> int:
    """The checksum of contiguous uint64 [n]."""
    return checksums(words[None])[0]


def checksums(words: NDArray[np.uint64]) -> list[int]:
    """The checksum of every row of uint64 [rows, n]; the numbers of a row lie one behind the other."""
    if not registry.allows("native") or library.load() is None:
        return [reference(row) for row in words]
    totals = torch.empty(len(words), dtype=torch.int64)
    source = torch.from_numpy(words.view(np.int64))
    library.call(
        "checksum_words", source, _factors_tensor(), totals, len(words), source.stride(0), words.shape[1], CHUNK
    )
    return [total % (1 << 64) for total in totals.tolist()]


def reference(words: NDArray[np.uint64]) -> int:
    """The same in numpy."""
    a, b = _factors()[:CHUNK], _factors()[CHUNK:]
    total = np.uint64(len(words))
    with np.errstate(over="ignore"):
        for at in range(0, len(words), CHUNK):
            part = words[at : at + CHUNK]
            n = len(part)
            total = total * _STEP + np.dot(part, a[:n]) + np.dot(part >> np.uint64(32), b[:n])
    return int(total)
