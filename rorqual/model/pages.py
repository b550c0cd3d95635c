"""Pages: memory for compressed entries and index keys that sequences can share.

A page stands for 128 consecutive tokens of one sequence and holds what those tokens complete in every layer: 32 entries
and 32 index keys in a CSA layer (ratio 4), one entry in an HCA layer (ratio 128). One page id names the same tokens in
all layers, so a sequence needs one list of ids, and sharing a prefix means sharing ids. Pages are counted: a page with
one user may be written, a page with more is copied first. Source: V4 report section 3.5, whose blocks cover a multiple
of lcm(m, m') tokens.

    part        one tensor a layer and kind: [pages, rows, K]
    entry i     row i % rows of page table[i // rows]

P pages, R rows of a page, K width of a row, C entries of a sequence.
"""

import heapq
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.errors import CacheError
from rorqual.model.cache_format import row_of
from rorqual.model.page_memory import populate, reserve
from rorqual.ops import page_rows

PAGE_TOKENS = 128
"""Tokens of a page, unless a layer's ratio does not divide them."""


@dataclass(frozen=True)
class Part:
    """What a page holds of one layer: `rows` rows of `width` numbers, one a block of `ratio` tokens."""

    layer: int
    name: str
    """`entries` or `index_keys`, as in `LayerState`."""
    ratio: int
    rows: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of this part in one page."""
        return self.rows * self.width * self.dtype.itemsize


def tokens_per_page(cfg: ModelConfig) -> int:
    """Tokens of a page: 128, or the next number that every layer's ratio divides."""
    return math.lcm(PAGE_TOKENS, *(spec.compress_ratio for spec in cfg.layers if spec.compress_ratio))


