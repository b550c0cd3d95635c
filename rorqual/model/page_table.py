"""The pages of one sequence, and a layer's entries or index keys in them.

P pages, R rows of a page, K width of a row, C entries of a sequence.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rorqual.model.pages import PagePool


class PageTable:
    """The pages of one sequence, in order; they are released when the table is closed or forgotten.

    Pages before the last may be shared. Whoever writes tokens calls `ensure` first.
    """

    def __init__(self, pool: PagePool, pages: Iterable[int] = ()) -> None:
        """`pages`: ids that come with a reference each (from `take` or `retain`), which this table now owns."""
        self.pool = pool
        self._pages = list(pages)
        self._tensor = torch.empty(0, dtype=torch.int64)
        self._is_run = True
        self._update(0)
        self._finalizer = weakref.finalize(self, _release, pool, self._pages)
        self._finalizer.atexit = False

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def pages(self) -> tuple[int, ...]:
        """The ids."""
        return tuple(self._pages)

    @property
    def tensor(self) -> Tensor:
        """The ids as int64 [len], on the CPU; valid until the table changes."""
        return self._tensor[: len(self._pages)]

    @property
    def address(self) -> int:
        """Where the ids lie, for C; valid until the table changes."""
        return self._tensor.data_ptr()

    @property
    def is_run(self) -> bool:
        """Whether the ids are consecutive, so that the sequence's rows lie one after the other."""
        return self._is_run

    def ensure(self, begin: int, end: int) -> None:
        """Make tokens [begin, end) writable: pages for all of them, none shared. Raises CacheError when pages run out.

        Content of pages that were shared is copied. Nothing has changed after an error.
        """
        size = self.pool.page_tokens
        first, last = begin // size, -(-end // size)
        assert begin <= end and first <= len(self._pages), "pages are filled in order"
        shared = [i for i in range(first, min(last, len(self._pages))) if self.pool.count(self._pages[i]) > 1]
        missing = max(0, last - len(self._pages))
        if not shared and not missing:
            return
        new = self.pool.take(len(shared) + missing)
        for i, page in zip(shared, new, strict=False):
            if i * size < begin:  # earlier tokens of this page stay
                for part in self.pool.parts:
                    tensor = self.pool.tensor(part.layer, part.name)
                    tensor[page] = tensor[self._pages[i]]
            self.pool.release([self._pages[i]])
            self._pages[i] = page
        self._pages.extend(new[len(shared) :])
        self._update(shared[0] if shared else len(self._pages) - missing)

    def truncate(self, num_tokens: int) -> None:
        """Keep the pages of the first `num_tokens` tokens."""
        keep = -(-num_tokens // self.pool.page_tokens)
        if keep < len(self._pages):
            self.pool.release(self._pages[keep:])
            del self._pages[keep:]
            self._update(keep)

    def fork(self, num_tokens: int) -> "PageTable":
        """A table of the first `num_tokens` tokens: full pages are shared, an open one is copied."""
        full, open_tokens = divmod(num_tokens, self.pool.page_tokens)
        copy = [self.pool.copy(self._pages[full])] if open_tokens else []
        shared = self._pages[:full]
        self.pool.retain(shared)
        return PageTable(self.pool, [*shared, *copy])

    def replace(self, other: "PageTable") -> None:
        """Take over the pages of `other`, which is empty afterwards."""
        self.pool.release(self._pages)
        self._pages[:] = other._pages
        other._pages.clear()
        other._update(0)
        self._update(0)

    def close(self) -> None:
        """Release all pages."""
        self.truncate(0)

    def _update(self, start: int) -> None:
        """Bring `tensor` and `is_run` up to date from place `start` on."""
        count = len(self._pages)
        if count > self._tensor.shape[0]:
            with torch.inference_mode(False):
                grown = torch.zeros(max(count, 2 * self._tensor.shape[0], 8), dtype=torch.int64)
            grown[:start] = self._tensor[:start]
            self._tensor = grown
        if start < count:
            with torch.inference_mode(False):
                self._tensor[start:count] = torch.from_numpy(np.asarray(self._pages[start:], dtype=np.int64))
        ids = self._tensor[:count].numpy()
        self._is_run = count < 2 or bool((ids[1:] - ids[:-1] == 1).all())


def _release(pool: PagePool, pages: list[int]) -> None:
    pool.release(pages)
    pages.clear()


@dataclass
class Paged:
    """One part of a paged sequence: what `LayerState.entries` or `.index_keys` is there.

    For C: entry i is row i % rows_per_page of page table[i // rows_per_page] of `pool`, contiguous [P, R, K]. Entries
    are written after `PageTable.ensure` only, which `State.begin` calls, and never below `frozen`.
    """

    pool: Tensor
    pages: PageTable
    ratio: int
    length: int = 0
    """Entries held."""
    frozen: int = 0
    """Entries below this number came from elsewhere, complete; tokens that are run again do not write them."""

    @property
    def table(self) -> Tensor:
        """Page ids, int64 [pages of the sequence], on the CPU; valid until the sequence grows."""
        return self.pages.tensor

    @property
    def rows_per_page(self) -> int:
        """Entries of a page."""
        return self.pool.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of a row's numbers."""
        return self.pool.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, shared ones included."""
        return len(self.pages) * self.pool[0].nbytes

    def append(self, new: Tensor | None, base: int | None = None) -> None:
        """Write entries [1, n, K] behind the first `base` (all, unless given), except those that are frozen."""
        base = self.length if base is None else base
        count = 0 if new is None else new.shape[1]
        self.length = max(base + count, self.frozen)
        skip = max(0, self.frozen - base)
        if new is None or count <= skip:
            return
        rows, first = self.rows_per_page, base + skip
        values = new[0, skip:].detach().to(self.pool.dtype)
        if self.pages.is_run:
            start = self.pages._pages[0] * rows + first
            self.pool.view(-1, self.pool.shape[-1])[start : start + count - skip] = values
            return
        index = torch.arange(first, base + count)
        place = self.table[index // rows] * rows + index % rows
        self.pool.view(-1, self.pool.shape[-1]).index_copy_(0, place.to(self.pool.device), values)

    def gather(self, count: int | None = None) -> Tensor:
        """The first `count` entries (all, unless given) in order: [1, C, K]; a view where pages lie in a row."""
        count = self.length if count is None else count
        rows = self.rows_per_page
        if not count:
            return self.pool[:0].view(1, 0, self.pool.shape[-1])
        if self.pages.is_run:
            start = self.pages._pages[0] * rows
            return self.pool.view(-1, self.pool.shape[-1])[start : start + count].unsqueeze(0)
        used = self.table[: -(-count // rows)].to(self.pool.device)
        return self.pool.index_select(0, used).view(1, -1, self.pool.shape[-1])[:, :count]
