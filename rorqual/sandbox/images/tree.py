"""Reads EROFS images without mounting them: what an ordinary user, a look into a layer and an export need.

Only the bytes that are asked for are read, through a function (offset, length) -> bytes that may verify and count them.
Every number in the image is checked before it is used: a damaged or hostile image ends in an error, never in a loop.
Left out: compressed images and the compact inodes of mkfs.erofs; layers written here have neither.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from rorqual.errors import SandboxError
from rorqual.sandbox.images import erofs
from rorqual.sandbox.images.erofs import BLOCK, CHUNKS, DIRENT, HOLE, INLINE, INODE, PLAIN, SUPERBLOCK, Attributes, Path

Read = Callable[[int, int], bytes]
_PIECE = 1 << 20
_PREFIXES = {number: prefix for prefix, number in erofs.PREFIXES.items()}


@dataclass(frozen=True)
class Entry:
    """One file of an image. number: the same for all names of one file; mode: with its kind; device: of S_IFCHR/BLK."""

    path: Path
    number: int
    mode: int
    attributes: Attributes
    size: int
    links: int
    layout: int
    start: int
    beside: int  # where in the image what lies beside the inode begins

    @property
    def device(self) -> int:
        """Number of a device file's device; of an overlayfs whiteout 0."""
        return os.makedev((self.start >> 8) & 0xFFF, (self.start & 0xFF) | ((self.start >> 12) & 0xFFF00))

    @property
    def is_whiteout(self) -> bool:
        """overlayfs's mark that the file of this name in the layers below is deleted."""
        return stat.S_ISCHR(self.mode) and self.start == 0

    @property
    def is_opaque(self) -> bool:
        """Whether what the layers below have in this folder is hidden."""
        return self.attributes.xattrs.get(erofs.OPAQUE) == b"y"


