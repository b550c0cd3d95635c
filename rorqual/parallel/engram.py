"""Engram tables spread over ranks by rows: rows are asked of their owners, gradients go back to them.

Rank r of R holds rows r ceil(N/R) to (r + 1) ceil(N/R) - 1 of each table. A call (or a whole announced step) needs the
different rows that its tokens hash to, usually far fewer than tokens: counts, row numbers and answers are three
all-to-alls. Gradients take the way back as sums per row, and the owner adds those of the ranks in rank order, in fp32:
the result does not depend on timing, and is what one process gets that takes the ranks' shares as micro-batches.
Source: Engram paper, section 2.3; V4.1-Flash report (rows of a local batch fetched before the pipeline starts).

A table's gradient is thereby summed over the group already; it takes no part in the exchange of shared gradients.
U rows asked for, W channels of a row.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rorqual.model.engram import Engram
from rorqual.model.engram_rows import as_gradient
from rorqual.parallel.zero import Shard


@torch.no_grad()
def spread_tables(model: nn.Module, group: dist.ProcessGroup | None) -> dict[str, Shard]:
    """Cut every Engram table down to this rank's rows and install the exchange; returns what the cut tables are.

    Every rank of `group` must call it (None or one rank: nothing happens). Afterwards all of them must make the same
    calls in the same order, as any of them may hold a row that another needs.
    """
    shards: dict[str, Shard] = {}
    if group is None or dist.get_world_size(group) == 1:
        return shards
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Engram)]
    if not found:
        return shards
    # Fetches run in a thread of their own, beside other exchanges: the two must not share an order of calls.
    own = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
    assert isinstance(own, dist.ProcessGroup)
    for name, memory in found:
        memory.forget()
        table = memory.table
        rows = table.shape[0]
        source = SpreadRows(own, rows)
        start, stop = source.bounds[rank], source.bounds[rank + 1]
        shards[f"{name}.table"] = Shard(tuple(table.shape), start * table.shape[1])
        table.data = table.data[start:stop].clone()
        memory.source = source
    assert len(source.bounds) == size + 1
    return shards


@torch.no_grad()
def whole_table(memory: Engram) -> Tensor:
    """The whole table of a memory, on every rank that holds a part of it (all of them must ask)."""
    if not isinstance(memory.source, SpreadRows):
        return memory.table.detach()
    return memory.source.fetch(memory.table, torch.arange(memory.hash.num_rows, device=memory.table.device))


class SpreadRows:
    """Implements `rorqual.model.engram_rows.RowSource` over a process group."""

    def __init__(self, group: dist.ProcessGroup, num_rows: int) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        share = -(-num_rows // self.size)
        self.bounds = [min(share * r, num_rows) for r in range(self.size + 1)]
        """First row of each rank, and past the last."""

    def fetch(self, table: Tensor, rows: Tensor) -> Tensor:
        """See `RowSource`."""
        mine, theirs = self._counts(rows)
        asked = self._exchange(rows, mine, theirs)
        answer = table.detach().index_select(0, asked - self.bounds[self.rank])
        return self._exchange(answer, theirs, mine)

    def gradient(self, table: Tensor, rows: Tensor, values: Tensor, sparse: bool) -> Tensor:
        """See `RowSource`."""
        values = values.to(table.device, torch.float32)
        mine, theirs = self._counts(rows)
        places = self._exchange(rows, mine, theirs) - self.bounds[self.rank]
        parts = self._exchange(values, mine, theirs)
        different = torch.unique(places) if sparse else torch.arange(table.shape[0], device=table.device)
        total = parts.new_zeros(different.shape[0], table.shape[1])
        for at, part in zip(places.split(theirs), parts.split(theirs), strict=True):  # rows differ within a part
            total.index_add_(0, torch.searchsorted(different, at) if sparse else at, part)
        if not sparse:
            return total.to(table.dtype)
        return as_gradient(table, different, total, sparse)

    def _counts(self, rows: Tensor) -> tuple[list[int], list[int]]:
        """How many of these (rising) rows each rank holds, and how many each rank asks of this one."""
        edges = torch.searchsorted(rows, torch.tensor(self.bounds, device=rows.device))
        mine = edges.diff()
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self.group)
        return mine.tolist(), theirs.tolist()

    def _exchange(self, x: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        """`sends[r]` entries of x [n, ...] to each rank r, `receives[r]` from it."""
        out = x.new_empty(sum(receives), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receives, sends, group=self.group)
        return out
