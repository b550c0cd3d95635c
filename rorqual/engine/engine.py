"""The engine: one thread that owns the model, and any number of callers.

Each round is one step of the model that serves many requests: one token for each that decodes, and a chunk of the
prompts that wait to be read (`scheduler.py`). Each request has its own State and its own seed, so a neighbour can
change when a token comes, never which one. With a prefix cache it starts from what earlier ones computed.
"""

from __future__ import annotations

import atexit
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, cast

import torch
from torch import Tensor, nn

from rorqual import log
from rorqual.engine.aside import Asides, Work
from rorqual.engine.checks import as_array, check_limits, check_priority, check_request, check_timeout
from rorqual.engine.choices import choose
from rorqual.engine.delivery import Delivery
from rorqual.engine.events import Completion, FinishReason, TokenEvent
from rorqual.engine.exactness import describe, examine
from rorqual.engine.failures import closed, failed
from rorqual.engine.grammar import Grammars
from rorqual.engine.guard import OFF, Guards, use_of
from rorqual.engine.handover import let_others_run
from rorqual.engine.interfaces import LanguageModel, TextTokenizer
from rorqual.engine.job import Job
from rorqual.engine.memory import PagedCost, StateCost
from rorqual.engine.params import SamplingParams
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.engine.request import Listener, Progress, Request
from rorqual.engine.scheduler import Round, Scheduler
from rorqual.engine.speculation import MOST_REPEATED, OwnDrafter, Speculation
from rorqual.engine.stats import EngineStats, Meter, StepRecord
from rorqual.engine.stepper import Outcome, Stepper
from rorqual.engine.stops import StopFilter
from rorqual.engine.watch import RequestView, view_of
from rorqual.engine.weights import Change, check_version, copying, restored
from rorqual.errors import ConfigError, RequestError
from rorqual.model.index_groups import search_index_by
from rorqual.ops.native import worker_threads

logger = log.get(__name__)

SPARE_S = 0.02
"""After so long without work the engine gives its worker threads back, so that those of others wait as they should."""

SEED_BITS = 53
"""Of a seed drawn here: a number that every reader of JSON keeps as it is."""


