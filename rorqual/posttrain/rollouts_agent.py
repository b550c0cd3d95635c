"""Rollouts with tools: a rollout is an agent's run whose ids are kept, and its reward comes from what the run left.

Each has a journal of its own, as every run of an agent has (`agents/session.py`): turns go on at the token where they
broke off, calls whose results are on record are not made again, and the sandbox lives on or is restored. What training
needs besides (masks, experts, the version of each token) stands there too, in front of the tokens it belongs to.
Source: training specification, sections 13.1 to 13.4; sandbox specification for the order of writing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rorqual import log as logs
from rorqual.agents import (
    Environment,
    EnvironmentSettings,
    InfraFailed,
    Preempted,
    Session,
    SessionParts,
    Tool,
    ToolBox,
    TrajectoryLog,
    converse,
)
from rorqual.agents.environment import SandboxMaker
from rorqual.agents.loop import Answer
from rorqual.agents.models import Batch, Identity, Turn
from rorqual.agents.models.base import Resumption
from rorqual.agents.session import Limits
from rorqual.agents.tools import standard_tools
from rorqual.chat import suppressed_ids
from rorqual.engine import Engine, SamplingParams, TokenEvent
from rorqual.errors import RequestError, SandboxError
from rorqual.journal import Event, Journal
from rorqual.posttrain.rollout_log import pack_support, unpack_support
from rorqual.posttrain.rollouts import GIVEN, Rollout, rollout_id, router_names
from rorqual.tokenizer import Tokenizer

logger = logs.get(__name__)

POLL_S = 0.1


@dataclass(frozen=True)
class AgentPrompt:
    """A task for agents. id: unique within a run. messages: the opening ones. data: what the judge needs to know.

    environment: of the sandbox, as it is when the task begins.
    """

    id: str
    messages: Sequence[Mapping[str, Any]]
    data: Any = None
    environment: EnvironmentSettings = field(default_factory=EnvironmentSettings)


Judge = Callable[[AgentPrompt, Answer, Any], float]
"""The reward, from the task, the answer, and the live sandbox."""


class AgentRollouts:
    """Makes rollouts of agents with one engine, best one with a prefix cache: a turn begins behind the last one.

    folder: where journals go; what lies there already is gone on with. judge: called once for each finished run, with
    the sandbox as the run left it. tools: of every run. maker: of sandboxes. limits: tokens of a turn and of a run.
    parallel: runs at a time. Other arguments as for `RolloutWorker`; masks are kept unless that is said, since tokens
    that only prompts may have are never drawn.
    """

    def __init__(
        self,
        engine: Engine,
        folder: str | Path,
        judge: Judge,
        *,
        tools: Sequence[Tool] | None = None,
        maker: SandboxMaker | None = None,
        limits: Limits | None = None,
        max_turns: int = 50,
        thinking: bool = True,
        parallel: int = 8,
        seed: int = 0,
        keep_masks: bool = True,
        keep_routing: bool = False,
    ) -> None:
        self.engine, self.folder, self.judge = engine, Path(folder), judge
        self.tools = list(standard_tools() if tools is None else tools)
        self._maker, self.limits = maker, limits or Limits()
        self.max_turns, self.thinking = max_turns, thinking
        self.parallel, self.seed = parallel, seed
        self.keep_masks, self.keep_routing = keep_masks, keep_routing
        self._may_run, self._is_closed = threading.Event(), False
        self._may_run.set()
        self._lock = threading.Lock()  # of the two counters
        self.infra_failed = self.preemptions = 0

    def generate(
        self, prompts: Sequence[AgentPrompt], group_size: int, sampling: SamplingParams | None = None
    ) -> Iterator[list[Rollout]]:
        """Groups in the order of their prompts. A run that the platform ended is left out of its group, and counted in
        `infra_failed`: that says nothing about the answer.

        Raises: RequestError for a temperature of 0, or what ended a run otherwise, whichever run it was, at once.
        """
        params = sampling or SamplingParams()
        if params.temperature == 0:
            raise RequestError(
                "temperature is 0, so all runs of a group would be the same. Use 1.", param="temperature"
            )
        self._is_closed = False
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="rorqual-agent-rollouts") as threads:
            groups = [
                [threads.submit(self._rollout, prompt, group, index, params) for index in range(group_size)]
                for group, prompt in enumerate(prompts)
            ]
            try:
                running = {future for group in groups for future in group}
                for group in groups:
                    running = _await(group, running)
                    yield [made for future in group if (made := future.result()) is not None]
            finally:
                self._is_closed = True
                threads.shutdown(wait=False, cancel_futures=True)

    def pause(self) -> None:
        """Ask every run to stop at its next token; sandboxes rest, and `resume` goes on."""
        self._may_run.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._may_run.set()

    def _rollout(self, prompt: AgentPrompt, group: int, index: int, params: SamplingParams) -> Rollout | None:
        while True:
            while not self._may_run.wait(POLL_S) and not self._is_closed:
                pass
            try:
                return self._attempt(prompt, group, index, params)
            except Preempted:
                with self._lock:
                    self.preemptions += 1
                if self._is_closed:
                    raise
            except InfraFailed as error:
                with self._lock:
                    self.infra_failed += 1
                logger.warning("the rollout %s was ended by the platform: %s", rollout_id(prompt.id, index), error)
                return None

    def _attempt(self, prompt: AgentPrompt, group: int, index: int, params: SamplingParams) -> Rollout:
        """Run, or go on with, one rollout up to its end or a preemption."""
        id = rollout_id(prompt.id, index)
        folder = self.folder / hashlib.sha256(id.encode()).hexdigest()[:24]
        with contextlib.ExitStack() as stack:
            journal = stack.enter_context(Journal(folder / "journal"))
            log = TrajectoryLog(journal)
            if log.facts.closed is None:
                log.attach(f"{socket.gethostname()}:{os.getpid()}")
            elif log.facts.closed.stop_reason == "infra_failed":
                raise InfraFailed("this rollout was ended by the platform before.", {})
            backend = RolloutBackend(self.engine, params, log, thinking=self.thinking, routing=self.keep_routing)
            environment = Environment(self._sandboxes(), prompt.environment, log, id)
            stack.callback(environment.release)
            session = Session(
                SessionParts(
                    log, backend, ToolBox(self.tools), environment, folder / "outbox", id, self.seed,
                    limits=self.limits, stop=_Notice(lambda: self._is_closed or not self._may_run.is_set()),
                    accept_new_weights=True,
                )
            )  # fmt: skip
            try:
                answer = converse(session, prompt.messages, self.max_turns)
                self._judge(log, prompt, answer, environment)
            except InfraFailed:
                session.close("infra_failed")
                with contextlib.suppress(SandboxError, OSError):
                    environment.end()
                raise
            session.close(answer.ending)
            environment.end()
            return self._made(session, backend, log, prompt.id, group, index, answer)

    def _judge(self, log: TrajectoryLog, prompt: AgentPrompt, answer: Answer, environment: Environment) -> None:
        if log.facts.closed is None and log.facts.verdict is None:
            reward = float(self.judge(prompt, answer, environment.sandbox))
            log.write(log.event("verdict", verdict={"reward": reward}))

    def _made(
        self, session: Session, backend: RolloutBackend, log: TrajectoryLog, prompt_id: str, group: int, index: int,
        answer: Answer,
    ) -> Rollout:  # fmt: skip
        trajectory = session.trajectory()
        drawn = backend.drawn
        routing = None
        if self.keep_routing:
            rows = np.concatenate(drawn.experts)[: len(trajectory) - 1]
            routing = {name: rows[:, layer] for layer, name in enumerate(router_names(self.engine.model))}
        versions = [drawn.versions.get(at, 0) if chosen else GIVEN for at, chosen in enumerate(trajectory.mask)]
        masks = [drawn.supports.get(at) if chosen else None for at, chosen in enumerate(trajectory.mask)]
        reward = None if log.facts.verdict is None else float(log.facts.verdict["reward"])
        return Rollout(
            trajectory, prompt_id, group, reward, routing, masks if self.keep_masks else None, versions,
            answer.ending != "done", index,
        )  # fmt: skip

    def _sandboxes(self) -> Any:
        if self._maker is not None:
            return self._maker
        from rorqual.sandbox import Sandbox

        return Sandbox


def _await(
    group: Sequence[Future[Rollout | None]], running: set[Future[Rollout | None]]
) -> set[Future[Rollout | None]]:
    """What of `running` still runs, once a group is whole. Raises: the failure of any run, as soon as it is known."""
    while True:
        done, running = wait(running, timeout=0)
        for future in done:
            future.result()
        if all(future.done() for future in group):
            return running
        wait(running, return_when=FIRST_COMPLETED)


@dataclass
class DrawnTurns:
    """What an episode's tokens were drawn from, by position, and experts [n, L, A] of all tokens that were read."""

    supports: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    experts: list[NDArray[np.int16]] = field(default_factory=list)
    num_routed: int = 0
    masks: dict[bytes, NDArray[np.int32]] = field(default_factory=dict)

    def add(self, fields: Mapping[str, Any]) -> None:
        """What one event of the journal says."""
        if "mask" in fields:
            self.masks[fields["mask"]] = unpack_support(fields)
            return
        for offset, (version, mask) in enumerate(zip(fields["versions"], fields["masks"], strict=True)):
            at = fields["first"] + offset
            self.versions[at] = version
            if mask is not None:
                self.supports[at] = self.masks[mask]
        if fields["experts"] is not None:
            rows = np.frombuffer(fields["experts"], dtype="<i2").reshape(fields["shape"]).astype(np.int16)
            rows = rows[max(0, self.num_routed - fields["routed"]) :]
            if len(rows):
                self.experts.append(rows)
                self.num_routed += len(rows)


