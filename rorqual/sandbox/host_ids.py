"""Host ids that no other sandbox on this machine has had since boot: counters in /run, one a kind of id.

A counter is replaced, never rewritten in place: a process killed in the middle would leave it empty, and the next one
would hand out ids from the beginning again, which sandboxes that still run have.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from rorqual.errors import SandboxError

COUNTERS = Path("/run/rorqual")
FIRST_UID, LAST_UID = 200_000, 1_000_000
RANGE = 65536
"""Host ids of a sandbox that has users of its own."""
FIRST_RANGE, LAST_RANGE = 1 << 28, (1 << 31) - RANGE
"""Where such ranges lie: far above what distributions give to users and their containers."""


def fresh_uid() -> int:
    """A host uid for one sandbox. Raises: SandboxError when the counter is damaged."""
    return _advance("last-uid", FIRST_UID, LAST_UID, 1)


def fresh_range() -> int:
    """The first of `RANGE` host ids for one sandbox. Raises: SandboxError when the counter is damaged."""
    return _advance("last-range", FIRST_RANGE, LAST_RANGE, RANGE)


def _advance(name: str, first: int, last: int, step: int) -> int:
    """The number after the one on file, on file when this returns; from the beginning again after `last`."""
    COUNTERS.mkdir(mode=0o755, exist_ok=True)
    path = COUNTERS / name
    with open(COUNTERS / f"{name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with open(path) as counter:
                fcntl.flock(counter, fcntl.LOCK_EX)  # earlier versions write in place, and lock the counter itself
                given = int(counter.read())
        except FileNotFoundError:
            given = first
        except ValueError:
            raise SandboxError(
                f"{path} holds no number, so it is not known which ids sandboxes that run now have. "
                "End all sandboxes (`rorqual sandbox list`), then remove that file."
            ) from None
        number = given + step if first <= given <= last - step else first + step
        scratch = COUNTERS / f"{name}.new"
        scratch.write_text(str(number))
        os.replace(scratch, path)
    return number
