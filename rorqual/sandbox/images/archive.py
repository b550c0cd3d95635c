"""Unpacks and packs the tar archives in which trees of files go into a sandbox and come out of it.

Neither side is trusted: an archive may come from hostile code, and the folder it goes to or comes from may be changed
by such code meanwhile. So every path is opened from its folder's handle (`beneath`), never followed through a link, and
the limits of `tar` hold. What may not be is refused and not quietly left out, but for links that leave a quarantine.
"""

from __future__ import annotations

import os
import stat
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import BinaryIO

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import PolicyRejected
from rorqual.sandbox.images.beneath import Path, open_beneath, open_folder, shown, stays_inside
from rorqual.sandbox.images.tar import HARD_LINK, ArchiveLimits, Member, Reader

_SET_ID = stat.S_ISUID | stat.S_ISGID
_PIECE = 256 << 10


@dataclass
class Report:
    """What an archive had: entries and bytes of content; skipped: links left out because they lead outside."""

    entries: int = 0
    content_bytes: int = 0
    skipped: list[str] = field(default_factory=list)


def extract(
    file: BinaryIO, folder: FilePath, limits: ArchiveLimits | None = None, *, quarantine: bool = False
) -> Report:
    """Unpack a tar archive (plain, gzip, bzip2, xz) into an existing folder while it streams in.

    Everything belongs to the caller. quarantine: for what comes out of a sandbox - files get mode 0600, folders 0700,
    nothing can be executed, and symbolic links that lead outside are left out and named in the report.
    Files that are there already are replaced, each in one step. Raises: PolicyRejected for a path that is absolute or
    goes up or through a link, for devices, sockets, FIFOs and set-id bits, and at each limit; what came before stays.
    """
    reader = Reader(file, limits)
    report = Report()
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    unpacking = _Unpacking(top, quarantine, report)
    try:
        for member, content in reader:
            unpacking.add(member, content)
            report.entries, report.content_bytes = reader.entries, reader.content_bytes
        unpacking.finish()
    except OSError as error:
        raise SandboxError(
            f"the archive could not be unpacked into {folder}: {error}. What came before stays."
        ) from error
    finally:
        os.close(top)
    return report


class _Unpacking:
    def __init__(self, top: int, quarantine: bool, report: Report) -> None:
        self._top, self._quarantine, self._report = top, quarantine, report
        self._folders: dict[Path, Member] = {}

    def add(self, member: Member, content: object) -> None:
        """Put one member in its place."""
        _check(member)
        if member.kind == stat.S_IFDIR:
            os.close(open_folder(self._top, member.path, 0o700))
            self._folders[member.path] = member
            return
        if not member.path:
            raise PolicyRejected("the archive has a file without a name. Make it again.")
        parent = open_folder(self._top, member.path[:-1], 0o700 if self._quarantine else 0o755)
        fresh = b".rorqual-" + os.urandom(8).hex().encode()
        try:
            if self._make(member, content, parent, fresh):
                _replace(parent, fresh, member.path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=parent)
            os.close(parent)

    def finish(self) -> None:
        """Folders get their modes and times last, from below: one may deny its owner to write into it."""
        for path, member in sorted(self._folders.items(), key=lambda item: len(item[0]), reverse=True):
            descriptor = open_beneath(self._top, path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if path:
                    os.fchmod(descriptor, 0o700 if self._quarantine else member.mode & 0o777)
                os.utime(descriptor, ns=(member.mtime_ns, member.mtime_ns))
            finally:
                os.close(descriptor)

    def _make(self, member: Member, content: object, parent: int, fresh: bytes) -> bool:
        """The member under a name of ours beside its own; False when it is left out."""
        if member.kind == HARD_LINK:
            self._link(member, parent, fresh)
        elif member.kind == stat.S_IFLNK:
            if self._quarantine and not stays_inside(member.path, member.target):
                self._report.skipped.append(shown(member.path))
                return False
            os.symlink(member.target, fresh, dir_fd=parent)
            os.utime(fresh, ns=(member.mtime_ns, member.mtime_ns), dir_fd=parent, follow_symlinks=False)
        else:
            _write(member, content, parent, fresh, 0o600 if self._quarantine else member.mode & 0o777)
        return True

    def _link(self, member: Member, parent: int, fresh: bytes) -> None:
        """A second name for a file of the same archive, found as every path is, and no link or folder."""
        if member.target.startswith(b"/"):
            raise PolicyRejected(f"{shown(member.path)} is a hard link to an absolute path. Make it relative.")
        path = tuple(part for part in member.target.split(b"/") if part not in (b"", b"."))
        if not path:
            raise PolicyRejected(f"{shown(member.path)} is a hard link to nothing. Make the archive again.")
        descriptor = open_beneath(self._top, path, os.O_PATH)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PolicyRejected(f"{shown(member.path)} is a hard link to {shown(path)}, which is no plain file.")
            os.link(f"/proc/self/fd/{descriptor}", fresh, dst_dir_fd=parent, follow_symlinks=True)
        finally:
            os.close(descriptor)


def _check(member: Member) -> None:
    if member.kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, HARD_LINK):
        raise PolicyRejected(
            f"{shown(member.path)} is a device, FIFO or socket. Only files, folders and links are taken."
        )
    if member.mode & _SET_ID and member.kind in (stat.S_IFREG, HARD_LINK):
        raise PolicyRejected(f"{shown(member.path)} has a set-id bit (mode {member.mode:o}). Take it off: chmod a-s.")


