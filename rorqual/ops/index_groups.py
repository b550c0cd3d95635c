"""Grouped index search: an approximate index scan that scores groups of keys first, for very long texts.

Every complete segment of `SEGMENT` keys is cut in halves again and again, each time along the direction in which its
keys spread most, into groups of `MEMBERS` and further into parts of `FINE`. A query scores a group by its mean, as if
that were a key, with a part of the group's radius added to each head's product, as the group's best keys lie nearer to
the query than its mean; then all parts of the `budget` best groups in the same way; then the keys of the `budget` best
parts, and all of the newest ones, exactly. Means are kept, and queries rounded for them, as whole numbers of 13 bits.
The best of those keys are its picks, of equal ones those of earlier parts. While it sees few groups, a fourth of the
budget, it scores every key, as `index_scan` does. Which keys a query misses is a matter of measurement
(`benchmarks/index_recall.py`); that its picks depend on nothing but itself and the keys holds as there.

A group index is made of keys and nothing else, so it can be dropped and made again at any time.

R queries, J index heads, K index width, C entries, G segments.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.index_scan import IndexKeys, index_scan, scan_arguments, scan_scores_reference
from rorqual.ops.native import library

_HEADER = (Path(__file__).parent / "native" / "index_groups.h").read_text()


def _number(name: str) -> int:
    found = re.search(rf"#define {name} (\d+)", _HEADER)
    assert found is not None, name
    return int(found.group(1))


SEGMENT, MEMBERS, FINE, PLAIN, LAG, ABREAST, MOST_CODE = (
    _number(name) for name in ("SEGMENT", "MEMBERS", "FINE", "PLAIN", "LAG", "ABREAST", "MOST_CODE")
)
"""Keys of a segment, of a group and of its parts; the part of the budget below which every key is scored; how many of
the newest keys are never in groups; groups that are scored together; the whole number that stands for a mean's largest
channel: as C has them."""
PER_SEGMENT, PARTS = SEGMENT // MEMBERS, MEMBERS // FINE
WAYS, RADIUS = 6, 0.3
"""Steps towards the direction of largest spread; the part of a radius that counts."""
BUDGET = 512
"""Groups whose parts a query scores, and parts whose keys it scores, unless it is told otherwise."""


class Groups(NamedTuple):
    """Of one sequence: the places of its keys, and means."""

    order: Tensor
    """uint8 [G, 2 SEGMENT]: uint16 places of keys in their segment, group by group and part by part, ascending within a
    part."""
    means: Tensor
    """uint8 [G, PER_SEGMENT / ABREAST, ceil(K / 2) + 2, 4 ABREAST]: of each group the mean in pairs of int16, what one
    of these is worth (fp32), and of its radius what counts (fp32)."""
    fine: Tensor
    """uint8 [G, PER_SEGMENT, ceil(K / 2) + 2, 4 PARTS]: the same of a group's parts."""

    def places(self) -> Tensor:
        """Entries of every part, int64 [G * PER_SEGMENT * PARTS, FINE]."""
        within = self.order.contiguous().view(torch.int16).view(-1, PER_SEGMENT * PARTS, FINE).long()
        first = SEGMENT * torch.arange(within.shape[0], device=within.device)
        return (within + first[:, None, None]).flatten(0, 1)


