"""A session: everything a loop may ask of the world, each answer durable before it is acted upon.

A loop that asks only its session can be killed anywhere and run again from its first line: what was answered before is
answered from the journal, in order, and where the record ends the session goes on live. Turns of the model go on at
the token where they broke off; a call whose result is on record is not made again.

Source: docs/agents.md ("What is written when"). The order of writing: a call is durable before it leaves; its result
is durable before the model sees it; a token is durable before anybody does.
"""

from __future__ import annotations

import hashlib
import json
import queue
import random
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.agents.dialogue import Dialogue, Reply, ToolRequest, TurnReader
from rorqual.agents.environment import Environment
from rorqual.agents.errors import AgentError, CallFailed, InfraFailed, Preempted
from rorqual.agents.log import TrajectoryLog
from rorqual.agents.models.base import Backend, Turn
from rorqual.agents.observer import CallView, Observer, TurnUsage
from rorqual.agents.tools.base import REFUSED, Outcome, Tool, ToolBox, ToolContext, check_arguments
from rorqual.journal import call_key, canonical
from rorqual.journal.records import (
    Close,
    Event,
    PolicySwitch,
    Preempt,
    Request,
    Tokens,
    ToolCall,
    ToolResult,
)
from rorqual.sandbox.errors import ReplayDivergence
from rorqual.seeds import derive

if TYPE_CHECKING:
    from rorqual.engine import Trajectory

POLL_S = 0.1


@dataclass(frozen=True)
class Limits:
    """turn_tokens: most of one turn; total_tokens: most that the model may write in all. Logged ones count."""

    turn_tokens: int = 8192
    total_tokens: int = 131_072


@dataclass
class SessionParts:
    """What a session is put together from. outbox: folder of external effects. stop: set to ask the run to stop."""

    log: TrajectoryLog
    backend: Backend
    toolbox: ToolBox
    environment: Environment
    outbox: Path
    trajectory: str
    seed: int = 0
    branch: int = 0
    limits: Limits = Limits()
    observer: Observer = field(default_factory=Observer)
    stop: Callable[[], bool] = lambda: False
    accept_new_weights: bool = False