def _write(member: Member, content: object, parent: int, fresh: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(fresh, flags, 0o600, dir_fd=parent)
    with os.fdopen(descriptor, "wb") as out:
        for piece in content:  # type: ignore[attr-defined]
            out.write(piece)
        out.flush()
        os.fchmod(descriptor, mode)
        os.utime(descriptor, ns=(member.mtime_ns, member.mtime_ns))


def _replace(parent: int, fresh: bytes, path: Path) -> None:
    try:
        os.replace(fresh, path[-1], src_dir_fd=parent, dst_dir_fd=parent)
    except (IsADirectoryError, NotADirectoryError):
        raise PolicyRejected(
            f"{shown(path)} is a folder there already and a file in the archive. Remove one."
        ) from None


def create(source: FilePath, out: BinaryIO, limits: ArchiveLimits | None = None) -> Report:
    """Pack a folder's content, or one file, into a tar archive as it streams out, owned by root and in order of names.

    Raises: PolicyRejected for devices, sockets, FIFOs, set-id bits, files that grow meanwhile, and at each limit.
    """
    try:
        top = os.open(source, os.O_PATH | os.O_CLOEXEC)
        try:
            with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
                packing = _Packing(archive, limits or ArchiveLimits())
                if stat.S_ISDIR(os.fstat(top).st_mode):
                    packing.folder((), top)
                else:
                    packing.file((os.fsencode(source.name),), top)
        finally:
            os.close(top)
    except OSError as error:
        raise SandboxError(f"{source} could not be packed: {error}.") from error
    return packing.report


class _Packing:
    def __init__(self, archive: tarfile.TarFile, limits: ArchiveLimits) -> None:
        self.archive, self._limits, self.report = archive, limits, Report()
        self._links: dict[tuple[int, int], Path] = {}

    def folder(self, path: Path, handle: int) -> None:
        inside = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in sorted(map(os.fsencode, os.listdir(inside))):
                child = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
                try:
                    self.file((*path, name), child)
                finally:
                    os.close(child)
        finally:
            os.close(inside)

    def file(self, path: Path, handle: int) -> None:
        status = os.fstat(handle)
        info = self._header(path, status)
        if stat.S_ISDIR(status.st_mode):
            info.type = tarfile.DIRTYPE
            self.archive.addfile(info)
            self.folder(path, handle)
        elif stat.S_ISLNK(status.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(os.readlink(b"", dir_fd=handle))
            self.archive.addfile(info)
        elif (first := self._links.get((status.st_dev, status.st_ino))) is not None:
            info.type, info.linkname = tarfile.LNKTYPE, os.fsdecode(b"/".join(first))
            self.archive.addfile(info)
        else:
            if status.st_nlink > 1:
                self._links[status.st_dev, status.st_ino] = path
            self._content(info, path, handle, status.st_size)

    def _header(self, path: Path, status: os.stat_result) -> tarfile.TarInfo:
        kind = stat.S_IFMT(status.st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            raise PolicyRejected(
                f"{shown(path)} is a device, FIFO or socket. Only files, folders and links can be sent."
            )
        if status.st_mode & _SET_ID and kind == stat.S_IFREG:
            raise PolicyRejected(f"{shown(path)} has a set-id bit. Take it off (chmod a-s) or leave the file out.")
        self.report.entries += 1
        limits = self._limits
        if self.report.entries > limits.entries or len(path) > limits.depth or len(b"/".join(path)) > limits.path_bytes:
            raise PolicyRejected(
                f"{shown(path)} is entry {self.report.entries}, {len(path)} folders deep; {limits.entries} entries and "
                f"{limits.depth} folders are the limit. Send it in parts."
            )
        info = tarfile.TarInfo(os.fsdecode(b"/".join(path)))
        info.mode, info.mtime = stat.S_IMODE(status.st_mode) & 0o1777, status.st_mtime_ns // 10**9
        return info

    def _content(self, info: tarfile.TarInfo, path: Path, handle: int, size: int) -> None:
        self.report.content_bytes += size
        if size > self._limits.entry_bytes or self.report.content_bytes > self._limits.total_bytes:
            raise PolicyRejected(
                f"{shown(path)} has {size} bytes, {self.report.content_bytes} with what came before; "
                f"{self._limits.entry_bytes} a file and {self._limits.total_bytes} in all are the limit. Send less."
            )
        info.size = size
        with open(f"/proc/self/fd/{handle}", "rb", buffering=0) as file:
            try:
                self.archive.addfile(info, file)
            except OSError as error:
                raise PolicyRejected(f"{shown(path)} changed while it was read: {error}. Try again.") from error
