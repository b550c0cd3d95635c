"""Rollouts: prompts in, groups of trajectories out, drawn by the engine that also says what each token was drawn from.

The number that decides a token is a function of the rollout's id and of the token's position alone, so neither batch
nor preemption nor a crash changes a rollout. Interrupted ones go on where they broke off, from the engine's saved state
or by reading prompt and tokens once; none is begun again, which would favour short answers: with failures at rate rho a
token, one of length l comes through with probability exp(-rho * l).
Source: training specification, sections 12.4, 13.1 and 13.4. With tools: `rollouts_agent`; while a trainer
works: `rollouts_stream`; on other machines: `rollouts_cluster`, `rollouts_server`.

S ids of a trajectory, L learned routers, A experts a token.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine import Engine, Request, SamplingParams, TokenEvent, Trajectory
from rorqual.errors import ConfigError, RequestError
from rorqual.posttrain.rollout_log import Drawn, RolloutLog
from rorqual.seeds import derive

GIVEN = -1
"""The version of tokens that no weights drew."""


@dataclass(frozen=True)
class Prompt:
    """What a group answers. id: unique within a run (a prompt that comes again needs another one, such as
    `step3/sum17`), since draws and the log go by it. data: what the reward needs to know.
    """

    id: str
    ids: tuple[int, ...]
    data: Any = None


@dataclass
class Rollout:
    """One answer with all that training needs. Lists are one entry an id of the trajectory, prompt included.

    trajectory: ids, mask, and log probabilities under the distribution that each was drawn from (pi_old).
    group: number of its prompt in the call that made it; index: its own among the group's.
    reward: None where nobody gave one.
    routing: by the router's module path int16 [S - 1, A], experts of the tokens that were read (the last never is);
        None unless asked for.
    sampling_masks: ids that could have been drawn in the token's place, None for all of them; None unless asked for.
    versions: of the weights that drew each id, GIVEN for those that were given.
    truncated: it ended by its length, not by an end token.
    """

    trajectory: Trajectory
    prompt_id: str
    group: int
    reward: float | None = None
    routing: dict[str, NDArray[np.int16]] | None = None
    sampling_masks: list[NDArray[np.int32] | None] | None = None
    versions: list[int] = field(default_factory=list)
    truncated: bool = False
    index: int = 0

    @property
    def id(self) -> str:
        """Of this rollout, unique as its prompt's is."""
        return rollout_id(self.prompt_id, self.index)

    @property
    def answer(self) -> list[int]:
        """The ids that were drawn."""
        return [token for token, chosen in zip(self.trajectory.ids, self.trajectory.mask, strict=True) if chosen]

    @property
    def oldest_version(self) -> int:
        """Of the weights that drew its first token."""
        return min((version for version in self.versions if version != GIVEN), default=0)


Reward = Callable[[Prompt, Rollout], float]


def rollout_id(prompt_id: str, index: int) -> str:
    """The id of answer `index` to a prompt: what its draws go by."""
    return f"{prompt_id}/{index}"


@dataclass(eq=False)
class _Run:
    """A rollout under way; `drawn` is shared with the log's picture of it, where there is one."""

    prompt: Prompt
    group: int
    index: int
    seed: int
    ended: queue.SimpleQueue[_Run]
    drawn: Drawn = field(default_factory=Drawn)
    number: int = 0
    request: Request | None = None
    saved: bytes | None = None
    saved_version: int = 0
    ending: str | None = None
    error: Exception | None = None

    @property
    def id(self) -> str:
        return rollout_id(self.prompt.id, self.index)


