"""Reads tar archives from a stream under limits, each checked before the bytes it is about are used.

The archive is hostile: its compression may explode, its headers may lie about sizes, its names may point anywhere. So
nothing of it is held in memory but one header and one piece, and nothing leaves here without having been counted.
Understood: ustar, pax and GNU long names; plain, gzip, bzip2 and xz. Refused: sparse members, archives in archives.

Source: docs/sandbox.md on files and archives; POSIX.1-2017 `pax` for the formats.
"""

from __future__ import annotations

import bz2
import lzma
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from rorqual.sandbox.errors import PolicyRejected
from rorqual.sandbox.images.beneath import Path, check_parts, shown

_BLOCK, _PIECE = 512, 256 << 10
_FREE_BYTES = 1 << 20
_HEADER_BYTES = 1 << 20
_TYPES = {b"0": stat.S_IFREG, b"\0": stat.S_IFREG, b"7": stat.S_IFREG, b"1": 0, b"2": stat.S_IFLNK, b"3": stat.S_IFCHR}
_TYPES |= {b"4": stat.S_IFBLK, b"5": stat.S_IFDIR, b"6": stat.S_IFIFO}
HARD_LINK = 0


@dataclass(frozen=True)
class ArchiveLimits:
    """Bounds for one archive; sizes in bytes, as unpacked. ratio: unpacked to packed, after the first MiB."""

    entries: int = 50_000
    total_bytes: int = 1 << 30
    entry_bytes: int = 256 << 20
    ratio: int = 100
    path_bytes: int = 4096
    depth: int = 64
    seconds: float = 300.0


@dataclass(frozen=True)
class Member:
    """One file of an archive. kind: its S_IF… value, or HARD_LINK; mode: permissions with set-id bits."""

    path: Path
    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)


class _Decompressor(Protocol):
    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


