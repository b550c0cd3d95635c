"""A checksum that costs less than the memory it reads: two multilinear sums over 64-bit words.

    sum of w[i] a[i]  +  sum of (w[i] >> 32) b[i]        modulo 2^64, a odd, a and b fixed random numbers

A change of one word is always seen; of several, with a chance of at most 2^-32 that it is not, also when only the top
bits differ (which is what the second sum is for). It guards against torn writes and rotten bits, not against malice.
numpy does it at several GiB/s, zlib's crc32 at one or two.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

CHUNK = 4096
"""Words summed at a time, so that what is shifted stays in the processor's cache."""

_STEP = np.uint64(0x9E3779B97F4A7C15)


@cache
def _factors() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    raw = np.random.PCG64(20260424).random_raw(2 * CHUNK)  # a stream that numpy keeps from version to version
    return raw[:CHUNK] | np.uint64(1), raw[CHUNK:] | np.uint64(1)


def checksum(words: NDArray[np.uint64]) -> int:
    """The checksum of uint64 [n]."""
    a, b = _factors()
    total, at = np.uint64(len(words)), 0
    with np.errstate(over="ignore"):
        while at < len(words):
            part = words[at : at + CHUNK]
            n = len(part)
            total = total * _STEP + np.dot(part, a[:n]) + np.dot(part >> np.uint64(32), b[:n])
            at += CHUNK
    return int(total)


def words_of(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Bytes as words; their number is a multiple of 8."""
    return data.view(np.uint64)