class RolloutWorker:
    """Makes rollouts with one engine.

    seed: of all draws, together with the rollouts' ids. log: where tokens go as they come, and where a worker that is
    opened anew finds them. reward: called once for each finished rollout. keep_masks, keep_routing: record what
    `Rollout.sampling_masks` and `Rollout.routing` hold. in_flight: most rollouts submitted at a time, by all callers.
    Threads may share it. Raises: ConfigError for limits that would let no rollout run.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        seed: int = 0,
        log: RolloutLog | None = None,
        reward: Reward | None = None,
        keep_masks: bool = False,
        keep_routing: bool = False,
        in_flight: int | None = None,
    ) -> None:
        self.engine, self.seed, self.log, self.reward = engine, seed, log, reward
        self.keep_masks, self.keep_routing = keep_masks, keep_routing
        self.router_names = router_names(engine.model) if keep_routing else ()
        self.in_flight = 2 * engine.max_running if in_flight is None else in_flight
        if self.in_flight < 1:
            raise ConfigError(f"in_flight is {in_flight}, so no rollout could run. Set it to 1 or more.")
        self._every = None if engine.num_choices == engine.vocab_size else np.arange(engine.num_choices, dtype=np.int32)
        self._lock = threading.Lock()
        self._may_run = threading.Event()
        self._may_run.set()
        self._active: dict[str, _Run] = {}
        self._places = threading.BoundedSemaphore(self.in_flight)
        self._is_closed = False
        self.preemptions = 0

    # ------------------------------------------------------------- generation

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingParams | None = None
    ) -> Iterator[list[Rollout]]:
        """Groups of `group_size` answers, in the order in which they are complete; durable where there is a log.

        What the log has of them is not drawn again. Closing the iterator ends what still runs.
        Raises: RequestError for settings that would make rollouts nobody could train on or resume, or what the engine
        raised; JournalError when tokens cannot be written down.
        """
        params = self._params(sampling or SamplingParams())
        check_prompts(prompts, group_size)
        ended: queue.SimpleQueue[_Run] = queue.SimpleQueue()
        waiting = deque(
            _Run(prompt, group, index, derive(self.seed, "rollout", rollout_id(prompt.id, index)), ended)
            for group, prompt in enumerate(prompts)
            for index in range(group_size)
        )
        groups: dict[int, list[Rollout]] = {group: [] for group in range(len(prompts))}
        mine: set[_Run] = set()
        try:
            while waiting or mine:
                while waiting and self._places.acquire(blocking=not mine):
                    run = waiting.popleft()
                    mine.add(run)
                    self._open(run, params)
                    self._go_on(run, params)
                run = ended.get()
                if run.error is not None:
                    raise run.error
                if run.ending is None:
                    self._go_on(run, params)
                    continue
                mine.remove(run)
                self._places.release()
                group = groups[run.group]
                group.append(self._finish(run))
                if len(group) == group_size:
                    if self.log is not None:
                        self.log.commit()
                    yield sorted(groups.pop(run.group), key=lambda rollout: rollout.index)
        finally:
            for run in mine:
                self._places.release()
                self._forget(run)

    def _params(self, sampling: SamplingParams) -> SamplingParams:
        if sampling.temperature == 0:
            raise RequestError(
                "temperature is 0, so all answers of a group would be the same and none of them drawn from anything. "
                "Set it above 0; training uses 1.",
                param="temperature",
            )
        if sampling.stop:
            raise RequestError(
                "stop strings were given, and text that was begun before an interruption is not seen again. Give "
                "stop_token_ids.",
                param="stop",
            )
        return sampling.replace(logprobs=True, record=True, routing=self.keep_routing)

    def adopt(self, prompt: Prompt, index: int, sampling: SamplingParams, drawn: Drawn) -> None:
        """Take over what was drawn of a rollout elsewhere, so that `generate` goes on behind it. Needs a log.

        Raises: ConfigError without one; JournalError.
        """
        if self.log is None:
            raise ConfigError("a rollout begun elsewhere needs a log to be gone on with. Give the worker one.")
        id = rollout_id(prompt.id, index)
        settings = settings_of(self._params(sampling))
        number, _ = self.log.open(id, prompt.ids, derive(self.seed, "rollout", id), settings)
        self.log.adopt(number, drawn)

    def drawn_since(self, known: Mapping[str, tuple[int, int]]) -> dict[str, Drawn]:
        """What was drawn of the rollouts that run, behind the tokens and rows of experts that are known of each id."""
        parts = {run.id: run.drawn.since(*known.get(run.id, (0, 0))) for run in list(self._active.values())}
        return {id: part for id, part in parts.items() if part.ids or part.num_routed}

    def _open(self, run: _Run, params: SamplingParams) -> None:
        """Take over what the log has of a rollout."""
        if self.log is None:
            return
        run.number, run.drawn = self.log.open(run.id, run.prompt.ids, run.seed, settings_of(params))
        run.ending = self.log.ending(run.number)
        state = self.log.saved_state(run.number)
        if state is not None:
            run.saved, run.saved_version = state

    def _go_on(self, run: _Run, params: SamplingParams) -> None:
        """Submit the rest of a rollout, once that is allowed."""
        drawn = run.drawn
        most = self.engine.context_limit - len(run.prompt.ids) if params.max_tokens is None else params.max_tokens
        left = most - len(drawn.ids)
        if run.ending is None:
            last = drawn.ids[-1] if drawn.ids else None
            if last is not None and (last == self.engine.tokenizer.eos_token_id or last in params.stop_token_ids):
                run.ending = "stop"
            elif left <= 0:
                run.ending = "length"
        if run.ending is not None:
            run.ended.put(run)
            return
        saved = run.saved if run.saved_version == self.engine.policy_version else None
        run.saved = None
        while True:
            self._may_run.wait()
            with self._lock:
                if not self._may_run.is_set():
                    continue
                if self._is_closed:
                    raise _closed()
                run.request = self.engine.submit(
                    (*run.prompt.ids, *drawn.ids), params.replace(seed=run.seed, max_tokens=left),
                    listener=lambda event: self._take(run, event), wait=True, saved=saved,
                )  # fmt: skip
                self._active[run.id] = run
                return

    def _take(self, run: _Run, event: TokenEvent) -> None:
        """An event of a rollout; called by the engine's thread."""
        if run.error is not None:
            return  # which was told already
        try:
            if event.id is not None:
                self._keep(run, event)
        except Exception as error:
            run.error = error
            run.ended.put(run)  # at once: the request may have far to go, and is cancelled by who hears of it
            return
        if event.finish_reason is not None:
            if event.finish_reason in ("stop", "length"):
                run.ending = event.finish_reason
            elif event.finish_reason == "error":
                run.error = _error_of(run)
            elif run.request is not None:
                run.saved, run.saved_version = run.request.saved, self.engine.policy_version
            run.ended.put(run)

    def _keep(self, run: _Run, event: TokenEvent) -> None:
        assert event.id is not None and event.policy_logprob is not None
        support = None
        if self.keep_masks:
            support = self._every if event.support is None else event.support
        drawn = run.drawn
        experts = event.experts
        if experts is not None:  # rows end before this token; those of tokens read again are known
            first = len(run.prompt.ids) + len(drawn.ids) - len(experts)
            experts = experts[max(0, drawn.num_routed - first) :]
        if self.log is not None:
            self.log.token(run.number, drawn, event.id, event.policy_logprob, event.policy_version, support, experts)
        drawn.add(event.id, event.policy_logprob, event.policy_version, support, experts)

    def _finish(self, run: _Run) -> Rollout:
        assert run.ending is not None
        rollout = rollout_of(run.prompt.ids, run.drawn, self.router_names, keep_masks=self.keep_masks)
        rollout.group, rollout.index = run.group, run.index
        settle(rollout, run.prompt, run.ending, self.reward, self.log, run.number)
        self._active.pop(run.id, None)
        return rollout

    def _forget(self, run: _Run) -> None:
        if run.request is not None:
            run.request.cancel()
            with contextlib.suppress(RequestError):
                run.request.result()
        self._active.pop(run.id, None)

    # ----------------------------------------------------- preemption, weights

    def pause(self, *, on_disk: bool = False) -> int:
        """Give the machine back: every rollout stops at its next token and keeps its state; how many there were.

        on_disk: states go into the log's folder, where a worker of another process finds them.
        """
        with self._lock:
            self._may_run.clear()
            runs = [run for run in self._active.values() if run.request is not None and not run.request.finished]
            for run in runs:
                assert run.request is not None
                run.request.suspend()
        for run in runs:
            assert run.request is not None
            with contextlib.suppress(RequestError):
                run.request.result()
            if on_disk and self.log is not None and run.request.saved is not None:
                self.log.save_state(run.number, run.request.saved, run.drawn, self.engine.policy_version)
        self.preemptions += len(runs)
        if self.log is not None:
            self.log.commit()
        return len(runs)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._may_run.set()

    def preempt(self, rollout: str, *, keep_state: bool = True) -> bool:
        """Interrupt one rollout by its id; it goes on from its state, or without it by reading its tokens once.

        False when it does not run.
        """
        run = self._active.get(rollout)
        if run is None or run.request is None or run.request.finished:
            return False
        if keep_state:
            run.request.suspend()
        else:
            run.request.cancel()
        self.preemptions += 1
        return True

    def close(self) -> None:
        """End all that runs: whoever waits for it gets a RequestError of status 503. The engine and the log stay."""
        with self._lock:
            self._is_closed = True
            runs = [run for run in self._active.values() if run.request is not None]
        self._may_run.set()
        for run in runs:
            assert run.request is not None
            run.request.cancel()

    @property
    def running(self) -> dict[str, int]:
        """Tokens drawn so far of the rollouts that run, by id."""
        return {run.id: len(run.drawn.ids) for run in list(self._active.values())}

    def update_weights(self, weights: Mapping[str, Tensor], version: int, *, keep_states: bool = False) -> Future[None]:
        """New weights for the engine, between two tokens of whatever runs; see `Engine.load_weights`."""
        return self.engine.load_weights(weights, version, keep_states=keep_states)


