"""Every system call by which a journal changes a disk, in one small class, so that tests can fail, record or cut them.

Durable here means what the system promises after a sync. A disk that acknowledges from a volatile cache breaks it.
"""

import contextlib
import errno
import mmap
import os
import sys
from pathlib import Path

FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room: the data were not taken, and nothing that was synced is in doubt."""

_CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""The system has no writes that sync."""


class Disk:
    """The calls a journal's writer makes. Descriptors are the system's."""

    def __init__(self) -> None:
        self._synced_writes = hasattr(os, "pwritev") and hasattr(os, "RWF_DSYNC")

    def create(self, path: Path) -> int:
        """A new file, open for writing and reading. Its name is durable after `sync_folder`."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def open(self, path: Path) -> int:
        """An existing file, open for writing and reading."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def close(self, descriptor: int) -> None:
        """Give the descriptor back."""
        os.close(descriptor)

    def write(self, descriptor: int, data: bytes, offset: int, *, synced: bool) -> None:
        """All of `data` at `offset`; durable on return where `synced`.

        Raises: OSError, of FULL_ERRORS when there is no room.
        """
        view, written = memoryview(data), 0
        if synced and self._synced_writes:  # one call instead of two
            try:
                while written < len(data):
                    written += os.pwritev(descriptor, [view[written:]], offset + written, os.RWF_DSYNC)
                return
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                self._synced_writes = False
        while written < len(data):
            written += os.pwrite(descriptor, view[written:], offset + written)
        if synced:
            self.sync(descriptor)

    def make_room(self, descriptor: int, start: int, size: int) -> None:
        """Write `size` zeros at the file's end, durable on return.

        A later commit into them changes no metadata, so it costs the file system's own journal nothing: with small
        commits that is a third of their time. (Space that is only reserved does not help: it is marked as written at
        each commit.) Raises: OSError, of FULL_ERRORS when there is no room.
        """
        self.write(descriptor, bytes(size), start, synced=True)

    def sync(self, descriptor: int) -> None:
        """What was written to the file is durable on return. Raises: OSError; what was written is then in doubt."""
        if sys.platform == "darwin":  # fsync does not reach the medium there
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(descriptor)

    def flush(self, mapping: mmap.mmap) -> None:
        """What was stored in a mapped file is durable on return."""
        mapping.flush()

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut the file to `size` bytes; durable after `sync`."""
        os.ftruncate(descriptor, size)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file its name, in one step; durable after `sync_folder`."""
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        """Remove a file if it is there; durable after `sync_folder`."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def sync_folder(self, path: Path) -> None:
        """Names in the folder are durable on return."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
