"""Packs a folder of files into a layer: a sandbox's writable folder as a snapshot, or a tree someone prepared.

Kept: owners (translated to what they are inside), permissions, times to the nanosecond, symbolic and hard links, FIFOs,
holes, `user.*` attributes, and overlayfs's two marks: a character device 0:0 says "deleted", `user.overlay.opaque` says
"what is below this folder is hidden". Left out: sockets, devices, set-id bits of files, overlayfs's private attributes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import SnapshotFailed
from rorqual.sandbox.images import erofs
from rorqual.sandbox.images.erofs import Attributes, Writer, chunk_bytes

MAX_DEPTH = 256
NOBODY = 65534
SCRUB = (
    "*/.bash_history", "*/.python_history", "*/.lesshst", "*/.viminfo", "*/.wget-hsts", "*/.sqlite_history",
    "/var/cache/apt/*", "/var/lib/apt/lists/*", "*/.cache/pip", "*/.cache/uv", "*/.npm/_cacache", "*/.cargo/registry",
    "/var/log/*", "/tmp/*", "/var/tmp/*",
    "*/.netrc", "*/.git-credentials", "*/.aws", "*/.docker/config.json", "*/.config/gh", "*/.ssh/id_*", "*/.pypirc",
    "*/.kube/config", "*/.cache/huggingface/token",
)  # fmt: skip
"""What an environment that others will start from should not have: histories, caches, logs, credentials."""
_MARKS = ("user.overlay.", "trusted.overlay.")
_PIECE = 1 << 20
Owners = Sequence[tuple[int, int, int]]
"""(first id outside, first id inside, how many): how ids on the host are to be read."""


def own_ids() -> Owners:
    """As root everyone is who he is; an ordinary user's files belong to root inside, there being no other."""
    return ((0, 0, 1 << 32),) if os.geteuid() == 0 else ((os.geteuid(), 0, 1), (os.getegid(), 0, 1))


def add_folder(writer: Writer, folder: Path, *, owners: Owners | None = None, scrub: Sequence[str] = ()) -> None:
    """Add everything in `folder`, itself as the root. Nothing may change meanwhile: freeze what writes there.

    scrub: shell patterns of paths to leave out, from "/", where * also spans "/"; a matching folder goes whole.
    Raises: SnapshotFailed when a file changed meanwhile, cannot be read, or lies more than 256 folders deep.
    """
    packing = _Packing(writer, owners or own_ids(), scrub)
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise SandboxError(f"{folder} cannot be packed: {error.strerror}. Name a folder.") from error
    try:
        packing.add((), descriptor, os.fstat(descriptor))
    except OSError as error:
        raise SnapshotFailed(f"{folder} could not be packed: {error}. The snapshot before this one stands.") from error
    finally:
        os.close(descriptor)