def rollout_of(prompt: Sequence[int], drawn: Drawn, names: Sequence[str], *, keep_masks: bool) -> Rollout:
    """What was drawn as a rollout, without what the caller knows of it."""
    trajectory = Trajectory()
    trajectory.add_given(prompt)
    trajectory.add_chosen(drawn.ids, drawn.logprobs, drawn.versions[-1] if drawn.versions else 0)
    routing = None
    if names:
        rows = drawn.experts()[: len(trajectory) - 1]
        routing = {name: rows[:, layer] for layer, name in enumerate(names)}
    return Rollout(
        trajectory, "", 0, None, routing,
        [*[None] * len(prompt), *drawn.supports] if keep_masks else None,
        [*[GIVEN] * len(prompt), *drawn.versions],
    )  # fmt: skip


def settle(
    rollout: Rollout, prompt: Prompt, ending: str, reward: Reward | None, log: RolloutLog | None, number: int
) -> None:
    """What follows the last token: the reward, once, and its end in the log."""
    rollout.prompt_id, rollout.truncated = prompt.id, ending == "length"
    rollout.reward = None if log is None else log.reward(number)
    if reward is not None and rollout.reward is None:
        rollout.reward = reward(prompt, rollout)
    if log is not None:
        log.close_rollout(number, prompt.id, rollout.index, ending, rollout.reward)