def room_for(segments: int, width: int, device: torch.device) -> Groups:
    """Room for so many segments of keys of `width` channels."""
    tall = (width + 1) // 2 + 2
    sizes = (2 * SEGMENT,), (PER_SEGMENT // ABREAST, tall, 4 * ABREAST), (PER_SEGMENT, tall, 4 * PARTS)
    return Groups(*(torch.zeros(segments, *size, dtype=torch.uint8, device=device) for size in sizes))


def grouped_segments(end: int) -> int:
    """Segments that stand for their keys in a search that sees `end` entries."""
    return max(0, end - LAG) // SEGMENT


def make_groups(keys: IndexKeys, groups: Groups, first: int, last: int) -> None:
    """Fill in segments [first, last) from a sequence's keys."""
    if first < last:
        registry.pick("index_groups", keys.rows)(keys, groups, first, last)


def index_search(
    q: Tensor, weights: Tensor, keys: IndexKeys, groups: Groups, end: Tensor, top_k: int, budget: int
) -> Tensor:
    """As `index_scan`, for queries that see entries [0, end) of a sequence, by groups that are made as far as needed.

    Ends are best in ascending order: those that see few entries are then scanned together.
    """
    return registry.pick("index_search", q)(q, weights, keys, groups, end, top_k, budget)


def make_groups_reference(keys: IndexKeys, groups: Groups, first: int, last: int) -> None:
    """See `make_groups`."""
    rows = keys.gather(last * SEGMENT).float()
    for segment in range(first, last):
        mine = rows[segment * SEGMENT : (segment + 1) * SEGMENT]
        parts = [torch.arange(SEGMENT, device=rows.device)]
        while len(parts[0]) > FINE:
            parts = [half for part in parts for half in _halves(mine, part)]
        order = torch.stack(parts)
        groups.order[segment] = order.to(torch.int16).flatten().view(torch.uint8)
        groups.means[segment] = _packed(*_means(mine[order.view(-1, MEMBERS)]), ABREAST)
        groups.fine[segment] = _packed(*_means(mine[order]), PARTS)


def _means(members: Tensor) -> tuple[Tensor, Tensor]:
    """[N, n, K] -> means [N, K], and what counts of the radius [N]."""
    mean = members.mean(1)
    return mean, RADIUS * ((members - mean[:, None]) ** 2).sum(-1).mean(1).sqrt()


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [N, K] -> whole numbers int16 [N, K] and what one is worth [N]: NaN where a row has no finite numbers."""
    most = MOST_CODE if x.shape[1] <= 128 else math.floor(math.sqrt(2147483647 / x.shape[1]) - 1)
    amax, is_finite = x.abs().amax(1), x.isfinite().all(1)
    per_one = torch.where(is_finite & (amax > 1e-30), most / amax, 0.0)
    codes = torch.where(is_finite[:, None], (x * per_one[:, None]).round(), 0.0)
    return codes.to(torch.int16), torch.where(is_finite, amax / most, torch.nan)


def _packed(mean: Tensor, radius: Tensor, lanes: int) -> Tensor:
    """[N, K], [N] -> uint8 [N / lanes, ceil(K / 2) + 2, 4 lanes]."""
    codes, worth = codes_of(mean)
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    rows = [codes.view(torch.float32), worth[:, None], radius[:, None]]
    return torch.cat(rows, 1).unflatten(0, (-1, lanes)).transpose(1, 2).contiguous().view(torch.uint8)


def unpacked(packed: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [..., ceil(K / 2) + 2, 4 lanes] -> whole numbers int16 [N, K], what one is worth [N], radius [N]."""
    rows = packed.contiguous().view(torch.float32).transpose(-1, -2).flatten(0, -2).contiguous()
    return rows[:, :-2].contiguous().view(torch.int16)[:, :width], rows[:, -2], rows[:, -1]


def _halves(rows: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    x = rows[part]
    x = x - x.mean(0)
    along = torch.nn.functional.one_hot((x * x).sum(0).argmax(), x.shape[1]).float()
    for _ in range(WAYS):
        step = x.T @ (x @ along)
        along = step / step.abs().max() if step.abs().max() > 0 else along
    by_value = torch.sort(x @ along, descending=True, stable=True).indices
    is_up = torch.zeros_like(part, dtype=torch.bool)
    is_up[by_value[: len(part) // 2]] = True
    return part[~is_up], part[is_up]


def best_parts(q: Tensor, weights: Tensor, groups: Groups, count: int, budget: int) -> Tensor:
    """Of the first `count` groups: q [J, K], weights [J] -> numbers of parts, the best first, int64 [budget]."""
    means = groups.means.flatten(0, 1)[: -(-count // ABREAST)]
    best = torch.sort(_scores(q, weights, means)[:count], descending=True, stable=True).indices[:budget].sort().values
    parts = (best[:, None] * PARTS + torch.arange(PARTS, device=q.device)).flatten()
    fine = _scores(q, weights, groups.fine.flatten(0, 1)[best])
    return parts[torch.sort(fine, descending=True, stable=True).indices[:budget]]


def _scores(q: Tensor, weights: Tensor, packed: Tensor) -> Tensor:
    """q [J, K], weights [J], packed means -> [N]. Products of whole numbers are exact."""
    means, worth, radius = unpacked(packed, q.shape[1])
    codes, of_head = codes_of(q.float())
    length = torch.where(of_head > 0, q.float().norm(dim=-1) / of_head, 0.0)
    dots = (codes.double() @ means.double().T).float() * worth + length[:, None] * radius
    return ((weights.float() * of_head)[:, None] * dots.relu()).sum(0)


def index_search_reference(
    q: Tensor, weights: Tensor, keys: IndexKeys, groups: Groups, end: Tensor, top_k: int, budget: int
) -> Tensor:
    """See `index_search`."""
    picks = []
    places = groups.places()
    for row, length in enumerate(end.tolist()):
        mine, one = q[row : row + 1], weights[row : row + 1]
        count = grouped_segments(length) * PER_SEGMENT
        if PLAIN * count <= budget:
            picks.append(index_scan(mine, one, keys, None, end[row : row + 1], top_k)[0])
            continue
        best = best_parts(mine[0], one[0], groups, count, budget)
        tail = torch.arange(count * MEMBERS, length, device=q.device)
        ids = torch.cat([places[best.sort().values].flatten(), tail])
        rows = IndexKeys(keys.gather(length)[ids], keys.width)
        scores = scan_scores_reference(mine, one, rows, len(ids))[0]
        scores = torch.where(scores.isnan(), torch.inf, scores)
        found = torch.sort(scores, descending=True, stable=True).indices[:top_k]
        found = ids[found[scores[found] > -torch.inf]].sort().values
        picks.append(torch.nn.functional.pad(found, (0, top_k - len(found)), value=-1))
    return torch.stack(picks)


def _make_groups_native(keys: IndexKeys, groups: Groups, first: int, last: int) -> None:
    rows = keys.rows.contiguous()
    library.call(
        "index_groups", None if keys.is_packed else rows, rows if keys.is_packed else None,
        None if keys.table is None else keys.table.contiguous(), keys.width, rows.shape[-2], first, last,
        *groups,
    )  # fmt: skip


def _index_search_native(
    q: Tensor, weights: Tensor, keys: IndexKeys, groups: Groups, end: Tensor, top_k: int, budget: int
) -> Tensor:
    r, j, k = q.shape
    picks = torch.empty(r, top_k, dtype=torch.int64)
    library.call(
        "index_search", *scan_arguments(q, weights, keys), *groups, end.contiguous(),
        r, j, k, keys.rows.shape[-2], top_k, budget, torch.get_num_threads(), picks,
    )  # fmt: skip
    return picks


def _works(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype in (torch.float32, torch.bfloat16, torch.uint8) and library.load() is not None


for _name, _reference, _native in (
    ("index_groups", make_groups_reference, _make_groups_native),
    ("index_search", index_search_reference, _index_search_native),
):
    registry.register(_name, "reference", _reference)
    registry.register(_name, "native", _native, _works)