class Reader:
    """The members of one archive, in order, each with its content.

    file: anything with `read`. Raises (while reading): PolicyRejected, saying which limit and how far it went.
    """

    def __init__(self, file: BinaryIO, limits: ArchiveLimits | None = None) -> None:
        self.limits = limits or ArchiveLimits()
        self.entries = self.content_bytes = self._headers = 0
        self._source = _Plain(file, self.limits)
        self._left = 0  # of the content of the current member, with its padding

    def __iter__(self) -> Iterator[tuple[Member, Iterator[bytes]]]:
        """Each member and its content, which is skipped when it is not read before the next one."""
        common: dict[bytes, bytes] = {}
        extra: dict[bytes, bytes] = {}
        while header := self._header():
            kind = header[156:157]
            if kind in b"xgLK" and kind:
                self._headers += 1
                if self._headers > 2 * self.limits.entries:  # or an archive of nothing but these would be free
                    raise PolicyRejected(f"the archive has more than {2 * self.limits.entries} extended headers.")
                text = self._text(_number(header[124:136]))
                if kind == b"g":
                    common |= _pax(text)
                elif kind == b"x":
                    extra |= _pax(text)
                else:
                    extra[b"path" if kind == b"L" else b"linkpath"] = text.rstrip(b"\0")
                continue
            member = self._member(header, common | extra)
            extra = {}
            self._left = -(-member.size // _BLOCK) * _BLOCK
            yield member, self._content(member)
            while self._left:
                self._left -= len(self._source.read(min(self._left, _PIECE)))

    def _header(self) -> bytes:
        """The next header block, or nothing at the end mark."""
        block = self._source.read(_BLOCK)
        if not block.strip(b"\0"):
            self._source.finish()
            return b""
        told = block[148:156].split(b"\0")[0].strip()
        total = sum(block[:148]) + 8 * 32 + sum(block[156:])
        if not told or told.strip(b"01234567") or int(told, 8) != total:
            raise PolicyRejected(
                f"entry {self.entries + 1} of the archive has no valid tar header: it is damaged, or no tar archive "
                "(one packed twice is not unpacked twice). Make it with `tar -c`, with -z, -j or -J if need be."
            )
        return block

    def _member(self, header: bytes, extra: dict[bytes, bytes]) -> Member:
        self._count_entry()
        kind = _TYPES.get(header[156:157])
        name = header[:100].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
            name = prefix + b"/" + name
        path = self._path(extra.get(b"path", name))
        if kind is None or any(key.startswith(b"GNU.sparse") for key in extra):
            raise PolicyRejected(
                f"{shown(path)} is of a kind not taken (tar type {header[156:157]!r}, or sparse). Make the archive "
                "without --sparse, of plain files, folders and links."
            )
        told = _decimal(extra[b"size"]) if b"size" in extra else _number(header[124:136])
        size = told if kind == stat.S_IFREG else 0
        if told and kind not in (stat.S_IFREG, stat.S_IFDIR, HARD_LINK):
            raise PolicyRejected(f"{shown(path)} has content, which its kind cannot have. Make the archive again.")
        self._count_content(path, size)
        mtime = float(extra[b"mtime"]) if b"mtime" in extra else float(_number(header[136:148]))
        return Member(
            path, kind, _number(header[100:108]) & 0o7777,
            _decimal(extra[b"uid"]) if b"uid" in extra else _number(header[108:116]),
            _decimal(extra[b"gid"]) if b"gid" in extra else _number(header[116:124]),
            int(min(max(mtime, 0.0), 1e11) * 1e9), size, extra.get(b"linkpath", header[157:257].split(b"\0")[0]),
            (_number(header[329:337]), _number(header[337:345])), _xattrs(extra),
        )  # fmt: skip

    def _path(self, name: bytes) -> Path:
        if name.startswith(b"/"):
            raise PolicyRejected(f"the archive has the absolute path {shown((name,))}. Make it with relative ones.")
        path = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
        if len(name) > self.limits.path_bytes or len(path) > self.limits.depth:
            raise PolicyRejected(
                f"a path of {len(name)} bytes and {len(path)} parts in the archive; {self.limits.path_bytes} bytes and "
                f"{self.limits.depth} parts are the limit: {shown(path)}"
            )
        check_parts(path)
        return path

    def _content(self, member: Member) -> Iterator[bytes]:
        left = member.size
        while left:
            piece = self._source.read(min(left, _PIECE))
            left -= len(piece)
            self._left -= len(piece)
            yield piece

    def _text(self, size: int) -> bytes:
        if size > _HEADER_BYTES:
            raise PolicyRejected(f"a header of the archive has {size} bytes; {_HEADER_BYTES} are the limit.")
        text = self._source.read(size)
        self._source.read(-size % _BLOCK)
        return text

    def _count_entry(self) -> None:
        self.entries += 1
        if self.entries > self.limits.entries:
            raise PolicyRejected(f"the archive has more than {self.limits.entries} entries. Send it in parts.")

    def _count_content(self, path: Path, size: int) -> None:
        self.content_bytes += size
        if size > self.limits.entry_bytes or self.content_bytes > self.limits.total_bytes:
            raise PolicyRejected(
                f"{shown(path)} has {size} bytes, with which the archive has {self.content_bytes}; "
                f"{self.limits.entry_bytes} a file and {self.limits.total_bytes} in all are allowed. Send it in parts."
            )


class _Plain:
    """The archive's bytes after decompression, watched for ratio and time."""

    def __init__(self, file: BinaryIO, limits: ArchiveLimits) -> None:
        self._file, self._limits = file, limits
        self._deadline = time.monotonic() + limits.seconds
        self._packed = self._plain = 0
        first = b""
        while len(first) < 6 and (more := self._raw(6 - len(first))):
            first += more
        self._waiting, self._ready, self._at = first, b"", 0
        self._make = _decompressor_for(first)
        self._unpacker: Any = self._make() if self._make else None

    def read(self, count: int) -> bytes:
        """Exactly so many bytes. Raises: PolicyRejected at a limit or when the archive ends before."""
        parts = []
        while count:
            if self._at == len(self._ready) and not self._fill():
                raise PolicyRejected("the archive ends in the middle of a file. Send it again, whole.")
            part = self._ready[self._at : self._at + count]
            self._at += len(part)
            parts.append(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> None:
        """Take in what follows the end mark, so that a sender is not stopped in the middle; there may be no content."""
        end = self._plain + _FREE_BYTES
        while self._plain < end and self._fill():
            if self._ready.strip(b"\0"):
                return  # something else follows; it is none of ours

    def _fill(self) -> bool:
        """Have more bytes ready in place of those that were read; False at the end."""
        self._ready, self._at = b"", 0
        while not self._ready:
            if self._unpacker is None:
                self._ready, self._waiting = self._waiting or self._raw(_PIECE), b""
                self._plain += len(self._ready)
                return bool(self._ready)
            if not self._waiting and not getattr(self._unpacker, "unconsumed", b""):
                self._waiting = self._raw(_PIECE)
                if not self._waiting:
                    return False
            self._unpack()
        return True

    def _unpack(self) -> None:
        try:
            self._ready = self._unpacker.decompress(self._waiting, _PIECE)
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
            raise PolicyRejected(f"the archive's compression is damaged: {error}. Send it again.") from error
        self._waiting = self._unpacker.unused_data if self._unpacker.eof else b""
        if self._unpacker.eof:
            self._unpacker = self._make() if self._make else None  # the next part of a file in several
        self._plain += len(self._ready)
        if self._plain > _FREE_BYTES + self._limits.ratio * self._packed:
            raise PolicyRejected(
                f"{self._packed} bytes of the archive unpack to more than {self._plain}; beyond the first MiB "
                f"{self._limits.ratio} to 1 is the limit. Send it without compression if that is no mistake."
            )

    def _raw(self, count: int) -> bytes:
        if time.monotonic() > self._deadline:
            raise PolicyRejected(f"unpacking took longer than {self._limits.seconds:g} s. Send it in parts.")
        data = self._file.read(count)
        self._packed += len(data)
        return data


class _Gzip:
    """zlib with the face of the other two: what it was given and has not used yet it keeps itself."""

    def __init__(self) -> None:
        self._inner, self.unconsumed = zlib.decompressobj(wbits=31), b""

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        out = self._inner.decompress(self.unconsumed + data, max_length)
        self.unconsumed = self._inner.unconsumed_tail
        return out


class _Keeping:
    """bz2 and lzma, which keep what they have not used but tell it in another way."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def unconsumed(self) -> bool:
        return not self._inner.eof and not self._inner.needs_input

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return bytes(self._inner.decompress(data, max_length))


def _decompressor_for(first: bytes) -> Callable[[], Any] | None:
    if first.startswith(b"\x1f\x8b"):
        return _Gzip
    if first.startswith(b"BZh"):
        return lambda: _Keeping(bz2.BZ2Decompressor())
    if first.startswith(b"\xfd7zXZ"):
        return lambda: _Keeping(lzma.LZMADecompressor(memlimit=256 << 20))
    if first.startswith(b"\x28\xb5\x2f\xfd"):
        raise PolicyRejected("the archive is packed with zstd, which is not read here. Pack it with gzip or xz.")
    return None


def _number(text: bytes) -> int:
    """A number of a header: octal, or in base 256 where the first bit is set."""
    if text[:1] == b"\x80":
        return int.from_bytes(text[1:], "big")
    digits = text.split(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise PolicyRejected(f"a header of the archive has {text!r} for a number. It is damaged; send it again.")
    return int(digits or b"0", 8)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise PolicyRejected(f"a header of the archive has {text[:40]!r} for a number. It is damaged; send it again.")
    return int(text)


def _pax(text: bytes) -> dict[bytes, bytes]:
    """The records of a pax header: "length key=value\\n" each."""
    found: dict[bytes, bytes] = {}
    while text:
        length, _, _ = text.partition(b" ")
        count = int(length) if length.isdigit() and len(length) < 9 else 0
        record = text[len(length) + 1 : count]
        key, equals, value = record.partition(b"=")
        if count <= len(length) + 2 or count > len(text) or not equals or not value.endswith(b"\n"):
            raise PolicyRejected("a pax header of the archive cannot be read. It is damaged; send it again.")
        found[key] = value[:-1]
        text = text[count:]
    if not re.fullmatch(rb"-?\d{1,20}(\.\d*)?", found.get(b"mtime", b"0")):
        raise PolicyRejected(f"the archive has {found[b'mtime'][:40]!r} for a time. It is damaged; send it again.")
    return found


def _xattrs(extra: dict[bytes, bytes]) -> dict[str, bytes]:
    prefix = b"SCHILY.xattr."
    return {key[len(prefix) :].decode("utf-8", "replace"): extra[key] for key in extra if key.startswith(prefix)}
