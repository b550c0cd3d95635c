"""Where the tokens of one MoE call travel: which rank holds which chosen expert, and where each answer lands.

Experts lie in equal consecutive runs on the ranks of the group. Two kinds of things travel:

    row     a token's vector. It goes once to every rank that holds at least one of the token's experts, however many
            those are, with the first wave that needs it there.
    slot    one (token, chosen expert) pair. Its answer travels back to the token's home rank by itself, so that the
            home rank can add the A answers of a token in ascending expert id, as one process does.

The order of everything is fixed by ids alone (never by arrival): on the experts' side slots are sorted by expert, then
home rank, then token, which is the order that one process gives the concatenated tokens of all ranks.

T tokens of this rank, A active experts, R ranks in the group, E experts (L on each rank), W waves, N slots that
this rank's experts serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.errors import ConfigError

Bounds = list[list[tuple[int, int]]]
"""[W][R] half-open ranges."""


@dataclass
class Routes:
    """The plan of one call on one rank. Index tensors are int64."""

    experts_here: int
    """L: experts that this rank holds."""
    waves: list[tuple[int, int]]
    """[W] ranges of local experts, ascending; together they are all of them."""
    # the home side: this rank's own tokens
    tokens: list[Tensor]
    """[R] the tokens that go to each rank, in the order in which they go there."""
    sent: Bounds
    """Which part of `tokens[r]` travels with each wave."""
    place: Tensor
    """[T, A] where each slot's answer lies among the T * A answers, which are sorted by expert id, then token."""
    answered: Bounds
    """Which answers come from each rank with each wave."""
    # the experts' side: tokens of all ranks
    received: Bounds
    """Where in the buffer of rows each wave's rows from each rank go."""
    arrival: list[int]
    """[R + 1] bounds of the slots by home rank in the order of their arrival (home rank, expert, token)."""
    arrived_bounds: list[list[int]]
    """[R][L + 1] bounds of the slots of each home rank by local expert, in the order of arrival."""
    layout: Tensor
    """[N] the arrival number of each slot, in the order of computation (expert, home rank, token)."""
    arrived: Tensor
    """[N] the inverse: the place in the computation of each slot in the order of arrival."""
    expert_bounds: list[int]
    """[L + 1] bounds of each local expert's slots in the order of computation."""

    @property
    def rows_received(self) -> int:
        """Rows that this rank's experts read, its own tokens' included."""
        return self.received[-1][-1][1]

    def replies(self, wave: int, rank: int) -> Tensor:
        """Places, in the order of computation, of the answers that a wave sends to a rank."""
        first, last = self.waves[wave]
        bounds = self.arrived_bounds[rank]
        return self.arrived[bounds[first] : bounds[last]]


def split_waves(experts: int, waves: int) -> list[tuple[int, int]]:
    """Equal ranges of local experts, at most one wave for each."""
    waves = max(1, min(waves, experts))
    edges = [experts * w // waves for w in range(waves + 1)]
    return list(zip(edges, edges[1:], strict=False))


def plan(experts: Tensor, experts_here: int, waves: int, group: dist.ProcessGroup) -> tuple[Routes, list[Tensor]]:
    """Exchange the counts and lay out the call: experts int64 [T, A], ids of the whole group's experts.

    Also returns, for every rank, the row number of each slot sent there (int32, in the order of the slots): rank r's
    experts find the slot's token in the rows they get from this rank. Raises: ConfigError for ids outside the group's.
    """
    ranks = dist.get_world_size(group)
    total = ranks * experts_here
    flat = experts.flatten()
    counts = torch.bincount(flat, minlength=total)
    if len(counts) != total:
        raise ConfigError(
            f"A router chose expert {len(counts) - 1}, but the {ranks} ranks of this expert group hold {experts_here} "
            f"experts each, {total} in all. Give every rank its E / {ranks} share of the model's E experts."
        )
    ranges = split_waves(experts_here, waves)
    wave_of = torch.tensor([w for w, (lo, hi) in enumerate(ranges) for _ in range(lo, hi)], device=experts.device)
    tokens, sent_counts, position = _rows(experts, experts_here, wave_of, len(ranges), ranks)

    outgoing = torch.cat([counts.view(ranks, experts_here), sent_counts], dim=1)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)
    slot_counts, row_counts = incoming.split([experts_here, len(ranges)], dim=1)

    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    bounds = _bounds(counts.tolist())
    numbers = position[order // max(1, experts.shape[1]), flat[order] // experts_here].int()

    per_rank = [_bounds(row) for row in slot_counts.tolist()]
    arrival = _bounds([row[-1] for row in per_rank])
    arrived_bounds = [[start + edge for edge in row] for start, row in zip(arrival, per_rank, strict=False)]
    expert_of = torch.arange(experts_here, device=flat.device).repeat(ranks)
    layout = expert_of.repeat_interleave(slot_counts.flatten()).argsort(stable=True)
    arrived = torch.empty_like(layout)
    arrived[layout] = torch.arange(len(layout), device=layout.device)
    routes = Routes(
        experts_here=experts_here,
        waves=ranges,
        tokens=tokens,
        sent=_by_wave([_bounds(row) for row in sent_counts.tolist()]),
        place=place.view(experts.shape),
        answered=[
            [(bounds[r * experts_here + lo], bounds[r * experts_here + hi]) for r in range(ranks)] for lo, hi in ranges
        ],
        received=_by_wave(_running(row_counts.tolist())),
        arrival=arrival,
        arrived_bounds=arrived_bounds,
        layout=layout,
        arrived=arrived,
        expert_bounds=_bounds(slot_counts.sum(0).tolist()),
    )
    edges = [bounds[r * experts_here] for r in range(ranks + 1)]
    return routes, [numbers[lo:hi] for lo, hi in zip(edges, edges[1:], strict=False)]


def _rows(
    experts: Tensor, experts_here: int, wave_of: Tensor, waves: int, ranks: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Which tokens go to each rank in which order: token lists [R], counts [R, W], each token's position [T, R]."""
    first = torch.full((experts.shape[0], ranks), waves, device=experts.device)
    first.scatter_reduce_(1, experts // experts_here, wave_of[experts % experts_here], "amin")
    order = first.t().argsort(dim=1, stable=True)
    position = torch.empty_like(order).scatter_(
        1, order, torch.arange(len(experts), device=order.device).expand_as(order)
    )
    counts = torch.nn.functional.one_hot(first, waves + 1).sum(0)[:, :waves]
    return [order[r, :n] for r, n in enumerate(counts.sum(1).tolist())], counts, position.t()


def _bounds(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)]


def _running(counts: list[list[int]]) -> list[list[int]]:
    """[R][W] counts of one buffer, rank after rank -> [R][W + 1] edges in it."""
    edges = _bounds([n for row in counts for n in row])
    width = len(counts[0])
    return [edges[r * width : (r + 1) * width + 1] for r in range(len(counts))]


def _by_wave(edges: list[list[int]]) -> Bounds:
    """[R][W + 1] edges -> [W][R] ranges."""
    return [[(row[w], row[w + 1]) for row in edges] for w in range(len(edges[0]) - 1)]
