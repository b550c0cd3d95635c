"""Spike detection and anticipatory routing in a run: what they need from it, and where they take hold.

`stability.py` decides and `anticipatory.py` keeps the queue; this file gives them the run's data, weights and
checkpoints, on every rank alike.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rorqual.model import Transformer
from rorqual.parallel.mesh import Mesh, gather_objects
from rorqual.parallel.zero import Shard
from rorqual.train import checkpoints, snapshots
from rorqual.train.anticipatory import AnticipatoryRouting, Phase
from rorqual.train.checkpoints import Progress, Saved
from rorqual.train.config import TrainConfig
from rorqual.train.executor import Executor, Experts, load_weights
from rorqual.train.feed import Feed, Rows
from rorqual.train.pieces import Piece, whole
from rorqual.train.schedules import Schedule
from rorqual.train.stability import Event, Stability, scaled

_QUEUE = "routing"
"""Prefix of the waiting ids' names in a checkpoint: `routing/BATCH/MICRO_BATCH/ROUTER`."""


@dataclass(frozen=True)
class StepRows:
    """All rows of one step, and the tokens consumed before it."""

    rows: Rows
    tokens: int


class Run(Protocol):
    """The parts of a training run that are steered."""

    config: TrainConfig
    folder: Path
    mesh: Mesh
    schedule: Schedule
    model: Transformer
    executor: Executor
    feed: Feed
    progress: Progress

    def rows_at_once(self, seq_len: int) -> int:
        """Rows of a micro-batch."""

    def weights_replaced(self) -> None:
        """Called after weights were put back."""


class Steering:
    """One for each run; `next_rows`, `after_step`, and the state for checkpoints."""

    def __init__(self, run: Run, shards: dict[str, Shard]) -> None:
        self.run, self.shards = run, shards
        s, total_steps = run.config.stability, run.schedule.total_steps()
        active_steps = scaled(s.active_steps, 500, total_steps, 10)
        self.routing: AnticipatoryRouting[StepRows] = AnticipatoryRouting(
            self._fetch, self._route, lambda: run.feed.state_dict(), lambda step: step.rows.tokens.numel(),
            lag=scaled(s.lag, 16, total_steps, 100),
        )  # fmt: skip
        self.stability = Stability(
            s, self, self.routing,
            active_steps=active_steps,
            cooldown=scaled(s.cooldown_steps, 500, total_steps, 10),
            state_bytes=3 * sum(p.numel() * p.element_size() for p in run.model.parameters()),
        )  # fmt: skip

    # ------------------------------------------------------------------ the loop's side

    def next_rows(self) -> tuple[Rows, Sequence[Experts] | None, int | None]:
        """The rows of the coming step, the expert ids they must use (None: route live) and the ids' age in steps."""
        self.stability.begin_step()
        batch, ids, age = self.routing.next(self.run.progress.step, self.run.progress.tokens)
        assert batch.tokens == self.run.progress.tokens
        return batch.rows, ids, age

    def after_step(self, record: Mapping[str, Any]) -> list[Event]:
        """See `Stability.after_step`; events also tell the tokens consumed now."""
        events = self.stability.after_step(record)
        return [Event({**e.record, "tokens": self.run.progress.tokens}, e.text) for e in events]

    @property
    def rolled_back(self) -> bool:
        """Whether the last `after_step` put the run back to an earlier step."""
        return self.stability.rolled_back

    @property
    def phase(self) -> Phase:
        """Phase of anticipatory routing."""
        return self.routing.phase

    # ------------------------------------------------------------------ checkpoints

    def feed_state(self) -> dict[str, Any]:
        """The data position a checkpoint keeps: of the oldest batch that was not trained on."""
        return self.routing.position()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps as plain values."""
        return self.stability.state_dict()

    def pieces(self) -> list[Piece]:
        """The waiting expert ids of a run on one rank. With several, each has only its own; a resumed run notes them
        anew.
        """
        if not self.run.mesh.is_alone:
            return []
        return [
            whole(f"{_QUEUE}/{i}/{j}/{name}", ids)
            for i, waiting in enumerate(self.routing.queue)
            for j, micro in enumerate(waiting.ids)
            for name, ids in micro.items()
        ]

    def load(self, saved: Saved) -> None:
        """Take over a checkpoint's state; the feed stands where the checkpoint says."""
        if not saved.stability:
            return
        self.stability.load_state_dict(saved.stability)
        tensors = {name: saved.optimizer[name] for name in saved.optimizer if name.startswith(f"{_QUEUE}/")}

        def ids(index: int, batch: StepRows) -> list[Experts] | None:
            if not tensors or not self.run.mesh.is_alone:
                return None
            found: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                _, i, j, router = name.split("/", 3)
                if int(i) == index:
                    found.setdefault(int(j), {})[router] = value
            return [found[j] for j in sorted(found)]

        self.routing.load_state_dict(saved.stability["routing"], self.run.progress.tokens, ids)

    # ------------------------------------------------------------------ what the queue asks for

    def _fetch(self, tokens: int) -> StepRows | None:
        schedule = self.run.schedule
        if tokens >= schedule.total_tokens:
            return None
        return StepRows(self.run.feed.next_rows(schedule.rows(tokens), schedule.seq_len(tokens)), tokens)

    def _route(self, step: StepRows) -> list[Experts]:
        at_once = self.run.rows_at_once(step.rows.tokens.shape[1])
        return self.run.executor.route(step.rows, at_once, dense=self.run.schedule.is_dense(step.tokens))

    # ------------------------------------------------------------------ what decisions ask for (`stability.Steered`)

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.run.progress

    def capture(self) -> snapshots.Snapshot:
        """A copy of the run in memory."""
        return snapshots.take(self.run.model, self._optimizers(), self.feed_state(), self.run.progress)

    def restore(self, state: Any) -> None:
        """Put a copy back."""
        snapshots.put_back(state, self.run.model, self._optimizers())
        self._moved(state.progress, state.feed)

    def restore_checkpoint(self, newest: int) -> bool:
        """Put back the newest checkpoint on disk of at most `newest` steps; rank 0 looks for it."""
        run = self.run
        found = checkpoints.newest_until(run.folder, newest) if run.mesh.is_main else None
        path = gather_objects(None if found is None else found.folder, run.mesh)[0]
        if path is None:
            return False
        saved = found or checkpoints.read(path)
        with saved.weights, saved.optimizer:
            load_weights(run.model, saved.weights, self.shards)
            run.executor.load_optimizer(saved.optimizer)
        torch.set_rng_state(saved.torch_rng)
        self._moved(saved.progress, saved.feed)
        return True

    def drop_checkpoints_after(self, step: int) -> None:
        """Remove checkpoints of more steps, once every rank has read what it needs."""
        gather_objects(None, self.run.mesh)
        if self.run.mesh.is_main:
            checkpoints.drop_after(self.run.folder, step)
        gather_objects(None, self.run.mesh)

    def _optimizers(self) -> dict[str, Any]:
        executor = self.run.executor
        return {"muon": executor.muon, "adamw": executor.adamw, "tables": executor.tables}

    def _moved(self, progress: Progress, feed: dict[str, Any]) -> None:
        run = self.run
        run.progress = dataclasses.replace(progress, train_seconds=run.progress.train_seconds)
        run.feed.load_state_dict(feed)
        run.weights_replaced()