class _Packing:
    """One walk. Every file is opened by its name in an open folder, never followed, and read through that handle."""

    def __init__(self, writer: Writer, owners: Owners, scrub: Sequence[str]) -> None:
        self._writer, self._owners, self._scrub = writer, owners, scrub
        self._links: dict[tuple[int, int], erofs.Path] = {}

    def add(self, path: erofs.Path, descriptor: int, status: os.stat_result) -> None:
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            self._folder(path, descriptor, status)
            return
        if status.st_nlink > 1:
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            if first is not path:
                self._writer.link(path, first)
                return
        if kind == stat.S_IFREG:
            self._regular(path, descriptor, status)
        elif kind == stat.S_IFLNK:
            self._writer.symlink(path, self._attributes(status, {}), os.fsencode(os.readlink(b"", dir_fd=descriptor)))
        elif kind == stat.S_IFIFO or (kind == stat.S_IFCHR and status.st_rdev == 0):
            self._writer.special(path, self._attributes(status, {}), kind)

    def _folder(self, path: erofs.Path, descriptor: int, status: os.stat_result) -> None:
        if len(path) > MAX_DEPTH:
            raise SnapshotFailed(
                f"a path is more than {MAX_DEPTH} folders deep: {erofs._shown(path)[:200]}. Remove it."
            )
        with _readable(descriptor, status, os.O_RDONLY | os.O_DIRECTORY) as inside:
            self._writer.folder(path, self._attributes(status, _xattrs(inside, path)))
            for name in sorted(map(os.fsencode, os.listdir(inside))):
                below = (*path, name)
                if self._scrubbed(below):
                    continue
                child = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=inside)
                try:
                    self.add(below, child, os.fstat(child))
                finally:
                    os.close(child)

    def _regular(self, path: erofs.Path, descriptor: int, status: os.stat_result) -> None:
        with _readable(descriptor, status, os.O_RDONLY) as file:
            attributes = self._attributes(status, _xattrs(file, path))
            size = status.st_size
            if size >= _PIECE and status.st_blocks * 512 + erofs.BLOCK < size:
                self._writer.sparse(path, attributes, size, _data(file, size))
            else:
                self._writer.regular(path, attributes, _pieces(file, size))
            after = os.fstat(file)
            if (after.st_size, after.st_mtime_ns) != (size, status.st_mtime_ns):
                raise SnapshotFailed(f"{erofs._shown(path)} changed while it was packed. Freeze the sandbox first.")

    def _attributes(self, status: os.stat_result, xattrs: dict[str, bytes]) -> Attributes:
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISDIR(status.st_mode):
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        return Attributes(mode, self._inside(status.st_uid), self._inside(status.st_gid), status.st_mtime_ns, xattrs)

    def _inside(self, number: int) -> int:
        return next((to + number - first for first, to, count in self._owners if 0 <= number - first < count), NOBODY)

    def _scrubbed(self, path: erofs.Path) -> bool:
        if not self._scrub:
            return False
        text = "/" + os.fsdecode(b"/".join(path))
        return any(fnmatchcase(text, pattern) for pattern in self._scrub)


class _readable:
    """A handle to read from, of a file known by an O_PATH handle; an owner's file that denies it is lent the right."""

    def __init__(self, descriptor: int, status: os.stat_result, flags: int) -> None:
        self._again = f"/proc/self/fd/{descriptor}"
        self._mode, self._flags = stat.S_IMODE(status.st_mode), flags | os.O_NONBLOCK | os.O_CLOEXEC

    def __enter__(self) -> int:
        try:
            self._file = os.open(self._again, self._flags)
        except PermissionError:
            os.chmod(self._again, self._mode | 0o700)
            try:
                self._file = os.open(self._again, self._flags)
                if self._flags & os.O_DIRECTORY:
                    return self._file  # must stay searchable until its content is read
            finally:
                if not self._flags & os.O_DIRECTORY:
                    os.chmod(self._again, self._mode)
        return self._file

    def __exit__(self, *_: object) -> None:
        if stat.S_IMODE(os.fstat(self._file).st_mode) != self._mode:
            os.fchmod(self._file, self._mode)
        os.close(self._file)


def _xattrs(file: int, path: erofs.Path) -> dict[str, bytes]:
    """What is kept: `user.*` but for overlayfs's own; its "opaque" in the form that everyone may set."""
    found: dict[str, bytes] = {}
    with suppress(OSError):  # a file system without them
        for name in os.listxattr(file):
            if name.endswith((".overlay.redirect", ".overlay.metacopy")):
                raise SnapshotFailed(
                    f"{erofs._shown(path)} refers to its old place in a layer below. Mount overlayfs with "
                    "redirect_dir=off,metacopy=off."
                )
            if name.startswith(_MARKS):
                if name.endswith(".overlay.opaque") and os.getxattr(file, name) == b"y":
                    found[erofs.OPAQUE] = b"y"
            elif name.startswith("user."):
                found[name] = os.getxattr(file, name)
    return found


def _pieces(file: int, size: int) -> Iterator[bytes]:
    left = size
    while left and (piece := os.read(file, min(left, _PIECE))):
        yield piece
        left -= len(piece)


def _data(file: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The chunks of a file with holes that have anything in them."""
    chunk, begin = chunk_bytes(size), 0
    while begin < size:
        try:
            data = os.lseek(file, begin, os.SEEK_DATA)
        except OSError:
            return  # a hole up to the end
        begin = data // chunk * chunk
        piece = os.pread(file, min(chunk, size - begin), begin)
        if piece.strip(b"\0"):
            yield begin, piece
        begin += chunk


Build = Callable[[Writer], None]
"""Adds what a layer shall hold."""
