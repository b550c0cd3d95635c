"""ZeRO with ownership of whole matrices: gradients go to owners, owners update, weights come back.

Muon needs whole matrices, and plain ZeRO cuts a flat buffer anywhere. Here the units are ranges of a parameter's
elements that an optimizer can work on alone: one independent matrix for Muon, any range for AdamW. `plan` gives each
range an owner, largest first to the least loaded rank, the same on every rank. Source: V4 report, section on hybrid
ZeRO. Left out: its cap on the group's size, and bf16 gradients with stochastic rounding.

Gradients are exchanged all-to-all and summed by the owner in float32 in rank order, so the sum does not depend on
timing or on a backend's algorithm.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_ELEMENTS = 1 << 24
"""Elements that travel in one exchange: 64 MiB of float32 to send and as much to receive."""


@dataclass(frozen=True)
class Range:
    """Elements `start` to `stop` of a parameter (flattened), to be owned by one rank."""

    name: str
    start: int
    stop: int
    cost: int
    """Bytes of optimizer state that its owner keeps."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """What a parameter that is spread over ranks looks like whole, and where this rank's part lies in it."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of this rank's part in the whole, flattened."""


def plan(ranges: Sequence[Range], ranks: int) -> list[int]:
    """The owner of each range: largest first, each to the rank that has the least so far (lowest rank among equals).

    Raises nothing; the same arguments give the same answer everywhere.
    """
    loads = [0] * ranks
    owners = [0] * len(ranges)
    for index in sorted(range(len(ranges)), key=lambda i: (-ranges[i].cost, -ranges[i].size, i)):
        owner = min(range(ranks), key=lambda r: (loads[r], r))
        owners[index] = owner
        loads[owner] += ranges[index].cost
    return owners


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Neighbouring ranges of one parameter joined, in the given order."""
    out: list[Range] = []
    for r in ranges:
        last = out[-1] if out else None
        if last is not None and (last.name, last.stop) == (r.name, r.start):
            out[-1] = Range(r.name, last.start, r.stop, last.cost + r.cost)
        else:
            out.append(r)
    return out


@dataclass
class _Bucket:
    """Ranges that travel together."""

    by_owner: list[list[Range]]
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [sum(r.size for r in ranges) for ranges in self.by_owner]


class Owners:
    """Who owns which range of some parameters, over one process group (None: this process owns everything).

    All ranks of the group must build it from the same ranges. `owned` are this rank's, in order, neighbours joined.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        ranges: Sequence[Range],
        group: dist.ProcessGroup | None,
        *,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        self.parameters = parameters
        self.group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.owners = plan(ranges, self.ranks)
        self.ranges = list(ranges)
        self.owned = [r for r, owner in zip(self.ranges, self.owners, strict=True) if owner == self.rank]
        self._buckets = self._cut(bucket_elements)

    def _cut(self, bucket_elements: int) -> list[_Bucket]:
        buckets: list[list[list[Range]]] = []
        filled = bucket_elements
        for r, owner in zip(self.ranges, self.owners, strict=True):
            if filled >= bucket_elements:
                buckets.append([[] for _ in range(self.ranks)])
                filled = 0
            buckets[-1][owner].append(r)
            filled += r.size
        return [_Bucket([merged(ranges) for ranges in by_owner]) for by_owner in buckets]

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum gradients over the group; afterwards `grad` is the sum in the ranges this rank owns, and stale elsewhere.

        A parameter without a gradient counts as having a zero one (and gets one).
        """
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks == 1:
            return
        for bucket in self._buckets:
            mine = bucket.sizes[self.rank]
            send = torch.cat([self._grad(r) for ranges in bucket.by_owner for r in ranges]).float()
            received = send.new_empty(self.ranks * mine)
            dist.all_to_all_single(received, send, [mine] * self.ranks, bucket.sizes, group=self.group)
            parts = received.view(self.ranks, mine)
            total = parts[0]
            for other in parts[1:]:
                total += other
            self._put(bucket.by_owner[self.rank], total, gradients=True)

    @torch.no_grad()
    def share(self, *, gradients: bool = False) -> None:
        """Give everybody the owners' weights (or, with `gradients`, their gradients)."""
        if self.ranks == 1:
            return
        get = self._grad if gradients else self._weight
        for bucket in self._buckets:
            longest = max(bucket.sizes)
            own = bucket.by_owner[self.rank]
            first = next(iter(self.parameters.values()))
            send = torch.zeros(longest, dtype=first.dtype, device=first.device)
            if own:
                torch.cat([get(r) for r in own], out=send[: bucket.sizes[self.rank]])
            received = list(send.new_empty(self.ranks * longest).split(longest))
            dist.all_gather(received, send, group=self.group)
            for rank, part in enumerate(received):
                if rank != self.rank:
                    self._put(bucket.by_owner[rank], part[: bucket.sizes[rank]], gradients=gradients)

    def owned_gradients(self) -> list[Tensor]:
        """Views of the summed gradients in the ranges this rank owns; whole parameters keep their shape."""
        out = []
        for r in merged(self.owned):
            gradient = self.parameters[r.name].grad
            assert gradient is not None
            out.append(gradient if r.size == gradient.numel() else gradient.view(-1)[r.start : r.stop])
        return out

    def _grad(self, r: Range) -> Tensor:
        gradient = self.parameters[r.name].grad
        assert gradient is not None
        return gradient.reshape(-1)[r.start : r.stop]

    def _weight(self, r: Range) -> Tensor:
        return self.parameters[r.name].detach().view(-1)[r.start : r.stop]

    def _put(self, ranges: list[Range], values: Tensor, *, gradients: bool) -> None:
        for r, value in zip(ranges, values.split([r.size for r in ranges]) if ranges else (), strict=True):
            if gradients:
                gradient = self.parameters[r.name].grad
                assert gradient is not None
                if not gradient.is_contiguous():
                    self.parameters[r.name].grad = gradient = gradient.contiguous()
                gradient.view(-1)[r.start : r.stop].copy_(value)
            else:
                self._weight(r).copy_(value)
