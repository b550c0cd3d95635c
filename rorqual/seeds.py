"""Independent random streams from one seed.

Every random decision (data order, task instances, initial weights, sampling) takes its own stream, named by what it
decides, so adding a consumer never shifts another one's numbers.
"""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A stable 63-bit seed for the stream called `names` under `seed` (the same on every machine and version)."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
