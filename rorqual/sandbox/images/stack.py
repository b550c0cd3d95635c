"""Several layers seen as one tree: to pull them together, or to find what one tree has more than another.

Merging gives what overlayfs would show, with the deletions kept that may still hide something further down. The
difference of two trees is the layer that turns the first into the second.
"""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rorqual.sandbox.images import erofs
from rorqual.sandbox.images.erofs import Attributes, Path, Writer, chunk_bytes
from rorqual.sandbox.images.tree import Entry, Image

_PIECE = 1 << 20


@dataclass(frozen=True)
class Seen:
    """A file of a stack and the layer it comes from."""

    image: Image
    entry: Entry


def seen(layers: Sequence[Image]) -> dict[Path, Seen]:
    """What overlayfs shows of layers from the bottom up, folders before what they hold."""
    found: dict[Path, Seen] = {}
    for image in layers:
        for entry in image.entries():
            before = found.get(entry.path)
            is_folder = stat.S_ISDIR(entry.mode)
            if before is not None and stat.S_ISDIR(before.entry.mode) and (not is_folder or entry.is_opaque):
                count = len(entry.path)
                for path in [path for path in found if len(path) > count and path[:count] == entry.path]:
                    del found[path]
            if entry.is_whiteout:
                found.pop(entry.path, None)
            else:
                found[entry.path] = Seen(image, entry)
    return dict(sorted(found.items()))


def add_merged(writer: Writer, layers: Sequence[Image]) -> None:
    """Layers from the bottom up as one, which hides what the lowest of them hid from layers below it."""
    for image in layers:
        links: dict[int, Path] = {}
        for entry in image.entries():
            if entry.is_opaque:
                writer.clear(entry.path)
            add(writer, image, entry, links)


def add_difference(writer: Writer, lower: Sequence[Image], upper: Image) -> None:
    """The layer that, over `lower`, shows exactly `upper` (which has no marks of its own)."""
    before = seen(lower)
    links: dict[int, Path] = {}
    gone = dict(before)
    changed = _changed_links(before, upper)
    for entry in upper.entries():
        gone.pop(entry.path, None)
        old = before.get(entry.path)
        if entry.path in changed or old is None or not _same(old, Seen(upper, entry)):
            if old is not None and stat.S_ISDIR(old.entry.mode) != stat.S_ISDIR(entry.mode):
                gone = {path: file for path, file in gone.items() if path[: len(entry.path)] != entry.path}
            add(writer, upper, entry, links)
    for path in gone:
        if path[:-1] not in gone:
            writer.special(path, Attributes(0), stat.S_IFCHR)


def _changed_links(before: dict[Path, Seen], upper: Image) -> set[Path]:
    """Files of several names of which any changed: they go into the layer with all their names or not at all."""
    old: dict[tuple[int, int], list[Seen]] = defaultdict(list)
    new: dict[int, list[Entry]] = defaultdict(list)
    for file in before.values():
        if file.entry.links > 1 and not stat.S_ISDIR(file.entry.mode):
            old[id(file.image), file.entry.number].append(file)
    for entry in upper.entries():
        if entry.links > 1 and not stat.S_ISDIR(entry.mode):
            new[entry.number].append(entry)
    number = {entry.path: entry.number for names in new.values() for entry in names}
    kept: set[Path] = set()
    for files in old.values():
        paths = {file.entry.path for file in files}
        now = new.get(number.get(files[0].entry.path, -1), [])
        if {entry.path for entry in now} == paths and all(
            _same(before[entry.path], Seen(upper, entry)) for entry in now
        ):
            kept |= paths
    return {entry.path for names in new.values() for entry in names} - kept


def add(writer: Writer, image: Image, entry: Entry, links: dict[int, Path]) -> None:
    """One file of an image as it is. links: where files with several names were put first, by their number."""
    if stat.S_ISDIR(entry.mode):
        writer.folder(entry.path, entry.attributes)
        return
    if entry.links > 1:
        first = links.setdefault(entry.number, entry.path)
        if first is not entry.path:
            writer.link(entry.path, first)
            return
    if stat.S_ISREG(entry.mode) and entry.layout == erofs.CHUNKS:
        writer.sparse(entry.path, entry.attributes, entry.size, _pieces(image, entry))
    elif stat.S_ISREG(entry.mode):
        writer.regular(entry.path, entry.attributes, image.content(entry))
    elif stat.S_ISLNK(entry.mode):
        writer.symlink(entry.path, entry.attributes, image.target(entry))
    else:
        writer.special(entry.path, entry.attributes, stat.S_IFMT(entry.mode), entry.device)


def _pieces(image: Image, entry: Entry) -> Iterable[tuple[int, bytes]]:
    """The chunks of a sparse file that are there; both images cut it into the same ones."""
    chunk = chunk_bytes(entry.size)
    for offset, length, where in image.extents(entry):
        assert offset % chunk == 0
        if where is not None:
            yield offset, b"".join(image.content(_part(entry, where, length)))


def _part(entry: Entry, where: int, length: int) -> Entry:
    return replace(entry, layout=erofs.PLAIN, start=where // erofs.BLOCK, size=length)


def _same(one: Seen, other: Seen) -> bool:
    """Whether nothing about a file differs but its number of names."""
    a, b = one.entry, other.entry
    if (a.mode, a.size, a.attributes) != (b.mode, b.size, b.attributes):
        return (
            a.mode == b.mode
            and stat.S_ISDIR(a.mode)
            and replace(a.attributes, mtime_ns=0) == replace(b.attributes, mtime_ns=0)
        )
    if stat.S_ISDIR(a.mode):
        return True
    if stat.S_ISREG(a.mode) or stat.S_ISLNK(a.mode):
        return _bytes_equal(one, other)
    return a.start == b.start


def _bytes_equal(one: Seen, other: Seen) -> bool:
    left, right = one.image.content(one.entry), other.image.content(other.entry)
    a = b = b""
    while True:
        a, b = a or next(left, b""), b or next(right, b"")
        count = min(len(a), len(b))
        if not count:
            return not a and not b
        if a[:count] != b[:count]:
            return False
        a, b = a[count:], b[count:]