def router_names(model: Any) -> tuple[str, ...]:  # a Transformer
    """Module paths of the learned routers in the order of the layers: those that `Trace.forced` needs."""
    return tuple(f"layers.{spec.index}.ffn.gate" for spec in model.cfg.layers if not spec.hash_routed)


def check_prompts(prompts: Sequence[Prompt], group_size: int) -> None:
    """Raises: RequestError for prompts that share an id, or a group of nobody."""
    if group_size < 1:
        raise RequestError(f"group_size is {group_size}, so there is nothing to generate. Set it to 1 or more.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise RequestError(
                f"two prompts have the id {prompt.id!r}, so their rollouts would be the same ones. Give each use of a "
                "prompt an id of its own."
            )
        seen.add(prompt.id)


def settings_of(params: SamplingParams) -> dict[str, Any]:
    """What of the settings decides the tokens, for the record."""
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens")
    how: dict[str, Any] = {name: getattr(params, name) for name in names}
    return {**how, "stop": list(params.stop_token_ids), "suppressed": list(params.suppress_token_ids)}


def _closed() -> RequestError:
    return RequestError(
        "the rollout worker was closed, so this rollout is unfinished. Its log has what was drawn for a new worker.",
        status=503,
        type="server_error",
    )


def _error_of(run: _Run) -> Exception:
    error = None if run.request is None else run.request.error
    return error or RequestError(f"the engine failed at rollout {run.id}.", status=500, type="server_error")
