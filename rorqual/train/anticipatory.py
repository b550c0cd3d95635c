"""Anticipatory routing: for a while after a spike, experts are chosen by weights of a few steps ago.

Spikes are fed by a loop: an update moves the features, the moved features move the routing, the routing moves the next
update. Taking the expert ids of step t from the weights of step t - lag cuts it. No old weights are kept: the batch of
step t is fetched `lag` steps early, forwarded without gradient to note the ids, and waits in a queue with them. The
routing weights are those of the scores at step t, so routers keep learning. Source: V4 report, stability section; the
phases, the lag and the number of steps are not public and follow open reimplementations.

    NORMAL   each step fetches its batch and routes live
    ACTIVE   each step fetches and routes one batch ahead, and trains on the oldest one with the ids it waited with
    DRAIN    each step trains on a waiting batch with live routing, until none waits; then NORMAL again

While batches wait the queue is the only consumer of the data, and the data position of a checkpoint is that of the
oldest of them, so a killed run neither skips nor repeats one.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rorqual.parallel.pipeline import Pipeline
from rorqual.train.feed import Rows


class Phase(StrEnum):
    """See the module's head."""

    NORMAL = "normal"
    ACTIVE = "active"
    DRAIN = "drain"


Batch = TypeVar("Batch")
Ids = Any
"""What a routing pass notes about a batch: for the loop, the ids of each micro-batch (None for another process's)."""


@dataclass
class Waiting(Generic[Batch]):
    """A batch fetched ahead."""

    batch: Batch
    ids: Ids
    made_at: int
    """Optimizer steps that the weights which chose the ids had behind them."""
    position: dict[str, Any]
    """Where the data stood before this batch was fetched."""


class AnticipatoryRouting(Generic[Batch]):
    """The queue and its phases. `fetch(tokens)` takes the data's next batch, for the moment when `tokens` are consumed
    (None when the run is over by then); `route(batch)` notes its experts; `position()` is where the data stands;
    `size(batch)` its tokens.
    """

    def __init__(
        self,
        fetch: Callable[[int], Batch | None],
        route: Callable[[Batch], Ids],
        position: Callable[[], dict[str, Any]],
        size: Callable[[Batch], int],
        *,
        lag: int,
    ) -> None:
        self._fetch, self._route, self._position, self._size = fetch, route, position, size
        self.lag = lag
        self.phase = Phase.NORMAL
        self.steps_left = 0
        self.queue: deque[Waiting[Batch]] = deque()

    def start(self, steps: int, now: int, tokens: int) -> None:
        """Begin `steps` active steps at optimizer step `now`, with `tokens` consumed: fetches `lag` batches ahead."""
        assert self.phase is Phase.NORMAL and not self.queue and steps > 0
        self.phase, self.steps_left = Phase.ACTIVE, steps
        for _ in range(self.lag):
            self._fetch_ahead(now, tokens)

    def stop(self) -> None:
        """Drop everything: the weights and the data position are being rolled back."""
        self.phase, self.steps_left = Phase.NORMAL, 0
        self.queue.clear()

    def next(self, now: int, tokens: int) -> tuple[Batch, Ids | None, int | None]:
        """The batch of step `now` (0-based), the ids it must use (None: route live) and how old they are in steps."""
        if self.phase is Phase.NORMAL:
            batch = self._fetch(tokens)
            assert batch is not None, "the run is over"
            return batch, None, None
        if self.phase is Phase.ACTIVE:
            self._fetch_ahead(now, tokens)
        oldest = self.queue.popleft()
        if self.phase is Phase.DRAIN:
            return oldest.batch, None, None
        age = now - oldest.made_at
        assert 0 <= age <= self.lag, (now, oldest.made_at, self.lag)
        return oldest.batch, oldest.ids, age

    def step_done(self) -> Phase | None:
        """Count a finished step; returns the phase that begins now, or None when nothing changes."""
        before = self.phase
        if self.phase is Phase.ACTIVE:
            self.steps_left -= 1
            if self.steps_left == 0:
                self.phase = Phase.DRAIN
        if self.phase is Phase.DRAIN and not self.queue:
            self.phase = Phase.NORMAL
        return None if self.phase is before else self.phase

    def _fetch_ahead(self, now: int, tokens: int) -> None:
        position = self._position()
        batch = self._fetch(tokens + sum(self._size(waiting.batch) for waiting in self.queue))
        if batch is not None:  # otherwise the queue holds the run's last batches
            self.queue.append(Waiting(batch, self._route(batch), now, position))

    def position(self) -> dict[str, Any]:
        """The data position that a checkpoint must keep: before the oldest waiting batch."""
        return self.queue[0].position if self.queue else self._position()

    def state_dict(self) -> dict[str, Any]:
        """Phase and ages, as plain values; the ids themselves are tensors (`tensors`)."""
        return {"phase": str(self.phase), "steps_left": self.steps_left, "made_at": [w.made_at for w in self.queue]}

    def load_state_dict(
        self, state: Mapping[str, Any], tokens: int, ids: Callable[[int, Batch], Ids | None] = lambda index, batch: None
    ) -> None:
        """Fetch again what waited, the data standing where `position` said.

        `ids(i, batch)` returns what was noted for the i-th waiting batch, or None to note it anew with the present
        weights (where the processes have changed).
        """
        self.stop()
        self.phase, self.steps_left = Phase(state["phase"]), state["steps_left"]
        for index, made_at in enumerate(state["made_at"]):
            position = self._position()
            batch = self._fetch(tokens + sum(self._size(waiting.batch) for waiting in self.queue))
            assert batch is not None
            noted = ids(index, batch)
            self.queue.append(Waiting(batch, self._route(batch) if noted is None else noted, made_at, position))


def narrow(ids: Tensor, num_experts: int) -> Tensor:
    """Expert ids in the smallest integer type that holds them; they wait by the million."""
    for dtype, limit in ((torch.uint8, 1 << 8), (torch.int16, 1 << 15)):
        if num_experts <= limit:
            return ids.to(dtype)
    return ids.to(torch.int32)


@torch.no_grad()
def route_only(model: Any, rows: Rows, *, dense: bool, pipeline: Pipeline | None = None) -> dict[str, Tensor]:
    """The experts that `rows` (on the model's device) would use now, by learned router: [B, S, A] on the CPU, narrow.

    MTP's routers are among them, and in a `pipeline` only those of this stage. Nothing of the model changes: no
    gradients, counts or random draws.
    """
    from rorqual.model import Trace
    from rorqual.train.losses import forward_mtp

    trace = Trace(dense=dense, router=True, router_ids=True)
    was_training = model.training
    model.eval()

    def compute(_: int, streams: Tensor | None) -> Tensor:
        where = {"segment_ids": rows.segment_ids, "lengths": rows.lengths}
        out: Tensor = model.forward_streams(rows.tokens, **where, trace=trace, streams=streams)
        for module in forward_mtp(model, out, rows, trace):
            out = module
        return out.new_zeros(1) if model.is_last else out

    try:
        if pipeline is None:
            compute(0, None)
        else:
            pipeline.relay(rows.tokens, compute)
    finally:
        model.train(was_training)
    return {
        record.name: narrow(record.experts, record.counts.shape[0]).cpu()
        for record in trace.routers
        if record.experts is not None and not record.is_hash
    }