class Session:
    """One trajectory, live or being replayed. Methods are called in the order in which the loop needs them.

    Raises (from any method): ReplayDivergence when the loop asks for something else than the record has; Preempted
    when it was asked to stop; InfraFailed, JournalError when the run cannot go on.
    """

    def __init__(self, parts: SessionParts) -> None:
        self._parts = parts
        self._log, self._backend, self._observer = parts.log, parts.backend, parts.observer
        self.dialogue = Dialogue(parts.backend.tokenizer, parts.toolbox.schemas(), parts.backend.thinking)
        self.ids: list[int] = []
        self._logprobs: list[float] = []
        self._mask: list[bool] = []
        self._num_turns = self._num_calls = self._num_written = 0
        self._policy_version = 0
        self._versions_ahead = 0  # of the backend's own count, which begins anew with every process
        self.messages: list[dict[str, Any]] = []
        parts.environment.rerun = self._rerun
        parts.environment.note = self._observer.note

    # ---------------------------------------------------------------- opening

    def open(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Begin with these messages, or check that the record began with them.

        Raises: AgentError for other messages, tools, tokenizer or model: with the right ones the run goes on.
        """
        prompt = self.dialogue.prompt_ids(messages)
        digest = ids_digest(prompt)
        identity, recorded = self._backend.identity, self._log.request
        if recorded is None:
            self._policy_version = identity.policy_version
            self._log.write(
                Request(
                    self._parts.trajectory, self._log.number, self._parts.branch, digest, "",
                    {"turn_tokens": self._parts.limits.turn_tokens, "thinking": self._backend.thinking},
                    self._seed.to_bytes(16, "little"), identity.model, identity.policy_version,
                    identity.tokenizer, identity.fingerprint, "", self._log.facts.epochs,
                )
            )  # fmt: skip
        else:
            self._check(recorded, digest)
        self.messages = [dict(message) for message in messages]
        self._add(prompt)
        self._observer.prompt(prompt, recorded is None)

    def _check(self, recorded: Request, digest: bytes) -> None:
        identity = self._backend.identity
        if recorded.prompt_digest != digest or recorded.tokenizer_digest != identity.tokenizer:
            raise AgentError(
                "the run on record began with another prompt (task, tools, skills or tokenizer changed since), so its "
                "tokens mean something else here. Give the same options, or begin a new run."
            )
        if recorded.trajectory != self._parts.trajectory or recorded.seed_key != self._seed.to_bytes(16, "little"):
            raise AgentError("the run on record has another name or seed. Give the same, or begin a new run.")
        self._policy_version = recorded.policy_version
        last = self._log.facts.model or {"model": recorded.model_id, "fingerprint": recorded.engine_fingerprint}
        is_other = last["fingerprint"] != identity.fingerprint
        if is_other and not self._parts.accept_new_weights:
            raise AgentError(
                f"the run on record was written by {last['model']} ({last['fingerprint']}), and this is "
                f"{identity.model} ({identity.fingerprint}). Give the same model, or --accept-new-weights to go on "
                "with this one."
            )
        version = last.get("version", recorded.policy_version) + is_other
        self._versions_ahead = max(0, version - identity.policy_version)

    @property
    def _seed(self) -> int:
        """Of the model's draws: of this trajectory and branch alone."""
        return derive(self._parts.seed, "trajectory", self._parts.trajectory, "branch", self._parts.branch)

    # -------------------------------------------------------------- the model

    def generate(self) -> Reply:
        """The model's next turn, from the record as far as it goes.

        Raises: RequestError when the model fails; the turn then goes on after a resume.
        """
        reader = self.dialogue.reader()
        start = len(self.ids)
        usage = None
        finish = self._replay_turn(reader, start)
        is_live = finish is None
        if finish is None:
            if reader.ids and self._backend.resumption == "restart":
                self._restart_turn(reader, start)
            finish, usage = self._live_turn(reader)
        self._num_written += len(reader.ids)
        self._num_turns += 1
        events, reply = reader.finish(None if finish == "stop" else finish)
        self._observer.events(events, is_live)
        prompt, cached, completion = usage or (start, 0, 0)
        self._observer.usage(TurnUsage(prompt, cached, max(completion, len(reader.ids))), is_live)
        self._remember(reply)
        return reply

    def _replay_turn(self, reader: TurnReader, start: int) -> str | None:
        """Take what is on record of this turn; returns how it ended, or None when it did not yet."""
        while True:
            record = self._log.next(Tokens, PolicySwitch, Event)
            if isinstance(record, Tokens):
                self._log.take()
                self._take_tokens(record, reader)
            elif isinstance(record, PolicySwitch):
                self._log.take()
                self._policy_version = record.new_version
            elif record is not None and (ended := self._log.next_event("turn_ended")) is not None:
                return str(ended["finish"])
            elif record is not None and self._log.next_event("turn_restarted") is not None:
                self._drop(start)
                reader.reset()
            else:
                break
        if reader.is_closed:
            return "stop"
        if reader.ids and len(reader.ids) >= self._room(0):
            return "length"
        if not self._log.is_live:
            raise self._diverged("the model's turn", self._log.take())
        return None

    def _take_tokens(self, record: Tokens, reader: TurnReader) -> None:
        if record.first_position != len(self.ids):
            raise AgentError(
                f"the record has tokens for position {record.first_position} where {len(self.ids)} is next, so the "
                "journal is not this run's or is damaged. Check it with `rorqual journal verify`."
            )
        self._add(record.ids, record.logprobs, chosen=True)
        self._observer.tokens(record.ids, record.first_position, False)
        self._observer.events(reader.feed(record.ids), False)

    def _restart_turn(self, reader: TurnReader, start: int) -> None:
        """The server cannot go on within a turn: it is asked for again, which the record says."""
        self._observer.note(f"the model is asked again for a turn that broke off after {len(reader.ids)} tokens")
        self._log.write(self._log.event("turn_restarted", position=start, dropped=len(reader.ids)))
        self._drop(start)
        reader.reset()

    def _live_turn(self, reader: TurnReader) -> tuple[str, tuple[int, int, int] | None]:
        identity = self._backend.identity
        version = identity.policy_version + self._versions_ahead
        if version != self._policy_version:
            self._log.write(
                self._log.event("model", model=identity.model, fingerprint=identity.fingerprint, version=version),
                PolicySwitch(self._log.number, len(self.ids), self._policy_version, version),
            )
            self._policy_version = version
        room = self._room(len(reader.ids))
        if room <= 0:
            return "length", None
        turn = Turn(self.ids, len(reader.ids), self._num_turns, self._seed, room, self.messages, self._parts.stop)
        finish, usage = None, None
        for batch in self._backend.generate(turn):
            usage = batch.usage or usage
            finish = batch.finish or finish
            ids = batch.ids[: self._room(len(reader.ids))]  # whatever a server sends
            if ids:
                self._acknowledge(ids, None if batch.logprobs is None else batch.logprobs[: len(ids)], reader)
            if self._parts.stop():
                raise self._preempt()
            if len(ids) < len(batch.ids) or self._room(len(reader.ids)) <= 0:
                break
        if self._parts.stop():
            raise self._preempt()
        if finish in ("cancelled", "timeout"):
            raise AgentError(f"the model's turn ended early ({finish}). Go on with --resume.")
        finish = finish or ("stop" if reader.is_closed else "length")
        if finish == "length" and len(reader.ids) < self._room(0):
            self._log.write(self._log.event("turn_ended", finish=finish))  # by the server's own limit
        return finish, usage

    def _acknowledge(self, ids: Sequence[int], logprobs: Sequence[float] | None, reader: TurnReader) -> None:
        """Make tokens durable, and only then show them to anybody."""
        position = len(self.ids)
        scores = None if logprobs is None else tuple(logprobs)
        self._log.write(Tokens(self._log.number, position, self._policy_version, tuple(ids), scores))
        self._add(ids, logprobs, chosen=True)
        self._observer.tokens(ids, position, True)
        self._observer.events(reader.feed(ids), True)

    def _room(self, written: int) -> int:
        """Tokens this turn may still have when it has `written`."""
        limits = self._parts.limits
        return min(limits.turn_tokens, limits.total_tokens - self._num_written) - written

    # -------------------------------------------------------------- the tools

    def calls(self, requests: Sequence[ToolRequest]) -> list[Outcome]:
        """Make the calls of a turn, one after the other, and give the model their results."""
        outcomes: list[Outcome] = []
        observation: Sequence[int] = ()
        live = False
        for i, request in enumerate(requests):
            is_last = i == len(requests) - 1
            outcome, observation, live = self._call(request, [one.output for one in outcomes] if is_last else None)
            outcomes.append(outcome)
            name = f"call_{self._num_turns - 1:02d}_{i}"
            self.messages.append({"role": "tool", "tool_call_id": name, "content": outcome.output})
        position = len(self.ids)
        self._add(observation)
        self._observer.observation(observation, position, live)
        return outcomes

    def _call(self, request: ToolRequest, earlier: list[str] | None) -> tuple[Outcome, Sequence[int], bool]:
        """One call; `earlier`: outputs of the turn's other calls, given with its last one, whose result says all."""
        index = self._num_calls
        tool, problem = self._find(request)
        arguments = request.arguments if request.arguments is not None else {"text": request.raw}
        when = self.now() if tool is not None and tool.needs_time else 0.0
        key = call_key(self._parts.trajectory, self._parts.branch, index, request.name, arguments)
        intent = self._intend(index, request.name, canonical(arguments), key, tool)
        self._num_calls += 1
        view = CallView(index, request.name, intent.arguments, key.hex())
        recorded = self._log.next(ToolResult)
        is_resumed = intent is not self._fresh
        self._observer.call(view, not is_resumed)
        if isinstance(recorded, ToolResult):
            self._log.take()
            if recorded.key != key:
                raise self._diverged(f"the result of call {index}", recorded)
            outcome = _recorded(recorded)
            self._show(view, outcome, live=False)
            return outcome, recorded.observation_ids, False
        context = self._context(tool, key, index, when, is_resumed)
        outcome = Outcome.refusal(problem) if tool is None else self._make(tool, arguments, context)
        ids: Sequence[int] = ()
        if earlier is not None:
            ids = self.dialogue.observation_ids([*earlier, outcome.output])
        self._log.write(_result(self._log.number, self._parts.branch, index, key, outcome, ids))
        self._show(view, outcome, live=True)
        self._parts.environment.after_call()
        return outcome, ids, True

    def _find(self, request: ToolRequest) -> tuple[Tool | None, str]:
        try:
            tool = self._parts.toolbox.get(request.name)
            check_arguments(tool, request.arguments, request.raw)
        except CallFailed as problem:
            return None, str(problem)
        return tool, ""

    def _intend(self, index: int, name: str, form: str, key: bytes, tool: Tool | None) -> ToolCall:
        """The call's intent: the one on record, which must be the same, or a new one, durable on return."""
        environment = self._parts.environment
        self._fresh: ToolCall | None = None
        recorded = self._log.next(ToolCall)
        if isinstance(recorded, ToolCall):
            self._log.take()
            if recorded.key != key or recorded.call_index != index:
                raise self._diverged(f"call {index} of {name} with {form}", recorded)
            return recorded
        if not self._log.is_live:
            raise self._diverged(f"call {index} of {name}", self._log.take())
        if self._parts.stop():
            raise self._preempt()
        is_external = tool is not None and tool.policy == "external"
        intent = ToolCall(
            self._log.number, index, name, form, key, self._parts.branch, environment.id, environment.incarnation, 0,
            is_external,
        )  # fmt: skip
        self._log.write(intent)
        self._fresh = intent
        return intent

    def _context(self, tool: Tool | None, key: bytes, index: int, when: float, is_resumed: bool) -> ToolContext:
        policy = tool.policy if tool is not None else "rerun"
        return ToolContext(key.hex(), index, policy, self._parts.environment, self._parts.outbox, when, is_resumed)

    def _make(self, tool: Tool, arguments: Mapping[str, Any], context: ToolContext) -> Outcome:
        """Make the call, live. Raises: InfraFailed for one that reaches outside and whose outcome nobody knows."""
        if context.is_resumed and tool.policy == "external" and not tool.external_token:
            raise InfraFailed(
                f"call {context.index} of {tool.name} was begun by an earlier process and has no result on record. It "
                "reaches outside the sandbox and cannot tell whether it was done, so it is not made again.",
                {"call_index": context.index, "tool": tool.name, "key": context.key, "outcome": "unknown"},
            )
        return self._beside(lambda: _attempt(tool, arguments, context))

    def _beside(self, work: Callable[[], Outcome]) -> Outcome:
        """Run a call in a thread, so that a notice to stop does not wait for it; the command itself goes on."""
        answers: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()

        def run() -> None:
            try:
                answers.put(work())
            except BaseException as error:
                answers.put(error)

        threading.Thread(target=run, name="rorqual-call", daemon=True).start()
        while True:
            try:
                answer = answers.get(timeout=POLL_S)
            except queue.Empty:
                if self._parts.stop():
                    raise self._preempt() from None
                continue
            if isinstance(answer, BaseException):
                raise answer
            return answer

    def _rerun(self, index: int) -> bool:
        """Run a finished call again after its effects were lost; whether its outcome is the one on record."""
        facts = self._log.facts
        intent, result = facts.calls[index], facts.results[index]
        if intent.external or result.flags & REFUSED:
            return True  # what reaches outside is still done; what was refused did nothing
        tool = self._parts.toolbox.get(intent.tool)
        if tool.outside:
            return True
        context = self._context(tool, intent.key, index, 0.0, True)
        outcome = _attempt(tool, json.loads(intent.arguments), context)
        self._observer.note(f"call {index} ({intent.tool}) was run again")
        return outcome.digest == result.output_digest

    def _show(self, view: CallView, outcome: Outcome, live: bool) -> None:
        shown = CallView(
            view.index, view.tool, view.arguments, view.key, outcome.output, outcome.exit_code, outcome.flags,
            outcome.replayed or not live,
        )  # fmt: skip
        self._observer.result(shown, live)

    # ------------------------------------------------- what else a loop needs

    def now(self) -> float:
        """Seconds since 1970, as they were when this was first asked."""
        return float(self._answer("now", time.time))

    def random(self) -> float:
        """A number in [0, 1), the same after a resume."""
        return float(self._answer("random", random.SystemRandom().random))

    def uuid(self) -> str:
        """A random UUID, the same after a resume."""
        return str(self._answer("uuid", lambda: str(uuid.uuid4())))

    def _answer(self, kind: str, make: Callable[[], Any]) -> Any:
        recorded = self._log.next_event(kind)
        if recorded is not None:
            return recorded["value"]
        if not self._log.is_live:
            raise self._diverged(kind, self._log.take())
        value = make()
        self._log.write(self._log.event(kind, value=value))
        return value

    def close(self, reason: str, **totals: Any) -> None:
        """End the trajectory for good: `done`, `length`, `infra_failed` or `aborted`."""
        counts = {"turns": self._num_turns, "calls": self._num_calls, "written": self._num_written, **totals}
        if self._log.facts.closed is None:
            self._log.write(Close(self._log.number, reason, counts, ids_digest(self.ids)))

    def trajectory(self) -> Trajectory:
        """The episode as the engine, evals and training take it; needs torch."""
        from rorqual.engine import Trajectory

        return Trajectory(list(self.ids), list(self._logprobs), list(self._mask), self._policy_version)

    # ----------------------------------------------------------------- inside

    def _add(self, ids: Sequence[int], logprobs: Sequence[float] | None = None, *, chosen: bool = False) -> None:
        self.ids += ids
        self._logprobs += logprobs if logprobs is not None else [0.0] * len(ids)
        self._mask += [chosen] * len(ids)

    def _drop(self, length: int) -> None:
        del self.ids[length:], self._logprobs[length:], self._mask[length:]

    def _remember(self, reply: Reply) -> None:
        """Keep the turn as a message, for servers that take messages."""
        message: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{self._num_turns - 1:02d}_{i}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.raw},
                }
                for i, call in enumerate(reply.calls)
            ]
        self.messages.append(message)

    def _preempt(self) -> Preempted:
        self._log.write(Preempt("notice", self._log.durable_lsn, None, self._log.number))
        self._parts.environment.abandon()  # a call may be at work in its thread, and must not take this for a loss
        self._parts.environment.pause()
        return Preempted("the run was asked to stop. Everything is on record; go on with --resume.")

    def _diverged(self, asked: str, recorded: object) -> ReplayDivergence:
        """Both sides go on record, and nothing is run."""
        shown = repr(recorded)[:2000]
        self._log.write(self._log.event("divergence", asked=asked, recorded=shown))
        return ReplayDivergence(
            f"the resumed run asks for {asked}, where the record has {shown[:300]}. The loop or its inputs changed "
            "since; running the new one would make files and record disagree. Begin a new run."
        )


def ids_digest(ids: Sequence[int]) -> bytes:
    """SHA-256 over token ids as 32-bit little-endian numbers."""
    return hashlib.sha256(array("I", ids).tobytes()).digest()


def _attempt(tool: Tool, arguments: Mapping[str, Any], context: ToolContext) -> Outcome:
    try:
        return tool.run(arguments, context)
    except CallFailed as problem:
        return Outcome.refusal(str(problem))


def _recorded(result: ToolResult) -> Outcome:
    return Outcome(result.output.decode("utf-8"), result.exit_code, result.flags, result.output_digest, replayed=True)


def _result(
    number: int, branch: int, index: int, key: bytes, outcome: Outcome, observation: Sequence[int]
) -> ToolResult:
    return ToolResult(
        number, index, key, outcome.exit_code, outcome.flags, outcome.digest, outcome.output.encode("utf-8"), "",
        tuple(observation), outcome.replayed, branch,
    )  # fmt: skip
