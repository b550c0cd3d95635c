"""Writes EROFS images: the read-only file system of the kernel that layers are kept in.

Written here and not by mkfs.erofs, so that an ordinary user can keep owners, deletions and attributes that he may not
give to files of his own, an archive becomes a layer without being unpacked, and the same files always give the same
bytes. File contents are written as they come, then folders, then inodes, the superblock last. No compression.

Source: the kernel's documentation and on-disk definitions of EROFS; checked by mounting and by fsck.erofs in the tests.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from rorqual.errors import SandboxError

BLOCK = 4096
MAGIC = 0xE0F5E1E2
SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
INODE = struct.Struct("<HHHHQIIIIQII16x")  # the extended form, 64 bytes
DIRENT = struct.Struct("<QHBB")
XATTR_HEAD, XATTR = 12, struct.Struct("<BBH")
PLAIN, INLINE, CHUNKS = 0, 2, 4
"""Data layouts: in blocks; in blocks with the last piece beside the inode; in chunks any of which may be a hole."""
HOLE = 0xFFFFFFFF
PREFIXES = {b"user.": 1, b"trusted.": 4, b"security.": 6}
FEATURE_MTIME, FEATURE_CHUNKS = 2, 4
OPAQUE = "user.overlay.opaque"
WHITEOUT_MODE = stat.S_IFCHR
_FIRST = 64  # no inode number 0: some programs take it for "no file"
_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFSOCK: 6}
_TYPES[stat.S_IFLNK] = 7
Path = tuple[bytes, ...]
"""A path inside an image by its parts; the root is ()."""


@dataclass(frozen=True)
class Attributes:
    """What a file has besides its content. mode: permissions alone; mtime_ns: since 1970."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)


@dataclass
class _Inode:
    mode: int
    attributes: Attributes
    size: int = 0
    start: int = 0  # first block, device number, or how chunks are kept
    layout: int = PLAIN
    tail: bytes = b""
    links: int = 1
    chunk_map: list[int] = field(default_factory=list)
    children: dict[bytes, _Inode] = field(default_factory=dict)
    parent: _Inode | None = None
    xattrs: bytes = b""
    position: int = -1
    blocks: list[list[bytes]] = field(default_factory=list)  # names, by the directory block they stand in

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_whiteout(self) -> bool:
        return stat.S_ISCHR(self.mode) and self.start == 0


