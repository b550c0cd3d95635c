"""One writer a journal: a lock of the kernel, which dies with its holder, and an epoch for holders that do not die.

A writer that hangs or is stopped (SIGSTOP) keeps its lock. A successor that takes over replaces the lock's file, raises
the epoch in `state` and begins a segment of its own; what the older one still writes lies behind the end of its
segment, where nobody reads, and it finds the new epoch before it acknowledges anything.
"""

import errno
import fcntl
import os
import time
from pathlib import Path

from rorqual.errors import JournalError

LOCK, GUARD = "lock", "guard"
_GUARD_TIMEOUT_S = 10.0


class Ownership:
    """The held lock of a journal's folder."""

    def __init__(self, folder: Path, *, take_over: bool) -> None:
        """Raises: JournalError when another process writes the journal and it is not taken over."""
        self._path = folder / LOCK
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _try_lock(self._descriptor):
            holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            if not take_over:
                raise JournalError(
                    f"the journal {folder} is being written by process {holder}. A journal has one writer. Close it "
                    f"there, read it with Reader, or, if that process hangs, open with take_over=True and fence it."
                )
            self._replace(folder)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _replace(self, folder: Path) -> None:
        """Put a new file, locked by us, in the place of the one that somebody holds."""
        new = folder / f"{LOCK}.tmp"
        self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _try_lock(self._descriptor):  # the guard lets one process at a time come here
            raise AssertionError("somebody locked a file that only the holder of the guard makes")
        os.rename(new, self._path)

    def release(self) -> None:
        """Let others write."""
        os.close(self._descriptor)


class Guard:
    """Held while a journal is opened for writing, so that two openings do not interleave."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1

    def __enter__(self) -> "Guard":
        self._descriptor = os.open(self._folder / GUARD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        end = time.monotonic() + _GUARD_TIMEOUT_S
        while not _try_lock(self._descriptor):
            if time.monotonic() > end:
                os.close(self._descriptor)
                raise JournalError(
                    f"another process has been opening the journal {self._folder} for {_GUARD_TIMEOUT_S:.0f} s. End "
                    f"that process (it holds {GUARD}) and try again."
                )
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
