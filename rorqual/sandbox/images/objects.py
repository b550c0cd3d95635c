"""Where layers lie: objects with names in any folder, read by ranges, counted, and verified by the chunk.

A layer's name is the SHA-256 over the list of its chunks' SHA-256, so one chunk can be checked without the others: a
flipped byte is refused with its place at the first read, on local disk, NFS or 3FS alike.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from rorqual.errors import SandboxError

CHUNK_BYTES = 256 << 10
"""As DSec's remote reads; large enough for a list of 4,096 per GiB, small enough for a shell's few pages."""


@dataclass
class Counters:
    """What went through one `Objects`: calls and bytes, each way."""

    reads: int = 0
    bytes_read: int = 0
    writes: int = 0
    bytes_written: int = 0


class Objects(Protocol):
    """A place for objects. Tests wrap one to inject delays, errors and damage."""

    counters: Counters

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Bytes of an object, fewer only at its end. Raises: FileNotFoundError."""

    def put(self, key: str, source: BinaryIO) -> None:
        """Store everything `source` still has under `key`, durably and at once: readers see all of it or nothing."""

    def stat(self, key: str) -> int | None:
        """Size in bytes, or None when there is no such object."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing when it is not there."""

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Names of the objects that begin so, in no order."""


class FolderObjects:
    """Objects as files of one folder, which several processes and machines may share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counters = folder, Counters()
        self._lock = threading.Lock()

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Bytes of an object, fewer only at its end. Raises: FileNotFoundError."""
        with open(self.folder / key, "rb") as file:
            data = os.pread(file.fileno(), length, offset)
            while 0 < len(data) < length and (more := os.pread(file.fileno(), length - len(data), offset + len(data))):
                data += more
        with self._lock:
            self.counters.reads += 1
            self.counters.bytes_read += len(data)
        return data

    def put(self, key: str, source: BinaryIO) -> None:
        """Store what `source` still has, durably and at once; one that is there is replaced. Raises: OSError."""
        with self.temporary() as file:
            while piece := source.read(1 << 20):
                file.write(piece)
            self.publish(file, key)

    @contextlib.contextmanager
    def temporary(self) -> Iterator[BinaryIO]:
        """A file in the same folder for `publish`; gone afterwards otherwise, and collectable when we are killed."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        while True:
            path = self.folder / "tmp" / os.urandom(12).hex()
            with open(path, "x+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # a collector removes only what nobody holds
                if os.fstat(file.fileno()).st_nlink == 0:
                    continue  # it came between the two lines above
                try:
                    yield file
                finally:
                    path.unlink(missing_ok=True)
                return

    @contextlib.contextmanager
    def locked(self, *, alone: bool) -> Iterator[None]:
        """Keep writers and the collector apart: writers together, the collector alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield

    def sweep_temporary(self, dry_run: bool = False) -> int:
        """Remove `temporary` files whose writers were killed; returns how many."""
        count = 0
        for path in (self.folder / "tmp").glob("*"):
            try:
                with open(path, "r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    count += 1
                    if not dry_run:
                        path.unlink(missing_ok=True)
            except (BlockingIOError, FileNotFoundError):
                continue
        return count

    def publish(self, file: BinaryIO, key: str) -> None:
        """Give a `temporary` file its name once its bytes are on the disk."""
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
        target = self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file.name, target)
        sync_folder(target.parent)
        with self._lock:
            self.counters.writes += 1
            self.counters.bytes_written += os.fstat(file.fileno()).st_size

    def stat(self, key: str) -> int | None:
        """Size in bytes, or None when there is no such object."""
        try:
            return (self.folder / key).stat().st_size
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> None:
        """Remove an object; nothing when it is not there."""
        (self.folder / key).unlink(missing_ok=True)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Names of the objects that begin so, in no order."""
        top = self.folder / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(top):
            for name in names:
                key = os.path.relpath(os.path.join(folder, name), self.folder)
                if key.startswith(prefix):
                    yield key

    def path(self, key: str) -> Path:
        """Where an object's file is, or would be."""
        return self.folder / key


@dataclass(frozen=True)
class Layer:
    """What a layer's manifest says: enough to verify any chunk of it against its name.

    kind: base, workspace, toolkit or diff. note: how it was made, for people.
    """

    digest: str
    size: int
    chunks: tuple[str, ...]
    kind: str = "diff"
    created: float = 0.0
    note: dict[str, str] = field(default_factory=dict)
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        if name_of(self.size, self.chunk_bytes, self.chunks) != self.digest:
            raise SandboxError(
                f"the manifest of layer {self.digest[:12]} does not belong to it: its chunks give another name. "
                "Restore it from a copy, or remove the layer and make it again."
            )

    @classmethod
    def made(cls, size: int, chunks: list[str], kind: str, created: float, note: dict[str, str]) -> Layer:
        """The manifest of a layer just written."""
        return cls(name_of(size, CHUNK_BYTES, chunks), size, tuple(chunks), kind, created, note)


def name_of(size: int, chunk_bytes: int, chunks: tuple[str, ...] | list[str]) -> str:
    """The name of a layer from its size and its chunks' SHA-256."""
    whole = hashlib.sha256(b"rorqual layer 1\n" + struct.pack("<QQ", size, chunk_bytes))
    for chunk in chunks:
        whole.update(bytes.fromhex(chunk))
    return whole.hexdigest()


def chunks_of(file: BinaryIO) -> tuple[int, list[str]]:
    """Size and chunk digests of a file, from its beginning."""
    file.seek(0)
    chunks, size = [], 0
    while piece := file.read(CHUNK_BYTES):
        chunks.append(hashlib.sha256(piece).hexdigest())
        size += len(piece)
    return size, chunks


class VerifiedReader:
    """Bytes of one layer, each chunk checked when it is first read and kept for a while.

    objects, key: where it lies; cache_chunks: how many chunks stay in memory.
    """

    def __init__(self, objects: Objects, key: str, layer: Layer, cache_chunks: int = 64) -> None:
        self._objects, self._key, self._layer, self._keep = objects, key, layer, cache_chunks
        self._cache: OrderedDict[int, bytes] = OrderedDict()

    def __call__(self, offset: int, length: int) -> bytes:
        """Raises: SandboxError naming the layer, the chunk and its bytes when they are not what they were."""
        size = self._layer.chunk_bytes
        first, last = offset // size, (offset + length - 1) // size
        if first == last:
            return self._chunk(first)[offset - first * size : offset - first * size + length]
        data = b"".join(self._chunk(index) for index in range(first, last + 1))
        return data[offset - first * size : offset - first * size + length]

    def verify(self) -> None:
        """Read and check every chunk."""
        for index in range(len(self._layer.chunks)):
            self._chunk(index, keep=False)

    def _chunk(self, index: int, keep: bool = True) -> bytes:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        if not 0 <= index < len(self._layer.chunks):
            return b""
        size = self._layer.chunk_bytes
        data = self._objects.get_range(self._key, index * size, size)
        if hashlib.sha256(data).hexdigest() != self._layer.chunks[index]:
            raise SandboxError(
                f"layer {self._layer.digest[:12]} is damaged: chunk {index} (bytes {index * size} to "
                f"{index * size + size}, of which {len(data)} were read) is not what was stored. It is not used; "
                "restore the object from a copy, or remove the layer and make it again."
            )
        if keep:
            self._cache[index] = data
            while len(self._cache) > self._keep:
                self._cache.popitem(last=False)
        return data


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
