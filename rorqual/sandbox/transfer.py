"""The host's side of uploads and downloads: what may be sent in, and how a tree from inside is written here.

Everything that comes from a sandbox is untrusted: names, kinds, sizes and links. Files are created beneath one folder,
part by part through directory descriptors opened without following links; a path is never put together as text.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import PolicyRejected
from rorqual.sandbox.images.beneath import stays_inside

if TYPE_CHECKING:
    from rorqual.sandbox.files import FileInfo

MAX_DEPTH = 64
MAX_NAME = 255


@dataclass(frozen=True)
class Entry:
    """One thing to send in; path relative to the tree, "" for the tree's own top."""

    path: str
    kind: str
    source: Path
    mode: int
    target: str | None = None


def local_tree(top: Path) -> list[Entry]:
    """A file or folder of the host as a list, folders before what they hold.

    Raises: PolicyRejected for what is neither file, folder nor a link inside the tree; SandboxError if it is not there.
    """
    try:
        status = top.stat()
    except OSError as error:
        raise SandboxError(f"{top} cannot be uploaded: {error.strerror}.") from error
    if stat.S_ISREG(status.st_mode):
        return [Entry("", "file", top.resolve(), status.st_mode & 0o777)]
    if not stat.S_ISDIR(status.st_mode):
        raise PolicyRejected(f"{top} is neither a file nor a folder; only those are uploaded.")
    entries = [Entry("", "folder", top, 0o755)]
    for folder, folders, files in os.walk(top):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = Path(folder, name)
            relative = path.relative_to(top).as_posix()
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(path)
                if not _stays_inside(relative, target):
                    raise PolicyRejected(
                        f"{path} is a link to {target!r}, out of {top}. Copy what it leads to, or leave it out."
                    )
                entries.append(Entry(relative, "link", path, 0o777, target))
            elif stat.S_ISDIR(status.st_mode):
                entries.append(Entry(relative, "folder", path, status.st_mode & 0o777 | 0o700))
            elif stat.S_ISREG(status.st_mode):
                entries.append(Entry(relative, "file", path, status.st_mode & 0o777))
            else:
                raise PolicyRejected(f"{path} is a device, socket or pipe, which is not uploaded. Leave it out.")
    return entries


def _stays_inside(path: str, target: str) -> bool:
    return stays_inside(tuple(os.fsencode(path).split(b"/")), os.fsencode(target))


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    if len(parts) > MAX_DEPTH or any(part in ("", ".", "..") or "\0" in part or len(part) > MAX_NAME for part in parts):
        raise PolicyRejected(f"the sandbox named a file {path[:200]!r}, which no honest tree holds. Nothing was kept.")
    return parts


class Receiver:
    """Writes what a sandbox sends beneath one folder, or to one file; unless `keep` is called all of it is removed."""

    def __init__(self, target: Path, max_bytes: int, max_files: int) -> None:
        self._target = target
        self._bytes_left, self._files_left = max_bytes, max_files
        self._limits = (max_bytes, max_files)
        self._made: list[tuple[str, str]] = []
        self._top: int | None = None
        self._made_top = False
        self._single: Path | None = None
        self._kept = False

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self._undo()
        if self._top is not None:
            os.close(self._top)

    def check(self, entries: Sequence[FileInfo]) -> None:
        """Refuse a whole tree before anything of it is written."""
        files = [entry for entry in entries if entry.kind == "file"]
        if len(entries) > self._files_left:
            raise PolicyRejected(f"the tree has more than {self._limits[1]:,} entries (max_files). Nothing was kept.")
        size = sum(entry.size for entry in files)
        if size > self._bytes_left:
            raise PolicyRejected(
                f"the tree has {size:,} bytes, more than {self._limits[0]:,} (max_bytes). Nothing was kept."
            )
        for entry in entries:
            _parts(entry.path)
            if entry.kind == "link" and not _stays_inside(entry.path, entry.target or ""):
                raise PolicyRejected(
                    f"{entry.path!r} is a link to {entry.target!r}, out of the tree. Nothing was kept."
                )
            if entry.kind not in ("file", "folder", "link"):
                raise PolicyRejected(f"{entry.path!r} is a {entry.kind}, which is not downloaded. Nothing was kept.")

    def _open_top(self) -> int:
        if self._top is None:
            self._made_top = not self._target.exists()
            self._target.mkdir(parents=True, exist_ok=True)
            self._top = os.open(self._target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._top

    @contextlib.contextmanager
    def _parent(self, parts: list[str]) -> Iterator[int]:
        descriptor = os.dup(self._open_top())
        try:
            for part in parts[:-1]:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        except OSError as error:
            raise SandboxError(f"{self._target}/{'/'.join(parts)} cannot be written: {error.strerror}.") from error
        finally:
            os.close(descriptor)

    def folder(self, path: str) -> None:
        """A folder of the tree."""
        parts = _parts(path)
        with self._parent(parts) as parent, contextlib.suppress(FileExistsError):
            os.mkdir(parts[-1], 0o700, dir_fd=parent)
            self._made.append(("folder", path))

    def link(self, path: str, target: str) -> None:
        """A link of the tree, already checked to stay inside."""
        parts = _parts(path)
        with self._parent(parts) as parent:
            os.symlink(target, parts[-1], dir_fd=parent)
            self._made.append(("link", path))

    @contextlib.contextmanager
    def file(self, path: str | None, kind: str) -> Iterator[Callable[[bytes], None]]:
        """A file, of the tree or (path None) the target itself; what is yielded takes its bytes."""
        if kind != "file":
            raise PolicyRejected(f"it is a {kind}, which is not downloaded.")
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        if path is None:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._single = self._target.with_name(f".{self._target.name}.{os.getpid()}.part")
            descriptor = os.open(self._single, flags | os.O_TRUNC, 0o600)
        else:
            parts = _parts(path)
            with self._parent(parts) as parent:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(parts[-1], dir_fd=parent)
                descriptor = os.open(parts[-1], flags | os.O_EXCL, 0o600, dir_fd=parent)
            self._made.append(("file", path))
        with open(descriptor, "wb") as out:

            def write(data: bytes) -> None:
                self._bytes_left -= len(data)
                if self._bytes_left < 0:  # it grew after it was listed
                    raise PolicyRejected(f"more than {self._limits[0]:,} bytes came (max_bytes). Nothing was kept.")
                out.write(data)

            yield write

    def keep(self) -> list[Path]:
        """All is here: let it stay; returns the files."""
        self._kept = True
        if self._single is not None:
            os.replace(self._single, self._target)
            return [self._target]
        if self._top is None:
            self._open_top()
        return [self._target / path for kind, path in self._made if kind == "file"]

    def _undo(self) -> None:
        if self._single is not None:
            self._single.unlink(missing_ok=True)
        for kind, path in reversed(self._made):
            parts = path.split("/")
            with contextlib.suppress(OSError, SandboxError), self._parent(parts) as parent:
                (os.rmdir if kind == "folder" else os.unlink)(parts[-1], dir_fd=parent)
        if self._made_top:
            with contextlib.suppress(OSError):
                self._target.rmdir()
