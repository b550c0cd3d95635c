"""The prefix tree in memory: which pages and window checkpoints belong to which beginning of a text.

One node a page of tokens (128), keyed by the tokens themselves, so a match is by equality and never by a hash alone.
Pages and window checkpoints live apart: a node keeps matching when its checkpoints are gone, and the tokens before it
are run again for the windows. What was used longest ago goes first, leaves before what they follow, a checkpoint before
a page of the same age; pages that a running sequence holds stay, since dropping them would free nothing. Source: radix
trees of SGLang; two lifetimes a node and projections by division as in its ShadowRadix.

T tokens of a page.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rorqual.model.page_table import PageTable
from rorqual.model.pages import PagePool

Tokens = NDArray[np.int32]

MOST_ROOTS = 4096
"""Scopes whose beginnings are kept although nothing may be stored behind them any more."""

REMEMBERED = 65536
"""Keys of evicted pages that are remembered, to tell "evicted" from "never stored"."""


def chain_key(parent: bytes, block: bytes) -> bytes:
    """Names a page by all tokens up to its end: the key of the page before, and this page's token ids."""
    return hashlib.blake2b(parent + block, digest_size=16).digest()


@dataclass(eq=False)
class Point:
    """A window checkpoint after `position` tokens; `tail` are the ids behind the last full page.

    hidden: the final hidden state [D] of the last token, from which the next token's logits follow; or None.
    """

    node: Node
    tail: bytes
    position: int
    content: Tensor
    hidden: Tensor | None = None
    tick: int = 0

    @property
    def nbytes(self) -> int:
        return self.content.nbytes + (0 if self.hidden is None else self.hidden.nbytes)


@dataclass(eq=False, slots=True)
class Node:
    """One page of tokens behind its parent's; the root has none."""

    parent: Node | None
    block: bytes
    key: bytes
    depth: int
    """Pages from the root, this one included."""
    page: int = -1
    tick: int = 0
    is_alive: bool = True
    children: dict[bytes, Node] = field(default_factory=dict)
    points: dict[bytes, Point] = field(default_factory=dict)


@dataclass
class Hit:
    """What a prompt shares with the tree: the nodes of its full pages, and the checkpoints on the way that fit."""

    nodes: list[Node]
    points: list[Point]
    """Shortest first."""

    def best(self) -> Point | None:
        return self.points[-1] if self.points else None


