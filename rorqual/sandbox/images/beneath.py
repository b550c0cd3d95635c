"""Opens files below a folder so that no symbolic link, however quickly it is put in the way, leads anywhere else.

The kernel checks every step of a path itself (`openat2`); on one that cannot (before 5.6, or where a filter forbids the
call), each folder is opened from the last with O_NOFOLLOW, which holds as much.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
import struct
from contextlib import suppress

from rorqual.sandbox.errors import PolicyRejected

Path = tuple[bytes, ...]
_SYS_OPENAT2 = 437  # the same on every architecture
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x02, 0x04, 0x08
_libc = ctypes.CDLL(None, use_errno=True)
_missing = platform.system() != "Linux"


def open_beneath(folder: int, path: Path, flags: int, mode: int = 0) -> int:
    """A new handle of the file at `path` (parts, none for the folder itself) below an open folder.

    Raises: PolicyRejected when a part is "..", or a symbolic link stands in the way or at the end; OSError otherwise.
    """
    check_parts(path)
    try:
        return _open(folder, path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EXDEV) or _blocked_by_link(folder, path, error):
            raise PolicyRejected(
                f"{shown(path)} leads through a symbolic link, which is not followed here. Name the file itself."
            ) from None
        raise


def open_folder(folder: int, path: Path, mode: int = 0o755) -> int:
    """A handle of the folder at `path`, made with those above it where they lack. Raises: as `open_beneath`."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    try:
        return open_beneath(folder, path, flags)
    except FileNotFoundError:
        pass
    above = open_folder(folder, path[:-1], mode) if path else os.dup(folder)
    try:
        with suppress(FileExistsError):  # another made it, or a link stands there, which the next line refuses
            os.mkdir(path[-1], mode, dir_fd=above)
        return open_beneath(above, path[-1:], flags)
    finally:
        os.close(above)


def check_parts(path: Path) -> None:
    """Raises: PolicyRejected when a part is "..", ".", empty, or holds a slash or NUL."""
    for part in path:
        if part in (b"", b".", b"..") or b"/" in part or b"\0" in part or len(part) > 255:
            raise PolicyRejected(f"{shown(path)} has the part {part[:255]!r}, which no path may have here.")


def stays_inside(path: Path, target: bytes) -> bool:
    """Whether a symbolic link at `path` of a tree leads to a place in that tree, whatever the tree's other links are.

    Steps up are allowed at its beginning only, where they leave folders that are real. Behind a name they may leave
    another place than the text says: with `d -> .` the link `d/d/../../x` leads out.
    """
    steps = [step for step in target.split(b"/") if step not in (b"", b".")]
    up = next((number for number, step in enumerate(steps) if step != b".."), len(steps))
    return not target.startswith(b"/") and b"\0" not in target and b".." not in steps[up:] and up < len(path)


def shown(path: Path) -> str:
    """A path for people, bytes that are no text as escapes, and not without end."""
    text = b"/".join(path).decode("utf-8", "backslashreplace") or "."
    return repr(text if len(text) <= 200 else text[:200] + "…")


def _open(folder: int, path: Path, flags: int, mode: int) -> int:
    global _missing
    if not _missing:
        how = struct.pack("=QQQ", flags, mode if flags & os.O_CREAT else 0, _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH)
        name = b"/".join(path) or b"."
        while True:
            descriptor = _libc.syscall(_SYS_OPENAT2, folder, ctypes.c_char_p(name), how, len(how))
            reason = ctypes.get_errno()
            if descriptor >= 0:
                return int(descriptor)
            if reason == errno.ENOSYS or (reason == errno.EPERM and not _exists(folder, path)):
                _missing = True
                break
            if reason != errno.EAGAIN:  # a rename elsewhere came in between
                raise OSError(reason, os.strerror(reason))
    return _step_by_step(folder, path, flags, mode)


def _exists(folder: int, path: Path) -> bool:
    """Whether "not permitted" can be about the file itself and not about the call."""
    try:
        os.close(_step_by_step(folder, path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0))
        return True
    except OSError:
        return False


def _step_by_step(folder: int, path: Path, flags: int, mode: int) -> int:
    if not path:
        return os.open(b".", flags, dir_fd=folder)
    here = os.dup(folder)
    try:
        for part in path[:-1]:
            below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
        return os.open(path[-1], flags, mode, dir_fd=here)
    finally:
        os.close(here)


def _blocked_by_link(folder: int, path: Path, error: OSError) -> bool:
    """Whether "not a directory" was said of a symbolic link, as O_NOFOLLOW with O_DIRECTORY does."""
    if error.errno != errno.ENOTDIR:
        return False
    for count in range(1, len(path) + 1):
        try:
            status = os.stat(b"/".join(path[:count]), dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        if stat.S_ISLNK(status.st_mode):
            return True
    return False