class _Notice:
    """A request to stop: once it was seen it holds for the attempt, whatever is allowed again meanwhile. A turn that
    broke off and did not hear why would count as one that came to its end.
    """

    def __init__(self, is_asked: Callable[[], bool]) -> None:
        self._is_asked, self._was_seen = is_asked, False

    def __call__(self) -> bool:
        self._was_seen = self._was_seen or self._is_asked()
        return self._was_seen


class RolloutBackend:
    """Turns from an engine, with what each token was drawn from on record before the token is.

    Log probabilities are those of the distribution that was drawn from. `drawn` holds the rest, and what an earlier
    process recorded of it.
    """

    resumption: Resumption = "exact"

    def __init__(
        self, engine: Engine, params: SamplingParams, log: TrajectoryLog, *, thinking: bool, routing: bool
    ) -> None:
        self._engine, self._log, self.thinking = engine, log, thinking
        self.tokenizer: Tokenizer = engine.tokenizer  # type: ignore[assignment]  # the protocol asks for less
        suppressed = suppressed_ids(self.tokenizer, thinking=thinking, tools=True)
        self._params = params.replace(
            suppress_token_ids=tuple(sorted({*params.suppress_token_ids, *suppressed})), logprobs=True, record=True,
            routing=routing,
        )  # fmt: skip
        self.drawn = DrawnTurns()
        for _, record in log.journal.replay():
            if isinstance(record, Event) and record.kind == "drawn":
                self.drawn.add(record.fields)

    @property
    def identity(self) -> Identity:
        """The policy's: its weights change within a run, which `versions` tells token by token."""
        return Identity("policy", "policy", self.tokenizer.fingerprint, self._engine.policy_version)

    def generate(self, turn: Turn) -> Iterator[Batch]:
        """Raises: RequestError as `Engine.submit`, or when the request failed."""
        inbox: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        params = self._params.replace(seed=turn.seed, max_tokens=turn.max_tokens)
        position = len(turn.ids)
        request = self._engine.submit(tuple(turn.ids), params, listener=inbox.put, wait=True)
        try:
            while not turn.should_stop():
                try:
                    events = [inbox.get(timeout=POLL_S)]
                except queue.Empty:
                    continue
                while not inbox.empty():
                    events.append(inbox.get())
                last = events[-1].finish_reason
                if last == "error":
                    assert request.error is not None
                    raise request.error
                tokens = [event for event in events if event.id is not None]
                self._record(position, tokens)
                position += len(tokens)
                yield Batch(
                    [event.id for event in tokens if event.id is not None],
                    [float(np.float32(event.policy_logprob or 0.0)) for event in tokens],
                    finish=None if last in (None, "stop") else last,
                )
                if last is not None:
                    return
        finally:
            request.cancel()

    def _record(self, first: int, events: Sequence[TokenEvent]) -> None:
        """Queue for the journal what these tokens were drawn from; durable with the tokens themselves."""
        if not events:
            return
        masks: list[bytes | None] = []
        for event in events:
            masks.append(None if event.support is None else self._mask(event.support))
        parts = [event.experts for event in events if event.experts is not None]
        experts = np.concatenate(parts) if parts else None
        self._append({
            "first": first, "versions": [event.policy_version for event in events], "masks": masks,
            "experts": None if experts is None else experts.astype("<i2").tobytes(),
            "shape": [] if experts is None else list(experts.shape),
            "routed": 0 if experts is None else first + len(events) - 1 - len(experts),
        })  # fmt: skip

    def _mask(self, support: NDArray[np.int32]) -> bytes:
        digest = hashlib.blake2b(support.tobytes(), digest_size=16).digest()
        if digest not in self.drawn.masks:
            self._append({"mask": digest, **pack_support(support)})
        return digest

    def _append(self, fields: dict[str, Any]) -> None:
        self._log.journal.append(self._log.event("drawn", **fields))
        self.drawn.add(fields)

    def close(self) -> None:
        """Nothing is held."""