class Image:
    """One image. read: gives bytes of it; size: how many it has. Raises: SandboxError when it is none of ours."""

    def __init__(self, read: Read, size: int) -> None:
        self._read_any, self._size = read, size
        head = self._read(1024, SUPERBLOCK.size)
        fields = SUPERBLOCK.unpack(head)
        magic, block_bits, root, blocks, meta, incompatible = (fields[i] for i in (0, 3, 5, 9, 10, 14))
        if magic != erofs.MAGIC or block_bits != 12 or incompatible & ~erofs.FEATURE_CHUNKS or blocks * BLOCK > size:
            raise SandboxError(
                f"this is no layer written here (magic {magic:#x}, features {incompatible:#x}, {blocks} blocks in "
                f"{size} bytes). Import it from an OCI image or a tar archive instead."
            )
        self._meta, self._root, self.inodes = meta * BLOCK, root, fields[6]

    def entries(self) -> Iterator[Entry]:
        """Every file, folders before what they hold, names in byte order; the root first, as ()."""
        stack = [self._entry((), self._root)]
        left = self._size  # bytes of names; folders that share them would multiply
        folders: set[int] = set()
        while stack:
            entry = stack.pop()
            yield entry
            if not stat.S_ISDIR(entry.mode):
                continue
            if entry.number in folders:
                raise self._damaged(f"the folder {erofs._shown(entry.path)} lies in itself")
            folders.add(entry.number)
            left -= entry.size
            if left < 0:
                raise self._damaged("its folders have more names than bytes are there")
            below = [self._entry((*entry.path, name), number) for name, number in self._names(entry)]
            stack.extend(reversed(below))

    def find(self, path: Path) -> Entry | None:
        """The file under a path, reading no more than the folders on the way; symbolic links are not followed."""
        entry = self._entry((), self._root)
        for part in path:
            if not stat.S_ISDIR(entry.mode):
                return None
            number = dict(self._names(entry)).get(part)
            if number is None:
                return None
            entry = self._entry((*entry.path, part), number)
        return entry

    def content(self, entry: Entry) -> Iterator[bytes]:
        """A file's bytes (or a symbolic link's target) in pieces of up to 1 MiB."""
        for _, length, where in self.extents(entry):
            for begin in range(0, length, _PIECE):
                count = min(_PIECE, length - begin)
                yield bytes(count) if where is None else self._read(where + begin, count)

    def extents(self, entry: Entry) -> Iterator[tuple[int, int, int | None]]:
        """A file's content as (offset in the file, length, offset in the image or None for a hole)."""
        if entry.layout == CHUNKS:
            yield from self._chunk_extents(entry)
            return
        whole = entry.size if entry.layout == PLAIN else entry.size // BLOCK * BLOCK
        if whole:
            yield 0, whole, entry.start * BLOCK
        if entry.size > whole:
            yield whole, entry.size - whole, entry.beside

    def _chunk_extents(self, entry: Entry) -> Iterator[tuple[int, int, int | None]]:
        chunk = BLOCK << (entry.start & 0x1F)
        count = -(-entry.size // chunk)
        if entry.start & ~0x1F or chunk > 1 << 43 or count > 1 << 20:
            raise self._damaged(f"chunks of {erofs._shown(entry.path)} are kept in a way not written here")
        blocks = struct.unpack(f"<{count}I", self._read(entry.beside, 4 * count))
        for index, block in enumerate(blocks):
            offset = index * chunk
            yield offset, min(chunk, entry.size - offset), None if block == HOLE else block * BLOCK

    def target(self, entry: Entry) -> bytes:
        """Where a symbolic link points."""
        if entry.size >= BLOCK:
            raise self._damaged(f"the link {erofs._shown(entry.path)} is {entry.size} bytes long")
        return b"".join(self.content(entry))

    def _entry(self, path: Path, number: int) -> Entry:
        position = self._meta + number * 32
        fields = INODE.unpack(self._read(position, INODE.size))
        form, attributes_count, mode, _, size, start, _, uid, gid, seconds, nanoseconds, links = fields
        layout = form >> 1
        if not form & 1 or layout not in (PLAIN, INLINE, CHUNKS):
            raise self._damaged(f"{erofs._shown(path)} is kept in a way not written here (format {form})")
        length = erofs.XATTR_HEAD + 4 * (attributes_count - 1) if attributes_count else 0
        xattrs = self._xattrs(self._read(position + INODE.size, length)) if length else {}
        attributes = Attributes(mode & 0o7777, uid, gid, seconds * 10**9 + nanoseconds, xattrs)
        return Entry(path, number, mode, attributes, size, links, layout, start, position + INODE.size + length)

    def _xattrs(self, data: bytes) -> dict[str, bytes]:
        if data[4]:
            raise self._damaged("extended attributes are shared, which is not written here")
        found, at = {}, erofs.XATTR_HEAD
        while at + erofs.XATTR.size <= len(data):
            length, prefix, value = erofs.XATTR.unpack_from(data, at)
            name_at = at + erofs.XATTR.size
            if prefix not in _PREFIXES or name_at + length + value > len(data):
                raise self._damaged("an extended attribute runs over its end")
            name = (_PREFIXES[prefix] + data[name_at : name_at + length]).decode("utf-8", "surrogateescape")
            found[name] = data[name_at + length : name_at + length + value]
            at = -(-(name_at + length + value) // 4) * 4
        return found

    def _names(self, folder: Entry) -> Iterator[tuple[bytes, int]]:
        """Name and inode number of what a folder holds, without "." and ".."."""
        if folder.size > 256 << 20:
            raise self._damaged(f"the folder {erofs._shown(folder.path)} has {folder.size} bytes of names")
        data = b"".join(self.content(folder))
        for begin in range(0, len(data), BLOCK):
            block = data[begin : begin + BLOCK]
            count = DIRENT.unpack_from(block)[1] // DIRENT.size if len(block) >= DIRENT.size else 0
            if not 0 < count <= len(block) // DIRENT.size:
                raise self._damaged(f"the folder {erofs._shown(folder.path)} cannot be read")
            entries = [DIRENT.unpack_from(block, DIRENT.size * index) for index in range(count)]
            ends = [entry[1] for entry in entries[1:]] + [len(block)]
            for (number, offset, _, _), end in zip(entries, ends, strict=True):
                name = block[offset:end].rstrip(b"\0")
                if not 0 < len(name) <= 255 or b"/" in name or b"\0" in name:
                    raise self._damaged(f"the folder {erofs._shown(folder.path)} has a name that can't be")
                if name not in (b".", b".."):
                    yield name, number

    def _read(self, offset: int, length: int) -> bytes:
        if offset + length > self._size:
            raise self._damaged(f"bytes {offset} to {offset + length} of {self._size} are asked for")
        return self._read_any(offset, length)

    def _damaged(self, what: str) -> SandboxError:
        return SandboxError(
            f"the layer is damaged: {what}. Remove it (`rorqual sandbox image remove`) and make it again."
        )


def image_of(file: IO[bytes]) -> Image:
    """The image in an open file, which stays open as long as the image is used; nothing is verified."""
    descriptor = file.fileno()
    return Image(lambda offset, length: os.pread(descriptor, length, offset), os.fstat(descriptor).st_size)