class Writer:
    """One image. Add everything, then `finish`. What comes later under the same path takes the place of the earlier.

    file: empty, seekable, open for writing; block 0 is filled in last, so a torn image is never a valid one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._next_block = 1
        self._file.write(bytes(BLOCK))
        self._root = _new(stat.S_IFDIR, Attributes(0o755))
        self._chunked = False

    def folder(self, path: Path, attributes: Attributes) -> None:
        """A directory, kept with what it holds, and with what it hides, if it is there already."""
        before = self._at(path)
        if before is not None and (OPAQUE in before.attributes.xattrs or before.is_whiteout):
            attributes = replace(attributes, xattrs={**attributes.xattrs, OPAQUE: b"y"})
        if before is not None and before.is_folder:
            before.attributes, before.xattrs = attributes, _pack_xattrs(attributes.xattrs)
            before.mode = stat.S_IFDIR | attributes.mode & 0o7777
        else:
            self._place(path, _new(stat.S_IFDIR, attributes))

    def opaque(self, path: Path) -> None:
        """Hide what layers below have in a folder, which is made if it is not there."""
        before = self._at(path)
        attributes = before.attributes if before is not None and before.is_folder else Attributes(0o755)
        self.folder(path, replace(attributes, xattrs={**attributes.xattrs, OPAQUE: b"y"}))

    def regular(self, path: Path, attributes: Attributes, content: Iterable[bytes]) -> None:
        """A file with its content, in pieces of any size."""
        inode = _new(stat.S_IFREG, attributes)
        inode.start = self._next_block
        rest = b""
        for piece in content:
            inode.size += len(piece)
            rest = rest + piece if rest else piece
            whole = len(rest) // BLOCK * BLOCK
            self._blocks(rest[:whole])
            rest = rest[whole:]
        if rest and len(rest) <= BLOCK // 2 and INODE.size + len(inode.xattrs) + len(rest) <= BLOCK:
            inode.layout, inode.tail = INLINE, rest
        else:
            self._blocks(rest)
        self._place(path, inode)

    def sparse(self, path: Path, attributes: Attributes, size: int, pieces: Iterable[tuple[int, bytes]]) -> None:
        """A file of `size` bytes that is zero but for `pieces`, (offset, bytes) in order, each from a chunk's start.

        Chunks are `chunk_bytes(size)` long; a piece is one whole chunk, shorter only at the end of the file.
        """
        inode = _new(stat.S_IFREG, attributes)
        chunk = chunk_bytes(size)
        inode.size, inode.layout = size, CHUNKS
        inode.start = (chunk // BLOCK).bit_length() - 1
        inode.chunk_map = [HOLE] * -(-size // chunk)
        for offset, piece in pieces:
            inode.chunk_map[offset // chunk] = self._next_block
            self._blocks(piece)
        self._chunked = True
        self._place(path, inode)

    def symlink(self, path: Path, attributes: Attributes, target: bytes) -> None:
        """A symbolic link; the target is stored as it is and never followed."""
        if not 0 < len(target) < BLOCK:
            raise SandboxError(
                f"the symbolic link {_shown(path)} has a target of {len(target)} bytes; 1 to 4095 can be."
            )
        inode = _new(stat.S_IFLNK, attributes)
        inode.size = len(target)
        if INODE.size + len(inode.xattrs) + len(target) <= BLOCK:
            inode.layout, inode.tail = INLINE, target
        else:
            inode.start = self._next_block
            self._blocks(target)
        self._place(path, inode)

    def special(self, path: Path, attributes: Attributes, kind: int, device: int = 0) -> None:
        """A device, FIFO or socket; `kind` is its S_IF… value. S_IFCHR with device 0 is overlayfs's mark "deleted"."""
        inode = _new(kind, attributes)
        major, minor = os.major(device), os.minor(device)
        inode.start = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
        self._place(path, inode)

    def link(self, path: Path, existing: Path) -> None:
        """A second name of a file that is in the image. Raises: SandboxError when it is not, or is a folder."""
        inode = self._at(existing)
        if inode is None or inode.is_folder:
            raise SandboxError(
                f"{_shown(path)} is a hard link to {_shown(existing)}, which is no file of this layer. "
                "Make the archive again with both in it."
            )
        if self._at(path) is inode:
            return
        inode.links += 1
        self._place(path, inode)

    def clear(self, path: Path) -> None:
        """Forget what was added below a folder of the image; nothing when it is not there."""
        inode = self._at(path)
        if inode is not None and inode.is_folder:
            for child in inode.children.values():
                _forget(child)
            inode.children.clear()

    def finish(self) -> int:
        """Write folders, inodes and the superblock; returns the size in bytes."""
        inodes = list(_in_order(self._root))
        end = _FIRST
        for inode in inodes:
            end = self._lay_out(inode, end)
        meta_block = self._next_block + sum(len(_whole_blocks(inode)) for inode in inodes if inode.is_folder)
        for inode in inodes:
            if inode.is_folder:
                self._write_folder(inode)
        assert self._next_block == meta_block
        meta = bytearray(-(-end // BLOCK) * BLOCK)
        for number, inode in enumerate(inodes, 1):
            packed = _pack_inode(inode, number)
            meta[inode.position : inode.position + len(packed)] = packed
        self._blocks(bytes(meta))
        self._file.seek(0)
        self._file.write(bytes(1024) + self._superblock(len(inodes), meta_block))
        self._file.flush()
        return self._next_block * BLOCK

    def _superblock(self, inodes: int, meta_block: int) -> bytes:
        incompatible = FEATURE_CHUNKS if self._chunked else 0
        blocks, root = self._next_block, _FIRST // 32
        head = (MAGIC, 0, FEATURE_MTIME, 12, 0, root, inodes, 0, 0, blocks, meta_block, 0)
        return SUPERBLOCK.pack(*head, bytes(16), b"rorqual", incompatible, 0, 0, 0, 0, 0, 0, 0, 0)

    def _blocks(self, data: bytes) -> None:
        if data:
            self._file.write(data)
            self._file.write(bytes(-len(data) % BLOCK))
            self._next_block += -(-len(data) // BLOCK)

    def _at(self, path: Path) -> _Inode | None:
        inode: _Inode | None = self._root
        for part in path:
            inode = inode.children.get(part) if inode is not None else None
        return inode

    def _place(self, path: Path, inode: _Inode) -> None:
        if not path or any(not 0 < len(part) <= 255 or b"/" in part or part in (b".", b"..") for part in path):
            raise SandboxError(f"{_shown(path)} is no path that a layer can have.")
        folder = self._root
        for part in path[:-1]:
            below = folder.children.get(part)
            if below is None or not below.is_folder:
                below = _new(stat.S_IFDIR, Attributes(0o755))
                _put(folder, part, below)
            folder = below
        _put(folder, path[-1], inode)

    def _lay_out(self, inode: _Inode, end: int) -> int:
        """Choose the inode's place in the metadata; returns where the next one may begin."""
        if inode.position >= 0:
            return end
        size = INODE.size + len(inode.xattrs)
        if inode.is_folder:
            _split_folder(inode)
            last = inode.size % BLOCK
            if last and size + last <= BLOCK:
                inode.layout, inode.tail = INLINE, bytes(last)  # filled in when the children have numbers
        if inode.layout == INLINE and end % BLOCK + size + len(inode.tail) > BLOCK:
            end = -(-end // BLOCK) * BLOCK  # what lies beside an inode lies in one block with it
        inode.position = end
        return -(-(end + size + len(inode.tail) + 4 * len(inode.chunk_map)) // 64) * 64

    def _write_folder(self, inode: _Inode) -> None:
        packed = [_pack_dirents(inode, names) for names in inode.blocks]
        whole = len(_whole_blocks(inode))
        inode.start = self._next_block
        for data in packed[:whole]:
            self._blocks(data)
        if whole < len(packed):
            inode.tail = packed[-1]


def chunk_bytes(size: int) -> int:
    """How long the chunks of a sparse file are: a power of two from 64 KiB, for at most 65,536 of them."""
    return max(1 << 16, 1 << max(0, -(-size // 65536) - 1).bit_length())


def _new(kind: int, attributes: Attributes) -> _Inode:
    return _Inode(kind | (attributes.mode & 0o7777), attributes, xattrs=_pack_xattrs(attributes.xattrs))


def _put(folder: _Inode, name: bytes, inode: _Inode) -> None:
    before = folder.children.get(name)
    if before is not None and not (before.is_folder and inode.is_folder):
        _forget(before)
    folder.children[name] = inode


def _forget(inode: _Inode) -> None:
    inode.links -= 1
    for child in inode.children.values():
        _forget(child)


def _in_order(root: _Inode) -> Iterator[_Inode]:
    """Every inode once, a folder before what it holds, names in byte order; also tells children their folder."""
    root.parent = root
    seen: set[int] = set()
    stack = [root]
    while stack:
        inode = stack.pop()
        if id(inode) in seen:
            continue
        seen.add(id(inode))
        yield inode
        if inode.is_folder:
            names = sorted(inode.children, reverse=True)
            inode.children = {name: inode.children[name] for name in reversed(names)}
            folders = [child for child in inode.children.values() if child.is_folder]
            inode.links = 2 + len(folders)
            for child in folders:
                child.parent = inode
            stack.extend(inode.children[name] for name in names)


def _split_folder(inode: _Inode) -> None:
    """Share the sorted names out into directory blocks, each of which stands for itself, and set the size."""
    inode.blocks, used = [[]], 0
    for name in sorted([b".", b"..", *inode.children]):
        need = DIRENT.size + len(name)
        if used + need > BLOCK:
            inode.blocks.append([])
            used = 0
        inode.blocks[-1].append(name)
        used += need
    inode.size = (len(inode.blocks) - 1) * BLOCK + used


def _whole_blocks(inode: _Inode) -> list[list[bytes]]:
    """Directory blocks that do not lie beside the inode."""
    return inode.blocks[:-1] if inode.layout == INLINE else inode.blocks


def _pack_dirents(inode: _Inode, names: list[bytes]) -> bytes:
    offset, entries = DIRENT.size * len(names), []
    for name in names:
        target = inode if name == b"." else inode.parent if name == b".." else inode.children[name]
        assert target is not None
        entries.append(DIRENT.pack(target.position // 32, offset, _TYPES[stat.S_IFMT(target.mode)], 0))
        offset += len(name)
    return b"".join([*entries, *names])


def _pack_inode(inode: _Inode, number: int) -> bytes:
    seconds, nanoseconds = divmod(max(0, inode.attributes.mtime_ns), 10**9)
    attributes_count = (len(inode.xattrs) - XATTR_HEAD) // 4 + 1 if inode.xattrs else 0
    head = INODE.pack(
        1 | inode.layout << 1, attributes_count, inode.mode, 0, inode.size, inode.start, number,
        inode.attributes.uid, inode.attributes.gid, seconds, nanoseconds, inode.links,
    )  # fmt: skip
    chunks = struct.pack(f"<{len(inode.chunk_map)}I", *inode.chunk_map)
    return head + inode.xattrs + chunks + inode.tail


def _pack_xattrs(xattrs: dict[str, bytes]) -> bytes:
    """Inline extended attributes; namespaces that EROFS has no number for are left out (POSIX ACLs among them)."""
    entries = b""
    for name, value in sorted(xattrs.items()):
        prefix = next((prefix for prefix in PREFIXES if name.encode().startswith(prefix)), None)
        if prefix is None:
            continue
        rest = name.encode()[len(prefix) :]
        entry = XATTR.pack(len(rest), PREFIXES[prefix], len(value)) + rest + value
        entries += entry + bytes(-len(entry) % 4)
    if len(entries) > 64 << 10:
        raise SandboxError(f"extended attributes of {len(entries)} bytes on one file; a layer keeps up to 64 KiB.")
    return bytes(XATTR_HEAD) + entries if entries else b""


def _shown(path: Path) -> str:
    return repr(b"/".join(path).decode("utf-8", "backslashreplace"))