class Engine:
    """Runs many requests on one model.

    max_running: requests that share the model at a time; each holds a State.
    max_queued: requests that may wait; one more is refused with a RequestError of status 429.
    chunk: most prompt tokens of one step, best a multiple of 128.
    gap_s: how long a step should take at most while requests decode; by what earlier steps took, the chunk is cut down
        to that, though not below 128 tokens. None: whatever it takes. Smaller: tokens come more evenly; larger: prompts
        are read faster.
    step_tokens: most tokens of one step, prompts' and decoding requests' together (the latter come first), which
        bounds the time between two tokens; `max_running + chunk` unless given.
    context_limit: most tokens of prompt and output together; `max_position_embeddings` unless given.
    max_state_bytes: most memory of all running requests' states; no limit unless given. Requests that do not fit wait,
        and when running ones outgrow it, the lowest-ranked give up their states and are computed again later.
    log_steps: how many of the last steps `step_log` remembers.
    speculate: draft tokens, from the text so far and with the model's MTP module, and verify several in a step
        (`speculation.py`), which changes no token. A function from the tokens so far and a number to at most so many
        drafts takes the place of both.
    index_search: `exact` or `grouped` (`ModelConfig.index_search`), set on the model; as the model has it unless given.
    guard: the retrieval guard of requests that do not choose one (`guard.py`): `off`, `default`, or names of sources.

    Use as a context manager or call `close()`. A failure while running a request ends that request with a
    RequestError; the engine goes on.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: TextTokenizer,
        *,
        max_running: int = 8,
        max_queued: int = 64,
        chunk: int = 512,
        gap_s: float | None = 0.03,
        step_tokens: int | None = None,
        context_limit: int | None = None,
        max_state_bytes: int | None = None,
        log_steps: int = 120,
        prefix_cache: PrefixCache | None = None,
        speculate: bool | OwnDrafter = False,
        index_search: str | None = None,
        guard: str = OFF,
    ) -> None:
        if index_search is not None and index_search != model.cfg.index_search:
            if prefix_cache is not None:
                raise ConfigError(
                    f"index_search={index_search!r} was given with a prefix cache that was made for a model with "
                    f"{model.cfg.index_search!r}, whose contents mean nothing then. Call search_index_by(model, ...) "
                    "of rorqual.model.index_groups before making the cache, or use EngineSettings."
                )
            search_index_by(cast(nn.Module, model), index_search)
        if prefix_cache is not None and prefix_cache.model is not model:
            raise ConfigError(
                "The prefix cache was made for another model object, whose state means nothing here. Make it with "
                "PrefixCache(model) of the model that the engine runs."
            )
        check_limits(context_limit, gap_s, max_running=max_running, max_queued=max_queued, chunk=chunk)
        cost = None
        if max_state_bytes is not None:
            cost = StateCost(model) if prefix_cache is None else PagedCost(prefix_cache)
        self._scheduler = Scheduler(
            max_running, max_queued, chunk, step_tokens, max_bytes=max_state_bytes, cost=cost, gap_s=gap_s
        )
        self.model, self.tokenizer, self.max_running = model, tokenizer, max_running
        self.vocab_size = int(model.cfg.vocab_size)
        # padding rows of the head's table have no text, so they are never chosen, nor read or scored
        self._num_choices = min(self.vocab_size, int(tokenizer.vocab_size))
        self.context_limit = int(model.cfg.max_position_embeddings) if context_limit is None else context_limit
        self.prefix_cache = prefix_cache
        self.speculation: Speculation | None = None
        if speculate:
            own = speculate if callable(speculate) else None
            self.speculation = Speculation(model, self._num_choices, own)
        self.guards = Guards(model, tokenizer, guard, prefix_cache is not None)
        self._stepper = Stepper(model, self._num_choices, prefix_cache)
        self.grammars = Grammars(tokenizer, self._num_choices)
        self._delivery = Delivery(tokenizer)
        self._meter = Meter(log_steps)
        self.policy_version = 0
        self._changes: deque[Change] = deque()
        self._asides = Asides()
        self._scheduler.expected_wait_s = lambda: self._meter.mean_stay_s / max_running
        self._changed = threading.Condition()  # guards the scheduler and the two fields below
        self._closing = False
        self._broken: RequestError | None = None
        worker_threads.release()  # the caller's: from here on the engine's thread computes
        self._thread = threading.Thread(target=self._run, name="rorqual-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside torch must not outlive the interpreter

    # Callers' side

    def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        listener: Listener | None = None,
        on_progress: Progress | None = None,
        wait: bool = False,
        rendered: bool = False,
        cache_scope: str = "",
        saved: bytes | None = None,
    ) -> Request:
        """Queue a prompt of token ids and return its handle at once.

        priority: higher goes first, and may take place and memory from lower ones; among equals the earlier does.
        timeout_s: seconds from now after which the request ends with what it has (finish_reason `timeout`).
        listener: called with each TokenEvent from the engine's thread, instead of the handle's iterator.
        on_progress: called from there too, with the prompt tokens read so far and all of them, after each chunk.
        wait: block while the queue is full instead of refusing.
        rendered: the tokens are tokenised text, so turns that this engine sampled may be put back as it sampled them
        (the same bytes); the handle's `prompt_ids` are then those.
        cache_scope: requests share what the prefix cache holds with those of the same scope only.
        saved: the state of a suspended request (`Request.suspend`) whose tokens these begin with, under the same
        weights; what it has read is not read again. With a prefix cache or a guard it is not needed and not used.
        Raises: CacheError for a saved state of other tokens; RequestError for an empty or impossible prompt, one beyond
        the context limit or the memory for states,
        a full queue (429) or a closed engine (503).
        """
        params = params or SamplingParams()
        guard = self.guards.of(params.guard, params.pin)
        cache_scope = self.guards.scope(guard, cache_scope)
        if rendered and self.prefix_cache is not None:
            tokens = self.prefix_cache.as_sampled(tokens, cache_scope)
        if isinstance(tokens, list):
            tokens = tuple(tokens)  # once, for the check and the request
        ids = as_array(tokens)
        checked = tokens if ids is None else ids
        max_tokens = check_request(checked, params, self._num_choices, self.context_limit, self._scheduler, guard)
        check_timeout(timeout_s)
        check_priority(priority)
        seed = params.seed if params.seed is not None else secrets.randbits(SEED_BITS)
        request = Request(
            tokens, params, ids=ids, max_tokens=max_tokens, seed=seed, priority=priority, timeout_s=timeout_s,
            listener=listener, on_progress=on_progress, wake=self._notify, cache_scope=cache_scope,
        )  # fmt: skip
        constraint = None if params.grammar is None else self.grammars.constraint(params.grammar)
        job = Job(request, self.tokenizer.stream_decoder(), StopFilter(params.stop), constraint=constraint, guard=guard)
        job.may_draft = not params.routing  # a draft's experts are not those of the token in its place
        if saved is not None and self.prefix_cache is None and guard is None:
            job.state = restored(self.model, saved, request.prompt_ids)
            job.num_read = job.num_routed = job.state.lengths[0]
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._scheduler.is_full or not self.is_alive)
            if not self.is_alive:
                raise self._broken or closed()
            self._scheduler.add(job)
            self._changed.notify_all()
        return request

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete every prompt and return the completions in order.

        prompts: one or many, each a text or a list of token ids. params: one for all, or one a prompt.
        Raises: RequestError as `submit`, or the first failure among the prompts (the others are cancelled).
        """
        many = self._as_ids(prompts)
        each = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise RequestError(
                f"got {len(many)} prompts but {len(each)} params. Give one for all or one each.",
                param="params",
            )
        requests: list[Request] = []
        try:
            for tokens, own in zip(many, each, strict=True):
                requests.append(self.submit(tokens, own, wait=True))
            return [request.result() for request in requests]
        finally:
            for request in requests:  # after a failure or Ctrl-C nobody waits for the rest
                if not request.finished:
                    request.cancel()

    @property
    def num_choices(self) -> int:
        """Ids from 0 that can be sampled: those with a text, without padding rows of the head."""
        return self._num_choices

    @property
    def is_alive(self) -> bool:
        """Whether new requests can still run."""
        return not self._closing and self._broken is None

    def occupancy(self) -> tuple[int, int]:
        """How many requests are running and waiting now."""
        with self._changed:
            return len(self._scheduler.running), len(self._scheduler.waiting)

    def stats(self) -> EngineStats:
        """What the engine has done and is doing."""
        with self._changed:
            scheduler, meter = self._scheduler, self._meter
            states = [job.state for job in scheduler.running if hasattr(job.state, "nbytes")]
            held: Counter[str] = Counter()
            for state in states:
                held.update(state.nbytes())
            return EngineStats(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                rounds=meter.rounds,
                prompt_tokens=meter.prompt_tokens,
                sampled_tokens=meter.sampled_tokens,
                tokens_per_step=meter.tokens_per_step,
                busy_s=meter.busy_s,
                preemptions=meter.preemptions,
                failed_steps=self._stepper.failures,
                finished=dict(meter.finished),
                state_bytes=dict(held),
                charged_bytes=scheduler.used_bytes,
                max_state_bytes=scheduler.max_bytes,
                drafted_tokens=meter.drafted_tokens,
                accepted_tokens=meter.accepted_tokens,
                verifications=meter.verifications,
                accepted_length=meter.accepted_length,
            )

    def requests(self) -> list[RequestView]:
        """The running requests, then the waiting ones, by rank."""
        with self._changed:
            now = time.monotonic()
            return [
                *(view_of(job, is_running=True, now=now) for job in self._scheduler.running),
                *(view_of(job, is_running=False, now=now) for job in self._scheduler.waiting),
            ]

    def aside(self, work: Work) -> Future[Any]:
        """Run a generator on the engine's thread, a piece (up to its next `yield`) at a time, between requests' steps;
        the future holds what it returns. It may use the model, and should yield every few ten milliseconds.

        Raises: RequestError when too much waits (429) or the engine is closed (503).
        """
        with self._changed:
            if not self.is_alive:
                raise self._broken or closed()
            future = self._asides.add(work)
            self._changed.notify_all()
        return future

    def load_weights(self, weights: Mapping[str, Tensor], version: int, *, keep_states: bool = False) -> Future[None]:
        """Copy `weights` (names as in the model's `state_dict`) into the model; otherwise as `change_weights`.

        Raises: ConfigError for weights of another model.
        """
        return self.change_weights(copying(cast(nn.Module, self.model), weights), version, keep_states=keep_states)

    def change_weights(self, apply: Callable[[], None], version: int, *, keep_states: bool = False) -> Future[None]:
        """Have `apply` change the model's weights in place between two steps, and call them `version` from then on.

        Requests go on: what they have read is read again with the new weights, unless `keep_states`. The future is done
        when the next step will use them. Raises: RequestError for a version that is older than the present one, or a
        closed engine (503); ConfigError where a prefix cache would keep what older weights computed.
        """
        check_version(version, self.policy_version)
        if self.prefix_cache is not None and (keep_states or self.prefix_cache.disk is not None):
            raise ConfigError(
                "The weights were to change under a prefix cache "
                + ("on disk" if self.prefix_cache.disk is not None else "while states stay")
                + ", which would hand out what older weights computed. Use a cache in memory, or none, and "
                "keep_states=False."
            )
        change = Change(apply, version, keep_states)
        with self._changed:
            if not self.is_alive:
                raise self._broken or closed()
            self._changes.append(change)
            self._changed.notify_all()
        return change.done

    def step_log(self) -> list[StepRecord]:
        """The last steps, oldest first; as many as `log_steps` says."""
        return list(self._meter.steps)

    def close(self) -> None:
        """Stop the thread; unfinished requests fail with status 503. May be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _as_ids(self, prompts: Any) -> list[list[int]]:  # Any: the four shapes `generate` names
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        return [self.tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompts]

    # The engine's thread

    def _run(self) -> None:
        torch.get_num_threads()  # asked in each new thread, or OpenMP does not hear of `set_num_threads` there
        try:
            with torch.inference_mode():
                while self._round():
                    pass
        except BaseException as error:  # a bug in the engine itself: nobody may be left waiting
            logger.exception("the engine's thread failed")
            self._broken = failed(error)
        with self._changed:
            left = [*self._scheduler.running, *self._scheduler.waiting]
            for change in self._changes:
                change.done.set_exception(self._broken or closed())
            self._changes.clear()
            self._scheduler.running, self._scheduler.waiting = [], []
            self._changed.notify_all()
        self._asides.close()
        for job in left:
            job.request.fail(self._broken or closed())

    def _has_news(self) -> bool:
        idle = self._scheduler.is_idle and self._asides.is_idle
        return bool(self._closing or self._changes or not idle)

    def _round(self) -> bool:
        """Wait for work and do one round of it. False when the engine is to stop."""
        with self._changed:
            if not self._changed.wait_for(self._has_news, SPARE_S):
                worker_threads.release()
                self._changed.wait_for(self._has_news)
            if self._closing:
                return False
            is_free = self._scheduler.is_idle
        if self._changes:
            self._change(self._changes.popleft())
            return True
        if is_free:
            self._asides.run_piece()
            return True
        with self._changed:
            plan = self._scheduler.next_round()
            self._changed.notify_all()  # places in the queue may be free
        for job in plan.gone:
            self._end_early(job)
        for job in plan.admitted:
            job.request.mark_started()
        began = time.perf_counter()
        decoding = sum(not job.is_prefilling for job, _ in plan.work)
        drafts = self.speculation
        if drafts is not None and decoding == len(plan.work) and drafts.rests(plan.work):
            drafts = None
        self._stepper.watch = drafts.remember if drafts is not None and drafts.watches(plan.work) else None
        if drafts is not None and decoding:
            drafts.propose(plan.work, self._scheduler.room_for_drafts(plan.work, MOST_REPEATED))
        drafted = self._meter.drafted_tokens
        read = 0  # less than planned where the prefix cache knew the beginning
        for outcome in self._stepper.run(plan.work):
            read += sum(count for _, count in outcome.work)
            self._handle(outcome)
        seconds = time.perf_counter() - began
        self._record(plan, decoding, max(0, read - decoding), seconds)
        self._asides.after_round(seconds)
        if drafts is not None and decoding == len(plan.work) == read:
            drafts.end_round(self._meter.drafted_tokens - drafted)
        return True

    def _change(self, change: Change) -> None:
        """Give the model its new weights; every running request has read nothing with them yet."""
        try:
            change.apply()
        except Exception as error:  # the caller's own, who knows what of it has been done
            change.done.set_exception(error)
            return
        with self._changed:
            self.policy_version = change.version
            if not change.keep_states:
                for job in (*self._scheduler.running, *self._scheduler.waiting):
                    job.settle()
                    job.forget()
            if self.prefix_cache is not None:
                self.prefix_cache.clear()
        change.done.set_result(None)

    def _record(self, plan: Round, decoding: int, prompt_tokens: int, seconds: float) -> None:
        with self._changed:
            scheduler = self._scheduler
            scheduler.pace.observe(prompt_tokens, decoding, seconds)
            self._meter.add(
                StepRecord(
                    number=self._meter.rounds, decoding=decoding, prompt_tokens=prompt_tokens, seconds=seconds,
                    running=len(scheduler.running), waiting=len(scheduler.waiting), admitted=len(plan.admitted),
                    preempted=len(plan.preempted), charged_bytes=plan.charged_bytes,
                )
            )  # fmt: skip

    def _handle(self, outcome: Outcome) -> None:
        """What follows a step: progress of prompts, sampled tokens, or the failure of the request that was alone."""
        if outcome.error is not None:
            self._fail(outcome.work[0][0], outcome.error)
            return
        for job, _ in outcome.work:
            if not job.ids:
                job.request.report_progress(job.num_read)
        if outcome.logits is None:
            return
        first = 0
        for job, tokens in zip(outcome.sampling, choose(outcome), strict=True):
            rows = 1 + len(job.drafts)
            is_told = job.request.params.logprobs or job.request.params.record
            logits_RV = outcome.logits[first : first + rows] if is_told else None
            first += rows
            try:
                self._take(job, tokens, logits_RV)
            except Exception as error:
                self._fail(job, error)
        if any(len(job.ids) == 1 for job in outcome.sampling):
            let_others_run()

    def _take(self, job: Job, tokens: Sequence[int | RequestError], logits_RV: Tensor | None) -> None:
        """Deliver the tokens that a step brought a request, up to its end, and take back what else was drafted.

        logits_RV: what they were chosen from, where that is told.
        """
        drafted, before = len(job.drafts), len(job.ids)
        if drafted:
            job.request.drafted += drafted
            self._meter.drafted_tokens += drafted
            self._meter.verifications += 1
        for i, token in enumerate(tokens):
            if isinstance(token, RequestError):
                raise token
            if i:  # the draft before it was right
                job.request.accepted += 1
                self._meter.accepted_tokens += 1
            self._emit(job, token, None if logits_RV is None else logits_RV[i])
            if job.request.finished:
                return
        job.settle()
        if self.speculation is not None and not self.speculation.is_resting:
            self.speculation.count(job, job.ids[before:], drafted)

    def _fail(self, job: Job, error: Exception) -> None:
        self._remove(job, "error")
        if not isinstance(error, RequestError):
            logger.error("a request failed", exc_info=error)
            error = failed(error)
        job.request.fail(error)

    def _remove(self, job: Job, reason: FinishReason) -> None:
        job.settle()
        with self._changed:
            self._scheduler.remove(job)
            self._meter.finished[reason] += 1
            if (seconds := job.request.running_s) is not None:
                self._meter.add_stay(seconds)
            self._changed.notify_all()
        if job.guard is not None and job.state is not None:
            job.request.guard = use_of(job.state.guard)
        job.request.exactness = describe(examine(self.model), job.request)
        if self.prefix_cache is not None and job.lease is not None and reason != "error":
            try:
                self.prefix_cache.end_of_output(job.lease, job.request.prompt_ids, job.ids, job.request.cache_scope)
            except Exception as error:  # the output is complete, whatever becomes of its copy
                logger.error("an output could not be stored for later requests", exc_info=error)
        job.forget()  # its memory is free before the next admission

    def _end_early(self, job: Job) -> None:
        """Close a request that was cancelled or is late; the scheduler has taken it out."""
        reason: FinishReason = "cancelled" if job.request.cancelled else "timeout"
        if job.request.is_suspended and job.state is not None and self.prefix_cache is None:
            job.settle()
            job.request.saved = job.state.snapshot(remember=False)
        self._remove(job, reason)
        for event in job.stops.flush():
            job.request.deliver(event)
        job.request.deliver(TokenEvent(id=None, finish_reason=reason))

    def _emit(self, job: Job, token: int, logits_V: Tensor | None) -> None:
        """Deliver a sampled token, and end the request if it was the last."""
        request = job.request
        request.mark_token()
        job.ids.append(token)
        self._meter.sampled_tokens += 1
        ready, reason = self._delivery.events(job, token, logits_V, self.policy_version)
        if reason is not None:
            self._remove(job, reason)
        for one in ready:
            request.deliver(one)
