"""Writes an initramfs: a cpio archive in the "newc" form, the same bytes for the same content.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Left out: compression (unpacking it
in an emulated machine costs more than reading the bytes) and hard links.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from rorqual.errors import SandboxError


@dataclass(frozen=True)
class Entry:
    """One file of the archive. mode: type and permissions as in `st_mode`; device: major and minor of a node."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass
class Archive:
    """Files by path, relative to the root and without a leading slash; folders above them come by themselves."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def add_folder(self, path: str, mode: int = 0o755) -> None:
        """An empty folder. Raises: SandboxError for a path that is absolute or has `..` in it."""
        self._add(path, Entry(stat.S_IFDIR | mode))

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file. Raises: as `add_folder`."""
        self._add(path, Entry(stat.S_IFREG | mode, data))

    def add_link(self, path: str, target: str) -> None:
        """A symbolic link. Raises: as `add_folder`."""
        self._add(path, Entry(stat.S_IFLNK | 0o777, target.encode()))

    def add_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device. Raises: as `add_folder`."""
        self._add(path, Entry(stat.S_IFCHR | mode, device=(major, minor)))

    def to_bytes(self) -> bytes:
        """The archive: sorted by path, owner 0, time 0, inode numbers counted from 1."""
        parts = [
            _header_and_data(inode, path, entry) for inode, (path, entry) in enumerate(sorted(self.entries.items()), 1)
        ]
        parts.append(_header_and_data(0, "TRAILER!!!", Entry(0)))
        whole = b"".join(parts)
        return whole + bytes(-len(whole) % 512)

    def write(self, path: Path) -> None:
        """The archive as a file."""
        path.write_bytes(self.to_bytes())

    def _add(self, path: str, entry: Entry) -> None:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path:
            raise SandboxError(f"{path!r} is no place in an initramfs: paths are relative and stay inside.")
        for parent in list(pure.parents)[:-1]:
            self.entries.setdefault(str(parent), Entry(stat.S_IFDIR | 0o755))
        self.entries[str(pure)] = entry


def _header_and_data(inode: int, path: str, entry: Entry) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    return _padded(header) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
