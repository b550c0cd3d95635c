"""Index scan: scores of one sequence's index keys for one or more queries, and the choice of the best.

Source: V4 report section 2.3.1; the arithmetic is `ops/index_topk.py`'s. The native twin fuses products, relu, head
weights and a running threshold over tiles of keys, so no score is stored that cannot be among the best. A query's
scores and picks depend on nothing but itself and the keys: not on other queries, threads, or how keys lie in memory.

Keys may be packed FP4 rows (`ops/cache_codec.py`). Keys and queries that are FP4 numbers in groups of 32, as
`round_index_fp4` makes them, give the same scores bit by bit packed, in bf16 and in fp32, because every partial sum of
a group is exact.

R queries, J index heads, K index width, C entries, Y bytes of a packed row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.errors import ConfigError
from rorqual.ops import cache_codec, registry, triton
from rorqual.ops.index_topk import index_scores, select_entries
from rorqual.ops.native import load
from rorqual.ops.native.library import call


@dataclass(frozen=True)
class IndexKeys:
    """Where the index keys of one sequence lie."""

    rows: Tensor
    """Without a table [C, K] in fp32 or bf16, or [C, Y] uint8; with one [pages, rows of a page, K or Y]."""
    width: int
    """K."""
    table: Tensor | None = None
    """Pages of the sequence, int64: entry i is row i % rows of page table[i // rows]."""

    @property
    def is_packed(self) -> bool:
        """Whether rows are packed FP4."""
        return self.rows.dtype == torch.uint8

    def gather(self, length: int) -> Tensor:
        """The first `length` keys, unpacked: [length, K]."""
        rows = self.rows if self.table is None else self.rows[self.table].flatten(0, 1)
        rows = rows[:length]
        return cache_codec.decode_index_keys(rows, self.width) if self.is_packed else rows


def index_scan(q: Tensor, weights: Tensor, keys: IndexKeys, start: Tensor | None, end: Tensor, top_k: int) -> Tensor:
    """The `top_k` best entries of each query's visible range [start, end), lowest index first among equals.

    Shapes: q [R, J, K], weights [R, J] (the scale constants inside), start and end int64 [R] (start None: 0) -> int64
    [R, top_k] in ascending order of index, -1 for an empty place. A score of -inf is never chosen; a NaN counts as the
    largest, so that a broken entry shows. A query that sees no more than `top_k` entries gets all of them, unscored.
    Raises: ConfigError when top_k < 1.
    """
    if top_k < 1:
        raise ConfigError(f"index_topk is {top_k}, so no entry could be attended to. Choose at least 1.")
    return registry.pick("index_scan", q)(q, weights, keys, start, end, top_k)


def scan_scores(q: Tensor, weights: Tensor, keys: IndexKeys, length: int) -> Tensor:
    """All scores of the first `length` keys, as `index_scan` computes them: fp32 [R, length]."""
    return registry.pick("scan_scores", q)(q, weights, keys, length)


def index_scan_reference(
    q: Tensor, weights: Tensor, keys: IndexKeys, start: Tensor | None, end: Tensor, top_k: int
) -> Tensor:
    """See `index_scan`."""
    length = max(int(end.max()), top_k)
    index = torch.arange(length, device=q.device)
    seen = index < end.unsqueeze(-1)
    if start is not None:
        seen = seen & (index >= start.unsqueeze(-1))
    scores = torch.zeros(len(q), length)
    found = scan_scores_reference(q, weights, keys, int(end.max()))
    scores[:, : found.shape[1]] = torch.where(found.isnan(), torch.inf, found)
    few = seen.sum(-1, keepdim=True) <= top_k
    scores = torch.where(few, 0.0, scores).masked_fill(~seen, -torch.inf)
    picks = select_entries(scores, top_k)
    return (
        picks.masked_fill(picks < 0, length)
        .sort(-1)
        .values.masked_fill_(picks.sort(-1, descending=True).values < 0, -1)
    )


def scan_scores_reference(q: Tensor, weights: Tensor, keys: IndexKeys, length: int) -> Tensor:
    """See `scan_scores`."""
    found = keys.gather(length).to(q.dtype)
    return index_scores(q[None], weights[None], found[None])[0]


def scan_arguments(q: Tensor, weights: Tensor, keys: IndexKeys) -> tuple[Tensor | None, ...]:
    """q, weights, keys, packed keys and table, as the C functions read them."""
    rows = keys.rows.contiguous()
    plain = None if keys.is_packed else rows.to(q.dtype)
    return (
        q.contiguous(), weights.float().contiguous(), plain, rows if keys.is_packed else None,
        None if keys.table is None else keys.table.contiguous(),
    )  # fmt: skip


def _index_scan_native(
    q: Tensor, weights: Tensor, keys: IndexKeys, start: Tensor | None, end: Tensor, top_k: int
) -> Tensor:
    r, j, k = q.shape
    picks = torch.empty(r, top_k, dtype=torch.int64)
    first = None if start is None else start.contiguous()
    call(
        "index_scan", *scan_arguments(q, weights, keys), first, end.contiguous(), r, j, k,
        keys.rows.shape[-2], top_k, torch.get_num_threads(), picks,
    )  # fmt: skip
    return picks


def _scan_scores_native(q: Tensor, weights: Tensor, keys: IndexKeys, length: int) -> Tensor:
    r, j, k = q.shape
    scores = torch.empty(r, length)
    call("index_scan_scores", *scan_arguments(q, weights, keys), r, j, k, keys.rows.shape[-2], length, scores)
    return scores


def _works(q: Tensor) -> bool:
    return q.is_cpu and q.dtype in (torch.float32, torch.bfloat16) and load() is not None


for _name, _reference, _native in (
    ("index_scan", index_scan_reference, _index_scan_native),
    ("scan_scores", scan_scores_reference, _scan_scores_native),
):
    registry.register(_name, "reference", _reference)
    registry.register(_name, "native", _native, _works)
    registry.register(_name, "triton", triton.later("index_scan", _name), triton.usable)