class PrefixTree:
    """Pages and checkpoints of at most `budget` bytes; `root_key` is the fingerprint that all keys begin from."""

    def __init__(self, pool: PagePool, budget: int, root_key: bytes = b"") -> None:
        self.pool, self.budget = pool, budget
        self._page_cost = max(pool.page_bytes, 4 * pool.page_tokens)  # a model without entries has ids at least
        self.root = Node(None, b"", root_key, 0)
        self._roots: dict[str, Node] = {"": self.root}
        self.page_bytes = self.point_bytes = 0
        self.evicted_pages = self.evicted_points = 0
        self._nodes: OrderedDict[Node, None] = OrderedDict()  # a child always stands before its parent
        self._points: OrderedDict[Point, None] = OrderedDict()
        self._forgotten: OrderedDict[bytes, None] = OrderedDict()
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """Bytes of pages and checkpoints held."""
        return self.page_bytes + self.point_bytes

    def __len__(self) -> int:
        return len(self._nodes)

    def root_of(self, scope: str) -> Node:
        """Where the texts of `scope` begin; scopes share nothing, here and on disk."""
        root = self._roots.get(scope)
        if root is None:
            if len(self._roots) >= MOST_ROOTS:  # those that hold nothing are made again when they are asked for
                self._roots = {s: r for s, r in self._roots.items() if not s or r.children or r.points}
            root = self._roots[scope] = Node(None, b"", chain_key(self.root.key, b"scope" + scope.encode()), 0)
        return root

    def match(self, tokens: Tokens, root: Node | None = None) -> Hit:
        """The longest stored beginning of `tokens` int32 [n], in full pages, and the checkpoints that fit it.

        root: of another scope than the common one.
        """
        data, width = tokens.tobytes(), 4 * self.pool.page_tokens
        node, at = root or self.root, 0
        nodes: list[Node] = []
        points: list[Point] = []
        while True:
            if node.points:
                fitting = [point for tail, point in node.points.items() if data.startswith(tail, at)]
                points += sorted(fitting, key=lambda point: point.position)
            child = _child(node, data, at, width)
            if child is None:
                return Hit(nodes, points)
            nodes.append(child)
            node, at = child, at + width

    def touch(self, node: Node, point: Point | None = None) -> None:
        """Note that these were used now: a node with everything before it."""
        self._clock += 1
        walk: Node | None = node
        while walk is not None and walk.parent is not None:
            walk.tick = self._clock
            self._nodes.move_to_end(walk)  # towards the root, so that parents stay behind their children
            walk = walk.parent
        if point is not None and point in self._points:
            point.tick = self._clock
            self._points.move_to_end(point)

    def table(self, nodes: list[Node]) -> PageTable:
        """The pages of these nodes for a sequence, which shares them from now on."""
        pages = [node.page for node in nodes]
        self.pool.retain(pages)
        return PageTable(self.pool, pages)

    def insert(
        self, node: Node, blocks: Sequence[bytes], pages: Sequence[int], keys: Sequence[bytes] = ()
    ) -> list[Node]:
        """The nodes behind `node` for more pages of tokens, one behind the other, made if need be; those made share
        `pages`. Call `touch` with the last of them. `keys`: their chain keys, where they are known.
        """
        out: list[Node] = []
        shared: list[int] = []
        for i, (block, page) in enumerate(zip(blocks, pages, strict=True)):
            child = node.children.get(block)
            if child is None:
                key = keys[i] if keys else chain_key(node.key, block)
                child = node.children[block] = Node(node, block, key, node.depth + 1, page)
                self._nodes[child] = None
                if self._forgotten:
                    self._forgotten.pop(key, None)
                shared.append(page)
            out.append(child)
            node = child
        self.pool.keep(shared)
        self.page_bytes += len(shared) * self._page_cost
        return out

    def add_point(self, node: Node, tail: bytes, content: Tensor, hidden: Tensor | None = None) -> Point:
        """Keep a window checkpoint at `tail` behind `node`, instead of one that was there."""
        old = node.points.get(tail)
        if old is not None:
            hidden = old.hidden if hidden is None else hidden
            self._drop_point(old)
        point = Point(node, tail, node.depth * self.pool.page_tokens + len(tail) // 4, content, hidden)
        node.points[tail] = point
        self._points[point] = None
        self.point_bytes += point.nbytes
        self.touch(node, point)
        return point

    def was_evicted(self, key: bytes) -> bool:
        """Whether a page of this key was here and had to go."""
        return key in self._forgotten

    def shrink(self) -> None:
        """Evict down to the budget."""
        if self.nbytes <= self.budget:
            return
        leaves = self._droppable()
        leaf = next(leaves, None)
        while self.nbytes > self.budget:
            point = next(iter(self._points), None)
            if point is not None and (leaf is None or point.tick <= leaf.tick):
                self._drop_point(point)
                self.evicted_points += 1
            elif leaf is not None:
                self._drop(leaf)
                leaf = next(leaves, None)
            else:
                return  # running sequences hold the rest

    def free_pages(self, count: int) -> None:
        """Give at least `count` pages back to the pool, as far as no running sequence holds them."""
        for leaf in self._droppable():
            if count <= 0:
                return
            self._drop(leaf)
            count -= 1

    def clear(self) -> None:
        """Forget everything; running sequences keep what they share."""
        for point in list(self._points):
            self._drop_point(point)
        for node in list(self._nodes):
            self._drop(node)
        self._forgotten.clear()

    def _droppable(self) -> Iterator[Node]:
        """Nodes that are leaves when their turn comes and whose page nobody else uses, oldest first."""
        for node in list(self._nodes):
            if not node.children and self.pool.count(node.page) == 1:
                yield node

    def _drop(self, node: Node) -> None:
        for point in list(node.points.values()):
            self._drop_point(point)
        assert node.parent is not None and not node.children
        del node.parent.children[node.block]
        del self._nodes[node]
        node.is_alive = False
        self.pool.drop(node.page)
        self.page_bytes -= self._page_cost
        self.evicted_pages += 1
        self._forgotten[node.key] = None
        if len(self._forgotten) > REMEMBERED:
            self._forgotten.popitem(last=False)

    def _drop_point(self, point: Point) -> None:
        del point.node.points[point.tail]
        del self._points[point]
        self.point_bytes -= point.nbytes


def _child(node: Node, data: bytes, at: int, width: int) -> Node | None:
    """The child of `node` that the `width` bytes of `data` from `at` on name."""
    if len(node.children) != 1:
        return node.children.get(data[at : at + width])
    [child] = node.children.values()  # in the midst of a long text: comparing costs less than hashing
    return child if data.startswith(child.block, at) else None
