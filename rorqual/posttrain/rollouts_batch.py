"""Rollouts as the tensors that `scoring.token_logprobs` takes: right-padded rows, and what tokens were drawn from.

B rows, S tokens of the longest row, K kept ids, A experts a token. Position t is about token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.errors import RequestError
from rorqual.posttrain.rollouts import Rollout


class RolloutBatch(NamedTuple):
    """ids int64 [B, S]; lengths; logprobs fp32 [B, S - 1] (pi_old, 0 where nothing was drawn); chosen bool [B, S - 1];
    versions int64 [B, S - 1] (-1 where nothing was drawn); sampling_mask int64 [B, S - 1, K], -1 in empty places, a row
    of them where nothing was removed; routing int64 [B, S - 1, A] by the router's module path. The last two are None
    where no rollout has them.
    """

    ids: Tensor
    lengths: list[int]
    logprobs: Tensor
    chosen: Tensor
    versions: Tensor
    sampling_mask: Tensor | None
    routing: dict[str, Tensor] | None


def stack(rollouts: Sequence[Rollout], pad_id: int = 0) -> RolloutBatch:
    """Rows of one batch. Raises: RequestError where some rollouts have masks or routing and others have not."""
    if not rollouts:
        raise RequestError("a batch of no rollouts was to be made. Give at least one.")
    _check_alike(rollouts)
    lengths = [len(one.trajectory) for one in rollouts]
    rows, longest = len(rollouts), max(lengths)
    ids = torch.full((rows, longest), pad_id)
    logprobs = torch.zeros(rows, longest - 1)
    chosen = torch.zeros(rows, longest - 1, dtype=torch.bool)
    versions = torch.full((rows, longest - 1), -1)
    for row, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
        ids[row, :length] = torch.tensor(rollout.trajectory.ids)
        logprobs[row, : length - 1] = torch.tensor(rollout.trajectory.logprobs[1:])
        chosen[row, : length - 1] = torch.tensor(rollout.trajectory.mask[1:])
        versions[row, : length - 1] = torch.tensor(rollout.versions[1:])
    return RolloutBatch(
        ids, lengths, logprobs, chosen, versions, stack_masks(rollouts, longest), stack_routing(rollouts, longest)
    )


def stack_masks(rollouts: Sequence[Rollout], longest: int) -> Tensor | None:
    """Ids that could be drawn, int64 [B, S - 1, K] with -1 in empty places; None where nothing was removed anywhere."""
    marked = [
        (row, place - 1, support)
        for row, rollout in enumerate(rollouts)
        for place, support in enumerate(rollout.sampling_masks or ())
        if support is not None
    ]
    if not marked:
        return None
    out = torch.full((len(rollouts), longest - 1, max(len(support) for _, _, support in marked)), -1)
    for row, place, support in marked:
        out[row, place, : len(support)] = torch.from_numpy(support)
    return out


def stack_routing(rollouts: Sequence[Rollout], longest: int) -> dict[str, Tensor] | None:
    """Experts by router, int64 [B, S - 1, A]; padding uses the first ones, which must differ from each other."""
    first = rollouts[0].routing
    if first is None:
        return None
    out = {}
    for name, like in first.items():
        active = like.shape[-1]
        rows = torch.arange(active).expand(len(rollouts), longest - 1, active).clone()
        for row, rollout in enumerate(rollouts):
            assert rollout.routing is not None
            experts = rollout.routing[name]
            rows[row, : len(experts)] = torch.from_numpy(experts)
        out[name] = rows
    return out


def _check_alike(rollouts: Sequence[Rollout]) -> None:
    for what in ("sampling_masks", "routing"):
        if len({getattr(one, what) is None for one in rollouts}) > 1:
            raise RequestError(
                f"some rollouts of a batch have {what} and others have not, so they were drawn in different ways. "
                "Batch those of one worker's settings."
            )
