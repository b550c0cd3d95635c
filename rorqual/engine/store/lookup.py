"""Finding a prompt's beginning in memory and on disk, bringing it into memory, and saying why it ends where it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from torch import Tensor

from rorqual.engine.store.disk import DiskStore
from rorqual.engine.store.explain import Reason
from rorqual.engine.store.stored import Stored
from rorqual.engine.store.tree import Hit, Node, Point, PrefixTree, Tokens, chain_key
from rorqual.errors import CacheError
from rorqual.model.page_table import PageTable

LOAD_BYTES = 64 << 20
"""Pages from disk are brought in by so much at a time."""

COMPARED = 256
"""Stored continuations that are compared to say where a prompt departs from them."""


@dataclass
class Found:
    """What there is for a prompt, and the best place to go on from."""

    hit: Hit
    table: PageTable
    """The pages in memory, held so that nothing evicts them meanwhile."""
    stored: list[Stored]
    """Pages on disk behind those in memory."""
    point: Point | Stored | None = None
    restored_at: int = 0
    num_pages: int = 0
    """Pages to take over; 0 without a point means that nothing is worth taking."""
    is_exact: bool = False
    """The whole prompt is there with its last hidden state."""


@dataclass(frozen=True)
class Departure:
    """Where and why a match ends."""

    reason: Reason
    position: int | None = None
    stored: int | None = None
    asked: int | None = None


class Lookup:
    """One prompt's search, from `root` on.

    replay_tokens: how many tokens restore a window where no checkpoint stands.
    """

    def __init__(self, tree: PrefixTree, disk: DiskStore | None, ids: Tokens, replay_tokens: int, root: Node) -> None:
        self.tree, self.disk, self.ids, self.root = tree, disk, ids, root
        self.replay_tokens = replay_tokens
        self.disk_pages = self.bytes_read = 0
        self.from_disk: Point | None = None
        self.trouble: Reason | None = None
        self._data = ids.tobytes()
        self._size = tree.pool.page_tokens
        self._held: list[PageTable] = []

    def run(self) -> Found:
        """Everything that can be used, in memory."""
        while True:  # anew when something turned out not to be had
            found = self._find()
            missing = found.num_pages - len(found.hit.nodes)
            if missing > 0 and not self._load(found, found.stored[:missing]):
                continue
            if isinstance(found.point, Stored) and not self._load_point(found, found.point):
                continue
            return found

    def _find(self) -> Found:
        hit, size, total = self.tree.match(self.ids, self.root), self._size, len(self.ids)
        found = Found(hit, self.tree.table(hit.nodes), [*self._pages_on_disk(hit)])
        points: list[Point | Stored] = [*hit.points, *self._points_on_disk(found)]
        for point in points:
            if isinstance(point, Point):
                position, has_hidden = point.position, point.hidden is not None
            else:
                position, has_hidden = point.header.position, point.header.hidden_bytes > 0
            if found.restored_at < position <= (total if has_hidden else total - 1):
                found.point, found.restored_at = point, position
        found.is_exact = found.restored_at == total
        pages = len(hit.nodes) + len(found.stored)
        found.num_pages = min(pages, (total if found.is_exact else total - 1) // size)
        if found.num_pages * size - self.replay_tokens > found.restored_at:
            found.point, found.restored_at = None, 0
        elif found.point is None:
            found.num_pages = 0
        return found

    def _pages_on_disk(self, hit: Hit) -> Iterator[Stored]:
        """Pages on disk that go on where memory ends."""
        key = hit.nodes[-1].key if hit.nodes else self.root.key
        first, end = len(hit.nodes), len(self.ids) // self._size if self.disk is not None else 0
        for at in range(first, end):
            page = self.disk.find_next(key, self._block(at)) if self.disk is not None else None
            if page is None:
                return
            if at == first and self.disk is not None:
                self.disk.expect(page, end - first)
            yield page
            key = page.header.key

    def _points_on_disk(self, found: Found) -> Iterator[Stored]:
        """Checkpoints on disk that fit the prompt."""
        if self.disk is None:
            return
        keys = [self.root.key, *(n.key for n in found.hit.nodes), *(s.header.key for s in found.stored)]
        for depth, key in enumerate(keys):
            for point in self.disk.find_points(key):
                begin, tail = 4 * self._size * depth, point.header.tokens
                if self._data[begin : begin + len(tail)] == tail:
                    yield point

    def _load(self, found: Found, stored: list[Stored]) -> bool:
        """Read pages into the tree; False when some cannot be had, which are given up."""
        assert self.disk is not None
        pool = self.tree.pool
        node = found.hit.nodes[-1] if found.hit.nodes else self.root
        step = max(1, LOAD_BYTES // max(1, pool.page_bytes))
        for at in range(0, len(stored), step):
            part = stored[at : at + step]
            try:
                table = PageTable(pool, pool.take(len(part)))
            except CacheError:
                self.disk, self.trouble = None, "pool full"
                return False
            self._held.append(table)  # so that what comes next does not evict it
            pages = table.pages

            def sink(first: int, content: Tensor, pages: tuple[int, ...] = pages) -> None:
                pool.write(pages[first : first + len(content)], content)

            part = [*takewhile(lambda one: one.header.content_bytes == pool.page_bytes, part)]
            done = self.disk.read_pages(part, sink)
            headers = [one.header for one in part[:done]]
            nodes = self.tree.insert(node, [h.tokens for h in headers], pages[:done], [h.key for h in headers])
            found.hit.nodes += nodes
            node = nodes[-1] if nodes else node
            self.tree.touch(node)
            self.disk_pages += done
            self.bytes_read += done * pool.page_bytes
            if done < len(pages):
                self.trouble = _trouble(part[done : done + 1])
                return False
        found.table = self.tree.table(found.hit.nodes)
        del found.stored[: len(stored)]
        return True

    def _load_point(self, found: Found, point: Stored) -> bool:
        assert self.disk is not None
        loaded = self.disk.read_point(point)
        if loaded is None:
            self.trouble = _trouble([point])
            return False
        depth = point.header.position // self._size
        node = found.hit.nodes[depth - 1] if depth else self.root
        found.point = self.from_disk = self.tree.add_point(node, point.header.tokens, *loaded)
        self.bytes_read += self.from_disk.nbytes
        return True

    def _block(self, page: int) -> bytes:
        return self._data[4 * self._size * page : 4 * self._size * (page + 1)]

    # Why

    def departure(self, found: Found) -> Departure:
        """Why no more of the prompt was used."""
        size, depth = self._size, len(found.hit.nodes)
        if found.is_exact:
            return Departure("exact repeat")
        if self.trouble is not None:
            return Departure(self.trouble)
        if depth and not found.num_pages and found.point is None:
            return Departure("window missing")
        node = found.hit.nodes[-1] if depth else self.root
        rest = self.ids[depth * size :]
        if len(rest) >= size and self.tree.was_evicted(chain_key(node.key, self._block(depth))):
            return Departure("evicted")
        common, other = self._nearest(node, rest)
        position = depth * size + common
        if common == len(rest):
            return Departure("whole prompt" if depth else "below grain")
        if other is not None:
            reason: Reason = "different token" if position else "first token"
            return Departure(reason, position, other, int(rest[common]))
        if position == 0:
            return Departure("never stored")
        return Departure("below grain" if len(rest) < size else "end of stored text")

    def _nearest(self, node: Node, rest: Tokens) -> tuple[int, int | None]:
        """How far a stored continuation agrees with the prompt's rest at most, and the token after that there."""
        best, after = 0, None
        blocks = [*node.children, *node.points]
        if self.disk is not None:
            blocks += [one.header.tokens for one in self.disk.find_children(node.key)]
        for block in blocks[:COMPARED]:
            other = np.frombuffer(block, dtype=np.int32)
            count = min(len(other), len(rest))
            differs = np.flatnonzero(other[:count] != rest[:count])
            common = int(differs[0]) if len(differs) else count
            if common > best or after is None:
                best, after = max(best, common), int(other[common]) if common < len(other) else after
        return best, after


def _trouble(lost: Sequence[Stored]) -> Reason:
    """Why the first of these could not be read: its file was deleted for room meanwhile, or it is damaged."""
    return "evicted" if any(one.segment.fd < 0 for one in lost) else "damaged on disk"
