"""Rollouts while the trainer works, with a bound on how old the weights are that drew a token.

A batch is `batch_groups` groups, and each is trained on once, before weights are published. Batches are numbered in the
order in which their prompts come; group i belongs to batch i // batch_groups, which is begun only once max_staleness
publications or fewer lie between its begin and its training. So the bound holds by when groups begin, and nothing need
be thrown away: the trainer waits for the slowest of a batch. Taking whatever is finished instead (`order="finished"`)
waits less, drops groups that have grown too old, and these are long ones: it favours short answers, as restarts do.
Source: training specification, sections 13.1 and 13.4.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, get_args

from torch import Tensor

from rorqual.engine import SamplingParams
from rorqual.errors import ConfigError
from rorqual.posttrain.rollouts import Prompt, Rollout, RolloutWorker

Order = Literal["begun", "finished"]
Group = list[Rollout]

POLL_S = 0.1
"""Seconds between two looks at whether the trainer is to stop."""


class RolloutStream:
    """Batches of groups for one trainer; the engine works on the next ones meanwhile.

        with RolloutStream(worker, prompts, group_size=8, batch_groups=32, max_staleness=1) as stream:
            while batch := stream.batch():
                ...                                   # an update
                stream.publish(model.state_dict())    # running rollouts go on with these weights

    max_staleness: most publications between the weights that drew a token and those that are trained with it; 0 makes
    generation and training take turns. order: `begun` or `finished`, see above. keep_states: see `Engine.load_weights`.
    `dropped` counts groups that were too old, `staleness` tokens by their age in versions when they were trained on,
    `waited_s` the seconds that the trainer waited, `engine_idle_s` those in which no group was under way. sampling: the
    same for all, or a function of the prompt. A failure of any group is raised by whatever the trainer calls next, at
    once where it waits.
    Raises: ConfigError for numbers that cannot work.
    """

    def __init__(
        self,
        worker: RolloutWorker,
        prompts: Iterable[Prompt],
        group_size: int,
        sampling: SamplingParams | Callable[[Prompt], SamplingParams] | None = None,
        *,
        batch_groups: int,
        max_staleness: int = 1,
        order: Order = "begun",
        keep_states: bool = False,
    ) -> None:
        if batch_groups < 1 or max_staleness < 0 or order not in get_args(Order):
            raise ConfigError(
                f"a stream with batch_groups={batch_groups}, max_staleness={max_staleness} and order={order!r} cannot "
                "work. Use at least 1 group, a staleness from 0, and the order 'begun' or 'finished'."
            )
        self.worker, self._prompts = worker, iter(prompts)
        self._group_size, self._sampling = group_size, sampling
        self._batch_groups, self.max_staleness, self._order = batch_groups, max_staleness, order
        self._keep_states = keep_states
        self._threads = ThreadPoolExecutor((max_staleness + 1) * batch_groups, thread_name_prefix="rorqual-rollouts")
        self._changed = threading.Condition()  # whose lock may be taken twice: a group may end while it is begun
        self._failure: BaseException | None = None
        self._running = 0
        self._idle_since = time.monotonic()
        self._waiting: deque[Future[Group]] = deque()
        self._begun = self._published = self.dropped = 0
        self._is_dry = False
        self.staleness: Counter[int] = Counter()
        self.waited_s = self.engine_idle_s = 0.0
        self._admit()

    @property
    def version(self) -> int:
        """Of the weights that the engine has, and the trainer trains."""
        return self.worker.engine.policy_version

    def batch(self, should_stop: Callable[[], bool] = lambda: False) -> list[Group]:
        """The next groups to train on; fewer at the end of the prompts, and then none; none when asked to stop.

        Raises: what a rollout did, of whatever batch.
        """
        began = time.monotonic()
        out: list[Group] = []
        while len(out) < self._batch_groups:
            self._admit()
            future = self._next(should_stop)
            if future is None:
                if should_stop():
                    return []
                break
            group = future.result()
            if self.age(group) > self.max_staleness:
                self.dropped += 1
                continue
            out.append(group)
        self.waited_s += time.monotonic() - began
        for group in out:
            for rollout in group:
                drawn = zip(rollout.versions, rollout.trajectory.mask, strict=True)
                self.staleness.update(self.version - version for version, chosen in drawn if chosen)
        return out

    def publish(self, weights: Mapping[str, Tensor] | None = None, version: int | None = None) -> int:
        """Give the engine the weights of the update that was just made; their version, one more unless given.

        weights: names as in `state_dict`; None where engine and trainer share a model. Returns once they are in use.
        """
        self.check()
        version = self.version + 1 if version is None else version
        engine = self.worker.engine
        if weights is None:
            engine.change_weights(lambda: None, version, keep_states=self._keep_states).result()
        else:
            engine.load_weights(weights, version, keep_states=self._keep_states).result()
        with self._changed:
            self._published += 1
        self._admit()
        return version

    def check(self) -> None:
        """Raises: the first failure of a rollout, if there was one."""
        if self._failure is not None:
            raise self._failure

    def age(self, group: Group) -> int:
        """Versions between the oldest token of a group and the present weights."""
        return self.version - min(rollout.oldest_version for rollout in group)

    def close(self) -> None:
        """End what runs, and the worker with it."""
        self._is_dry = True
        self.worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> RolloutStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[list[Group]]:
        """Batches until the prompts end; the caller publishes after each."""
        while batch := self.batch():
            yield batch

    def _admit(self) -> None:
        """Begin the groups that may be begun: those that can still be trained on in time."""
        with self._changed:
            most = (self._published + self.max_staleness + 1) * self._batch_groups + self.dropped
            while self._begun < most and not self._is_dry:
                prompt = next(self._prompts, None)
                if prompt is None:
                    self._is_dry = True
                    return
                if not self._running:
                    self.engine_idle_s += time.monotonic() - self._idle_since
                self._running += 1
                self._begun += 1
                future = self._threads.submit(self._generate, prompt)
                self._waiting.append(future)
                future.add_done_callback(self._ended)

    def _generate(self, prompt: Prompt) -> Group:
        how = self._sampling(prompt) if callable(self._sampling) else self._sampling
        [group] = self.worker.generate([prompt], self._group_size, how)
        return group

    def _ended(self, future: Future[Group]) -> None:
        """A group is whole, or failed; called by its thread."""
        with self._changed:
            self._running -= 1
            if not self._running:
                self._idle_since = time.monotonic()
            if self._failure is None and not future.cancelled():
                self._failure = future.exception()
            self._changed.notify_all()

    def _next(self, should_stop: Callable[[], bool]) -> Future[Group] | None:
        """The group to take next; None where no more will come, or when asked to stop."""
        with self._changed:
            while self._waiting:
                self.check()
                open_to = [self._waiting[0]] if self._order == "begun" else self._waiting
                ready = next((future for future in open_to if future.done()), None)
                if ready is not None:
                    self._waiting.remove(ready)
                    return ready
                if should_stop():
                    return None
                self._changed.wait(POLL_S)
        return None
