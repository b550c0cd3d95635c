"""What a run does about loss spikes: watch the loss, go back to a good state, route ahead for a while, go on.

After every step the detector (`spikes.py`) sees the loss. On a spike, or a loss that is no number, the run goes back to
the newest state whose weights had still given a normal loss (kept in memory every so often, or a checkpoint on disk),
and trains the next steps with anticipatory routing (`anticipatory.py`); going back alone meets the same spike again.
Everything is written to metrics.jsonl as events. All processes see the same losses and so decide alike.
Source: V4 report, stability section.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from rorqual import log
from rorqual.train.anticipatory import AnticipatoryRouting, Batch, Phase
from rorqual.train.checkpoints import Progress
from rorqual.train.config import StabilitySection
from rorqual.train.spikes import Spike, SpikeDetector, Thresholds

logger = log.get(__name__)

DETECT_LATE = 2
"""The loss of step k is that of the weights after step k - 1. A state to go back to must be older still, so that its
own weights have given a normal loss."""


class State(Protocol):
    """A state of the whole run, kept in memory."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""


class Steered(Protocol):
    """What the run must let itself be told."""

    @property
    def progress(self) -> Progress:
        """Where the run stands."""

    def capture(self) -> State:
        """A copy of everything that later steps depend on."""

    def restore(self, state: State) -> None:
        """Put a copy back."""

    def restore_checkpoint(self, newest: int) -> bool:
        """Put back the newest checkpoint on disk of at most `newest` steps; False when there is none."""

    def drop_checkpoints_after(self, step: int) -> None:
        """Remove checkpoints of more steps: a restart must not begin there."""


@dataclass(frozen=True)
class Event:
    """Something worth a line: for machines (`record`) and for people."""

    record: dict[str, Any]
    text: str