def page_parts(cfg: ModelConfig, dtype: torch.dtype, num_tokens: int | None = None) -> tuple[Part, ...]:
    """What a page of `num_tokens` tokens holds, layer by layer. Raises CacheError when a ratio does not divide them."""
    tokens = tokens_per_page(cfg) if num_tokens is None else num_tokens
    parts = []
    for spec in cfg.layers:
        ratio = spec.compress_ratio
        if not ratio:
            continue
        if tokens < 1 or tokens % ratio:
            raise CacheError(
                f"A page of {tokens} tokens cannot hold layer {spec.index}, whose entries cover {ratio} tokens each: "
                f"an entry would lie in two pages. Use a multiple of {ratio}, or no size at all."
            )
        for name in ("entries", "index_keys") if spec.has_indexer else ("entries",):
            parts.append(Part(spec.index, name, ratio, tokens // ratio, *row_of(cfg, name, dtype)))
    return tuple(parts)


class PagePool:
    """The pages of one model: a tensor a part, a free list and a reference count a page.

    like: a tensor with the dtype and device of the entries (`Transformer.reference`).
    num_tokens: how many tokens all pages together hold, rounded up to whole pages. The memory is reserved at once, but
    the system hands out what is touched only, and low ids are used first.
    page_tokens: tokens a page, 128 unless a ratio does not divide it; other sizes are for tests.

    `make_room(count)`, when set, is asked to release pages before `take` gives up. Safe to use from several threads.
    Raises CacheError for a page size that does not fit the model, or fewer than one page.
    """

    def __init__(self, cfg: ModelConfig, like: Tensor, num_tokens: int, page_tokens: int | None = None) -> None:
        self.parts = page_parts(cfg, like.dtype, page_tokens)
        self.page_tokens = tokens_per_page(cfg) if page_tokens is None else page_tokens
        self.num_pages = -(-num_tokens // self.page_tokens)
        if self.num_pages < 1:
            raise CacheError(
                f"A pool for {num_tokens} tokens has no page, so no sequence could use it. Give it at least "
                f"{self.page_tokens} tokens."
            )
        self.device = like.device
        self.make_room: Callable[[int], None] | None = None
        with torch.inference_mode(False):  # usable in and out of inference mode
            reserved = {
                (part.layer, part.name): reserve((self.num_pages, part.rows, part.width), part.dtype, like.device)
                for part in self.parts
            }
        self._tensors = {name: tensor for name, (tensor, _) in reserved.items()}
        self._memories = {name: memory for name, (_, memory) in reserved.items()}
        self._counts = np.zeros(self.num_pages, dtype=np.int32)
        self._kept = np.zeros(self.num_pages, dtype=np.int32)  # 1: one of its users is a store, for later sequences
        self._num_idle = 0  # pages whose only user is a store
        self._fresh = 0  # pages from here on were never used
        self._freed: list[int] = []  # a heap: low ids first, so that runs of ids stay together
        self._leaving: deque[Iterable[int]] = deque()  # released, not yet counted: see `release`
        self._lock = threading.Lock()

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers together."""
        return sum(part.nbytes for part in self.parts)

    def prepare(self, num_bytes: int) -> None:
        """Let the system bring the memory of the pages that are used first, so that the first to need them does not
        wait for it. Does nothing where it cannot be asked for that.
        """
        pages = min(self.num_pages, num_bytes // max(1, self.page_bytes))
        for part in self.parts:
            memory = self._memories[part.layer, part.name]
            if memory is not None:
                populate(memory, pages * part.nbytes)

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        self._settle()
        return len(self._freed) + self.num_pages - self._fresh

    def tensor(self, layer: int, name: str) -> Tensor:
        """The pages of one part: [pages, rows, K]."""
        return self._tensors[layer, name]

    @property
    def num_in_use(self) -> int:
        """Pages with a user other than a store."""
        return self.num_pages - self.num_free - self._num_idle

    def num_in_use_of(self, pages: Sequence[int]) -> int:
        """How many of these have a user other than a store."""
        self._settle()
        index = _index(pages)
        return int(np.count_nonzero(self._counts[index] > self._kept[index]))

    def num_held_once(self, pages: Sequence[int]) -> int:
        """How many of these have exactly one user besides a store."""
        self._settle()
        index = _index(pages)
        return int(np.count_nonzero(self._counts[index] == self._kept[index] + 1))

    def count(self, page: int) -> int:
        """How many users a page has."""
        self._settle()
        return int(self._counts[page])

    def take(self, count: int = 1) -> list[int]:
        """Ids of `count` pages that nobody uses, with one reference each; they hold anything.

        Raises CacheError when there are too few, also after `make_room`; nothing is taken then.
        """
        if self.num_free < count and self.make_room is not None:
            self.make_room(count - self.num_free)  # outside the lock: it calls back into `release`
        with self._lock:
            self._count_leaving()
            free = len(self._freed) + self.num_pages - self._fresh
            if free < count:
                raise CacheError(
                    f"The page pool has {free} free pages of {self.num_pages}, and {count} are needed. All "
                    "others belong to running sequences. Run fewer or shorter requests at a time, or make the pool "
                    f"larger ({self.page_bytes} bytes hold {self.page_tokens} tokens)."
                )
            pages = [heapq.heappop(self._freed) for _ in range(min(count, len(self._freed)))]
            new = range(self._fresh, self._fresh + count - len(pages))
            self._fresh = new.stop
            pages += new
            self._counts[_index(pages)] = 1
            return pages

    def retain(self, pages: Sequence[int]) -> None:
        """One more user of each of these pages, which are all different."""
        index = _index(pages)
        with self._lock:
            self._count_leaving()
            counts = self._counts[index]
            assert counts.all(), f"of pages {pages} some are free and cannot be shared"
            self._num_idle -= int(np.count_nonzero(counts == self._kept[index]))
            self._counts[index] = counts + 1

    def keep(self, pages: Sequence[int]) -> None:
        """One more user of each of these pages, all different, which somebody uses: a store, which may have them for
        itself later.
        """
        index = _index(pages)
        with self._lock:
            self._count_leaving()
            assert self._counts[index].all() and not self._kept[index].any(), (
                f"of {pages} some are free, or kept already"
            )
            self._counts[index] += 1
            self._kept[index] = 1

    def drop(self, page: int) -> None:
        """The inverse of `keep`, for one page."""
        with self._lock:
            self._count_leaving()
            self._num_idle -= int(self._counts[page] == self._kept[page])
            self._kept[page] = 0
        self.release([page])

    def release(self, pages: Iterable[int]) -> None:
        """One user less of each of these pages, which are all different; a page without users is free.

        Never waits: a sequence may be collected, and its pages released, in the middle of any of these methods. What
        cannot be counted at once is counted by the next of them.
        """
        self._leaving.append(list(pages))
        if self._lock.acquire(blocking=False):
            try:
                self._count_leaving()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Count what was released meanwhile."""
        if self._leaving:
            with self._lock:
                self._count_leaving()

    def _count_leaving(self) -> None:
        """As `_settle`, with the lock held."""
        while self._leaving:
            index = _index(self._leaving.popleft())
            counts = self._counts[index] - 1
            assert (counts >= 0).all(), "a page was released once too often"
            self._counts[index] = counts
            self._num_idle += int(np.count_nonzero((counts == 1) & (self._kept[index] == 1)))
            for page in index[counts == 0].tolist():
                heapq.heappush(self._freed, page)

    def copy(self, page: int) -> int:
        """A new page with the same content and one reference. Raises CacheError when no page is free."""
        [new] = self.take()
        for tensor in self._tensors.values():
            tensor[new] = tensor[page]
        return new

    def read(self, pages: Sequence[int]) -> Tensor:
        """Pages as bytes, part after part in the order of `parts`: uint8 [len(pages), page_bytes]."""
        out = torch.empty(len(pages), self.page_bytes, dtype=torch.uint8)
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        at = 0
        for part in self.parts:
            view = out[:, at : at + part.nbytes].view(part.dtype).unflatten(1, (part.rows, part.width))
            view.copy_(self._tensors[part.layer, part.name].index_select(0, index))
            at += part.nbytes
        return out

    def write(self, pages: Sequence[int], content: Tensor) -> None:
        """The inverse of `read`: fill pages (which nobody else uses) from uint8 [len(pages), page_bytes]."""
        page_rows.scatter(content, pages, list(self._tensors.values()))


def _index(pages: Iterable[int]) -> NDArray[np.intp]:
    return np.asarray(pages, dtype=np.intp)
