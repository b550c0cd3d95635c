"""Layers as folders of this machine, for overlayfs to stack: mounted where that is allowed, unpacked once otherwise.

Root mounts the image's file as it is (older kernels: through a loop device); an ordinary user, who may not mount EROFS,
gets its files in a folder, with overlayfs's marks in the form that he may set. Any number of processes share them. Who
uses one holds a shared lock on it, which the kernel drops when the last process that has it dies: the client at first,
then the sandbox's keeper, which inherits it. `drop` and `sweep` take away what nobody holds.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import IO

from rorqual import log
from rorqual.errors import SandboxError
from rorqual.sandbox.images.tree import Entry, Image, image_of

_logger = log.get(__name__)
_READ_ONLY, _NO_SUID, _NO_DEV = 1, 2, 4
_libc = ctypes.CDLL(None, use_errno=True)


class Local:
    """The folder in which layers are mounted or unpacked.

    mount: False unpacks always (the form for ordinary users).
    """

    def __init__(self, folder: Path, mount: bool = True) -> None:
        self.folder, self._mount = folder, mount and os.geteuid() == 0
        self._held: dict[str, IO[bytes]] = {}

    def provide(self, digest: str, image_file: Path) -> Path:
        """The layer as a folder, held until `release`. `image_file` must have been verified."""
        if digest not in self._held:
            while True:
                held = self._lock(digest, fcntl.LOCK_SH)
                if self._ready(digest):
                    break
                held.close()
                held = self._lock(digest, fcntl.LOCK_EX)  # one process makes it, the others wait here
                if not self._ready(digest):
                    self._make(digest, image_file)
                held.close()
            self._held[digest] = held
        return self._place(digest)

    def release(self) -> None:
        """Let go of everything held; overlays that are mounted over it go on."""
        for held in self._held.values():
            held.close()
        self._held.clear()

    def locks(self) -> list[int]:
        """Handles of what is held: a process that inherits them, as a keeper does, holds it as long as it lives."""
        return [held.fileno() for held in self._held.values()]

    def drop(self, digests: Iterable[str] | None = None) -> list[str]:
        """Unmount those of these layers (None: of all) that nobody holds; unpacked ones stay for the next sandbox."""
        chosen = self._known() if digests is None else digests
        mounted = [digest for digest in chosen if self._place(digest).is_mount()]
        gone = self._remove(mounted)
        if len(gone) < len(mounted):  # another that tries it at the same time may have been in the way
            time.sleep(0.005)
            gone += self._remove([digest for digest in mounted if digest not in gone])
        return gone

    def _known(self) -> list[str]:
        return sorted(lock.name.removesuffix(".lock") for lock in self.folder.glob("*.lock"))

    def is_verified(self, digest: str, file: Path) -> bool:
        """Whether this very file was verified before: its identity, size and times are as they were then."""
        try:
            return bool(json.loads((self.folder / f"{digest}.verified").read_text()) == _identity(file))
        except (OSError, ValueError):
            return False

    def mark_verified(self, digest: str, identity: list[int]) -> None:
        """Remember it. identity: `identify` from before the bytes were read, so that a later change shows."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = self.folder / f"{digest}.verified"
        fresh = target.with_suffix(f".{os.getpid()}.{os.urandom(4).hex()}")
        fresh.write_text(json.dumps(identity))
        os.replace(fresh, target)

    @staticmethod
    def identify(file: Path) -> list[int]:
        """What tells a file from a later one of the same name."""
        return _identity(file)

    def sweep(self, in_use: Set[str], cached: Set[str] = frozenset()) -> list[str]:
        """Unmount and delete every layer here that is not in `in_use` and that no process holds; returns their names.

        An unpacked layer under a running overlay must be in `in_use`; a mounted one lives on until the overlay goes.
        cached: unpacked ones to be kept for the next sandbox.
        """
        known = self._known()
        unpacked = {digest for digest in known if (self._place(digest).parent / "unpacked").exists()}
        gone = self._remove([digest for digest in known if digest not in in_use and digest not in cached & unpacked])
        for digest in gone:
            if digest not in cached:
                (self.folder / f"{digest}.verified").unlink(missing_ok=True)
        return gone

    def _remove(self, digests: Sequence[str]) -> list[str]:
        """Take away what nobody holds; returns what went."""
        gone = []
        for digest in digests:
            try:
                held = self._lock(digest, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            with held:
                self._unmake(digest)
                (self.folder / f"{digest}.lock").unlink(missing_ok=True)
            gone.append(digest)
        return gone

    def _place(self, digest: str) -> Path:
        return self.folder / digest[:24] / "files"  # short: overlayfs has one page for all its options

    def _ready(self, digest: str) -> bool:
        place = self._place(digest)
        return place.is_mount() or (place.parent / "unpacked").exists()

    def _lock(self, digest: str, how: int) -> IO[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / f"{digest}.lock"
        while True:
            file = open(path, "a+b")  # noqa: SIM115 - stays open as long as the lock is held
            try:
                fcntl.flock(file, how)
            except BaseException:
                file.close()
                raise
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()  # a sweep deleted it while we waited

    def _make(self, digest: str, image_file: Path) -> None:
        self._unmake(digest)  # what a killed process left
        place = self._place(digest)
        place.mkdir(parents=True)
        if self._mount and _mount_image(image_file, place):
            return
        with open(image_file, "rb") as file:
            unpack(file, place)
        (place.parent / "unpacked").touch()

    def _unmake(self, digest: str) -> None:
        place = self._place(digest)
        while place.is_mount():
            if _libc.umount2(os.fsencode(place), 0):
                raise SandboxError(
                    f"{place} could not be unmounted: {os.strerror(ctypes.get_errno())}. Leave it or end what uses it."
                )
        remove_tree(place.parent)


def _identity(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _mount_image(image: Path, place: Path) -> bool:
    """Mount an image read-only, without a loop device where the kernel can; False where it cannot at all."""
    arguments = os.fsencode(image), os.fsencode(place), b"erofs", _READ_ONLY | _NO_SUID | _NO_DEV, None
    if _libc.mount(*arguments) == 0:
        return True
    reason = ctypes.get_errno()
    if reason == errno.ENOTBLK and shutil.which("mount"):
        command = ["mount", "-t", "erofs", "-o", "loop,ro,nosuid,nodev", str(image), str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return True
        _logger.info("A layer could not be mounted through a loop device: %s", done.stderr.strip())
    _logger.info("Layers are unpacked and not mounted: %s", os.strerror(reason))
    return False


def unpack(file: IO[bytes], place: Path) -> None:
    """Write an image's files into an empty folder: as root with their owners, else all as the user's own.

    Devices are not made, but overlayfs's marks are. Raises: SandboxError where the file system cannot take them.
    """
    descriptor, image = file.fileno(), image_of(file)
    folders: list[tuple[Path, Entry]] = []
    first_names: dict[int, Path] = {}
    as_root = os.geteuid() == 0
    for entry in image.entries():
        target = place.joinpath(*map(os.fsdecode, entry.path))
        kind = stat.S_IFMT(entry.mode)
        try:
            if kind == stat.S_IFDIR:
                target.mkdir(mode=0o700, exist_ok=not entry.path)
                folders.append((target, entry))
                continue
            if entry.links > 1 and entry.number in first_names:
                os.link(first_names[entry.number], target, follow_symlinks=False)
                continue
            if kind == stat.S_IFREG:
                _copy(image, entry, descriptor, target)
            elif kind == stat.S_IFLNK:
                os.symlink(image.target(entry), target)
            elif kind == stat.S_IFIFO:
                os.mkfifo(target)
            elif entry.is_whiteout:
                os.mknod(target, stat.S_IFCHR | 0o000, 0)
            else:
                continue
            first_names[entry.number] = target
            _dress(target, entry, as_root)
        except OSError as error:
            raise _cannot(place, target, error) from error
    for target, entry in reversed(folders):  # from below: a folder may deny its owner to write
        try:
            _dress(target, entry, as_root)
        except OSError as error:
            raise _cannot(place, target, error) from error


def _copy(image: Image, entry: Entry, descriptor: int, target: Path) -> None:
    """A regular file's content, moved inside the kernel; holes stay holes."""
    with open(target, "xb") as out:
        os.truncate(out.fileno(), entry.size)
        for offset, length, where in image.extents(entry):
            while where is not None and length:
                moved = os.copy_file_range(descriptor, out.fileno(), length, where, offset)
                if moved == 0:
                    raise OSError(errno.EIO, "the image ends within a file")
                offset, where, length = offset + moved, where + moved, length - moved


def _dress(target: Path, entry: Entry, as_root: bool) -> None:
    """Owner, attributes, permissions and time, in the order in which one does not undo another."""
    kind = stat.S_IFMT(entry.mode)
    if as_root:
        os.chown(target, entry.attributes.uid, entry.attributes.gid, follow_symlinks=False)
    if kind in (stat.S_IFREG, stat.S_IFDIR):
        for name, value in entry.attributes.xattrs.items():
            if name.startswith("user."):
                os.setxattr(target, name, value, follow_symlinks=False)
    if kind != stat.S_IFLNK and not entry.is_whiteout:
        os.chmod(target, entry.attributes.mode & 0o1777 if kind != stat.S_IFDIR else entry.attributes.mode)
    os.utime(target, ns=(entry.attributes.mtime_ns, entry.attributes.mtime_ns), follow_symlinks=False)


def _cannot(place: Path, target: Path, error: OSError) -> SandboxError:
    return SandboxError(
        f"a layer could not be unpacked into {place} (at {target.relative_to(place)}: {error.strerror}). The "
        "folder must be on a local file system with user attributes and enough room, and the kernel 5.8 or newer; "
        "$RORQUAL_HOME chooses another place."
    )


def remove_tree(top: Path) -> None:
    """Delete a tree of ours, also folders that deny their owner to write; nothing when it is not there."""
    if not top.exists():
        return
    for folder, _, _ in os.walk(top):  # top first: a folder must be open before one looks into it
        with suppress(OSError):
            os.chmod(folder, 0o700)
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(top)