class Stability(Generic[Batch]):
    """Stands between the loop and its data and weights. `after_step` says what happened; `rolled_back` then tells
    whether the run stands at an earlier step.
    """

    def __init__(
        self,
        settings: StabilitySection,
        run: Steered,
        routing: AnticipatoryRouting[Batch],
        *,
        active_steps: int,
        cooldown: int,
        state_bytes: int,
    ) -> None:
        """`state_bytes`: about how large a state is in this process."""
        self.settings, self.run, self.routing = settings, run, routing
        self.active_steps, self.cooldown = active_steps, cooldown
        self.detector = SpikeDetector(
            Thresholds(
                trigger=settings.trigger,
                onset=settings.onset,
                min_rise=settings.min_rise,
                level_decay=settings.level_decay,
                trend_decay=settings.trend_decay,
                warmup=settings.warmup_steps,
                lookback=settings.lookback,
            )
        )
        self.rollbacks = 0
        self.cooldown_left = 0
        self.rolled_back = False
        self._reported: int | None = None
        self._states: list[State] = []
        wants_states = settings.detect and settings.snapshot_every > 0 and settings.max_rollbacks > 0
        self._most_states = int(settings.snapshot_gib * 2**30 // max(state_bytes, 1)) if wants_states else 0
        if wants_states and self._most_states < 2:  # one old enough, and a newer one to take its place
            logger.warning(
                "A state of this run takes %.1f GiB, and two of them more than stability.snapshot_gib %.1f; after a "
                "spike the run goes back to a checkpoint on disk.", state_bytes / 2**30, settings.snapshot_gib,
            )  # fmt: skip
            self._most_states = 0

    def begin_step(self) -> None:
        """Before a step's data is asked for: copy the state when that is due, and begin routing ahead at a set step."""
        step, tokens = self.run.progress.step, self.run.progress.tokens
        is_normal = self.routing.phase is Phase.NORMAL
        if self._most_states and is_normal and step % self.settings.snapshot_every == 0 and self.detector.is_calm:
            self._keep_state()
        if step == self.settings.active_from and is_normal and self.active_steps:
            self.routing.start(self.active_steps, step, tokens)

    def _keep_state(self) -> None:
        """Besides the new one keep the newest that is older than a spike's begin can be, and what fits in between."""
        step = self.run.progress.step
        if self._states and self._states[-1].step >= step:
            return
        old = [state for state in self._states if state.step <= step - self.settings.lookback - DETECT_LATE]
        self._states = old[-1:] + self._states[len(old) :]
        while len(self._states) >= self._most_states:
            self._states.pop(1 if len(self._states) > 1 else 0)
        self._states.append(self.run.capture())

    def after_step(self, record: Mapping[str, Any]) -> list[Event]:
        """Look at a finished step (`step`, `lm`, `loss`) and act. A loss that is no number and cannot be undone makes
        an event `lost`: the caller ends the run.
        """
        self.rolled_back = False
        self.cooldown_left = max(self.cooldown_left - 1, 0)
        events = []
        began = self.routing.step_done()
        step = int(record["step"])
        if began is not None:
            events.append(_event("phase", step, f"anticipatory routing: {began}", phase=str(began)))
            if began is Phase.NORMAL:
                self.detector.reset()
        is_finite = math.isfinite(record["loss"]) and math.isfinite(record["lm"])
        if not is_finite:
            spike = self.detector.observe(step, math.nan)
        elif self.settings.detect and began is None and self.routing.phase is Phase.NORMAL:
            spike = self.detector.observe(step, record["lm"])
        else:
            spike = None
        if spike is not None and (not is_finite or self._reported != spike.onset):
            self._reported = spike.onset
            events += self._answer(spike, is_finite)
        return events

    def _answer(self, spike: Spike, is_finite: bool) -> list[Event]:
        loss = f"{spike.loss:.3f}, {spike.score:.1f} sigma above {spike.predicted:.3f}" if is_finite else "no number"
        found = _event(
            "spike", spike.step, f"step {spike.step}: the loss is {loss}; it began at step {spike.onset}",
            onset=spike.onset, loss=spike.loss if is_finite else None, predicted=spike.predicted,
            score=spike.score if math.isfinite(spike.score) else None,
        )  # fmt: skip
        s = self.settings
        if not s.detect:
            why = "stability.detect is off"
        elif self.rollbacks >= s.max_rollbacks:
            why = f"all {s.max_rollbacks} roll-backs (stability.max_rollbacks) are used up"
        elif is_finite and self.cooldown_left:
            why = f"the last roll-back was less than {self.cooldown} steps ago"
        else:
            source = self._go_back(spike.onset - DETECT_LATE)
            if source is not None:
                return [found, self._rolled_back(spike, source)]
            why = f"there is no state of step {spike.onset - DETECT_LATE} or before"
        name, text = ("kept on", "going on") if is_finite else ("lost", "the weights are no longer usable")
        return [found, _event(name, spike.step, f"step {spike.step}: {text}, because {why}", reason=why)]

    def _go_back(self, newest: int) -> str | None:
        """Put back the newest state of at most `newest` steps; returns where it came from."""
        kept = [state for state in self._states if state.step <= newest]
        if kept:
            self.run.restore(kept[-1])
            self._states = kept
            return "memory"
        self._states = []
        return "checkpoint" if self.run.restore_checkpoint(newest) else None

    def _rolled_back(self, spike: Spike, source: str) -> Event:
        progress = self.run.progress
        self.rollbacks += 1
        self.rolled_back = True
        self._reported = None
        self.cooldown_left = self.cooldown
        self.detector.reset()
        self.routing.stop()
        self.run.drop_checkpoints_after(progress.step)
        if self.active_steps:
            self.routing.start(self.active_steps, progress.step, progress.tokens)
        how = (
            f"{self.active_steps} steps with routing {self.routing.lag} ahead" if self.active_steps else "live routing"
        )
        return _event(
            "rollback", progress.step,
            f"back to step {progress.step} (from {source}), then {how}; roll-back {self.rollbacks} of at most "
            f"{self.settings.max_rollbacks}",
            from_step=spike.step, onset=spike.onset, source=source, rollbacks=self.rollbacks,
            active_steps=self.active_steps, lag=self.routing.lag,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values."""
        return {
            "detector": self.detector.state_dict(),
            "routing": self.routing.state_dict(),
            "rollbacks": self.rollbacks,
            "cooldown_left": self.cooldown_left,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over all but the queue, which `AnticipatoryRouting.load_state_dict` fills."""
        self.detector.load_state_dict(state["detector"])
        self.rollbacks, self.cooldown_left = state["rollbacks"], state["cooldown_left"]


def scaled(setting: int | None, usual: int, total_steps: int, share: int) -> int:
    """A number of steps: the setting, or the usual number but at most the run's `share`-th part."""
    return setting if setting is not None else min(usual, max(total_steps // share, 1))


def _event(name: str, step: int, text: str, **more: Any) -> Event:
    return Event({"event": name, "step": step, **more}, text)
