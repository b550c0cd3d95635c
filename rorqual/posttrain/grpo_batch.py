"""From rollouts to what a training forward takes: rows of about one length, and what the engine recorded of them.

Heavy fields (masks, experts) become tensors one micro-batch at a time and are forgotten with it.
Source: training specification, sections 13.2 and 13.4. B rows, S tokens, A experts a token, K kept ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rorqual.posttrain.rollouts import Rollout


@dataclass(frozen=True)
class Batch:
    """Some rollouts, right-padded. Position t of `chosen` and `old` is about token t + 1, as in `scoring.py`.

    ids int64 [B, S]; lengths; chosen bool [B, S - 1]: the policy drew this token; old fp32 [B, S - 1]: its log
    probability then; advantages fp64 [B]; routing, sampling_mask: as `token_scores` takes them, None for neither.
    """

    ids: Tensor
    lengths: list[int]
    chosen: Tensor
    old: Tensor
    advantages: Tensor
    routing: Mapping[str, Tensor] | None
    sampling_mask: Tensor | None


def micro_batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Places of rollouts, shortest first, in rows that hold at most `most_tokens` with their padding (one row at least).

    >>> micro_batches([5, 3, 4, 9], 10)
    [[1, 2], [0], [3]]
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if groups and (len(groups[-1]) + 1) * lengths[place] <= most_tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def make_batch(rollouts: Sequence[Rollout], advantages: Tensor, device: torch.device) -> Batch:
    """One micro-batch; `advantages` [B] in the order of the rollouts."""
    lengths = [len(rollout.trajectory) for rollout in rollouts]
    rows, most = len(rollouts), max(lengths)
    ids = torch.zeros(rows, most, dtype=torch.int64)
    chosen = torch.zeros(rows, most, dtype=torch.bool)
    old = torch.zeros(rows, most)
    for row, rollout in enumerate(rollouts):
        trajectory = rollout.trajectory
        ids[row, : len(trajectory)] = torch.tensor(trajectory.ids)
        chosen[row, : len(trajectory)] = torch.tensor(trajectory.mask)
        old[row, : len(trajectory)] = torch.tensor(trajectory.logprobs)
    return Batch(
        ids.to(device), lengths, chosen[:, 1:].to(device), old[:, 1:].to(device), advantages.to(device),
        _routing(rollouts, most, device), _sampling_mask(rollouts, most, device),
    )  # fmt: skip


def _routing(rollouts: Sequence[Rollout], most: int, device: torch.device) -> dict[str, Tensor] | None:
    """Experts by router, [B, S - 1, A]; padding goes to experts 0 to A - 1, as any would do."""
    recorded = [rollout.routing for rollout in rollouts if rollout.routing is not None]
    if len(recorded) < len(rollouts) or not recorded[0]:
        return None
    out = {}
    for name, first in recorded[0].items():
        experts = np.broadcast_to(np.arange(first.shape[1]), (len(rollouts), most - 1, first.shape[1])).copy()
        for row, routing in enumerate(recorded):
            experts[row, : len(routing[name])] = routing[name]
        out[name] = torch.from_numpy(experts).to(device)
    return out


def _sampling_mask(rollouts: Sequence[Rollout], most: int, device: torch.device) -> Tensor | None:
    """Ids that could have been drawn, int64 [B, S - 1, K] with -1 in empty places; None where nothing was cut."""
    kept = [
        (row, place - 1, ids)
        for row, rollout in enumerate(rollouts)
        for place, ids in enumerate(rollout.sampling_masks or ())
        if ids is not None and place > 0
    ]
    if not kept:
        return None
    out = torch.full((len(rollouts), most - 1, max(len(ids) for _, _, ids in kept)), -1, dtype=torch.int64)
    for row, place, ids in kept:
        out[row, place, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return out.to(device)
