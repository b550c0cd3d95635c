"""The engine: one thread that owns the model, and any number of callers.

Each request has its own State and its own seed, and every model step serves one request, so a neighbour
can change when a token comes, never which one. Left out for now: a prefix cache, and steps shared between
requests.
"""

from __future__ import annotations

import atexit
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rorqual import log
from rorqual.engine import sampler
from rorqual.engine.events import Completion, FinishReason, TokenEvent, TokenScore
from rorqual.engine.params import SamplingParams
from rorqual.engine.request import Listener, Request
from rorqual.engine.scheduler import Job, Scheduler
from rorqual.engine.stops import StopFilter
from rorqual.errors import ConfigError, RequestError

logger = log.get(__name__)


class LanguageModel(Protocol):
    """What the engine needs of a model; `rorqual.Transformer` has it. Tokens [1, S] give logits [1, S, V]."""

    @property
    def cfg(self) -> Any: ...  # needs `vocab_size` and `max_position_embeddings`
    def parameters(self) -> Iterator[Any]: ...
    def new_state(self, batch_size: int = 1) -> Any: ...
    def forward_streams(self, tokens: Tensor, *, state: Any) -> Tensor: ...
    def final_hidden(self, streams: Tensor) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


class TextTokenizer(Protocol):
    """What the engine needs of a tokenizer; `rorqual.tokenizer.Tokenizer` has it."""

    @property
    def eos_token_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def control_token_ids(self) -> frozenset[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def stream_decoder(self) -> Any: ...


class Engine:
    """Runs many requests on one model.

    max_running: requests that share the model at a time; each holds a State.
    max_queued: requests that may wait; one more is refused with a RequestError of status 429.
    chunk: prompt tokens read in one step; a long prompt delays its neighbours by at most this much a round.
    context_limit: most tokens of prompt and output together; `max_position_embeddings` unless given.

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
        context_limit: int | None = None,
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"chunk is {chunk}, so no prompt could ever be read. Set it to 1 or more.")
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = int(model.cfg.vocab_size)
        # padding rows of the head's table have no text, so they are never chosen, nor read or scored
        self._num_choices = min(self.vocab_size, int(tokenizer.vocab_size))
        self.context_limit = context_limit or int(model.cfg.max_position_embeddings)
        self.chunk = chunk
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._scheduler = Scheduler(max_running, max_queued)
        self._changed = threading.Condition()  # guards the scheduler and the two fields below
        self._closing = False
        self._broken: RequestError | None = None
        self._thread = threading.Thread(target=self._run, name="rorqual-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside torch must not outlive the interpreter

    # Callers' side

    def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        listener: Listener | None = None,
        wait: bool = False,
    ) -> Request:
        """Queue a prompt of token ids and return its handle at once.

        listener: called with each TokenEvent from the engine's thread, instead of the handle's iterator.
        wait: block while the queue is full instead of refusing.
        Raises: RequestError for an empty or impossible prompt, one beyond the context limit, a full queue
        (429) or a closed engine (503).
        """
        params = params or SamplingParams()
        max_tokens = self._check(tokens, params)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        request = Request(tokens, params, max_tokens=max_tokens, seed=seed, listener=listener, wake=self._notify)
        job = Job(request, self.tokenizer.stream_decoder(), StopFilter(params.stop))
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._scheduler.is_full or not self.is_alive)
            if not self.is_alive:
                raise self._broken or _closed()
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
    def is_alive(self) -> bool:
        """Whether new requests can still run."""
        return not self._closing and self._broken is None

    def occupancy(self) -> tuple[int, int]:
        """How many requests are running and waiting now."""
        with self._changed:
            return len(self._scheduler.running), len(self._scheduler.waiting)

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

    def _check(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """Refuse what cannot run; returns the number of tokens the request may generate."""
        if len(tokens) == 0:
            raise RequestError(
                "The prompt has no tokens, and the model needs at least one to start from. "
                "Send some text, or the begin-of-sentence token alone.",
                param="prompt",
            )
        for name, ids in (
            ("prompt", tokens),
            ("stop_token_ids", params.stop_token_ids),
            ("suppress_token_ids", params.suppress_token_ids),
        ):
            bad = next((i for i in ids if not 0 <= i < self._num_choices), None)
            if bad is not None:
                raise RequestError(
                    f"Token id {bad} in {name} is outside the vocabulary of {self._num_choices} tokens. "
                    "Encode the text with this model's own tokenizer.",
                    param=name,
                )
        room = self.context_limit - len(tokens)
        max_tokens = params.max_tokens if params.max_tokens is not None else max(room, 1)
        if max_tokens > room:
            raise RequestError(
                f"This model's maximum context length is {self.context_limit} tokens. However, you requested "
                f"{len(tokens) + max_tokens} tokens ({len(tokens)} in the messages, {max_tokens} in the "
                "completion). Please reduce the length of the messages or completion.",
                param="max_tokens" if len(tokens) < self.context_limit else "messages",
                code="context_length_exceeded",
            )
        return max_tokens

    # The engine's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._round():
                    pass
        except BaseException as error:  # a bug in the engine itself: nobody may be left waiting
            logger.exception("the engine's thread failed")
            self._broken = _failed(error)
        with self._changed:
            left = [*self._scheduler.running, *self._scheduler.waiting]
            self._scheduler.running, self._scheduler.waiting = [], type(self._scheduler.waiting)()
            self._changed.notify_all()
        for job in left:
            job.request.fail(self._broken or _closed())

    def _round(self) -> bool:
        """Wait for work and do one round of it. False when the engine is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not self._scheduler.is_idle)
            if self._closing:
                return False
            gone = self._scheduler.remove_cancelled()
            admitted = self._scheduler.admit()
            jobs = self._scheduler.next_round()
            self._changed.notify_all()  # places in the queue may be free
        for job in gone:
            self._end_cancelled(job)
        for job in admitted:
            job.request.mark_started()
        for job in jobs:
            if job.request.cancelled:
                continue  # taken out at the start of the next round
            try:
                self._step(job)
            except Exception as error:  # whatever it is ends this request alone
                self._remove(job)
                if not isinstance(error, RequestError):
                    logger.exception("a request failed")
                    error = _failed(error)
                job.request.fail(error)
        return True

    def _remove(self, job: Job) -> None:
        with self._changed:
            self._scheduler.remove(job)
            self._changed.notify_all()
        job.state = None  # its memory is free before the next admission

    def _end_cancelled(self, job: Job) -> None:
        job.state = None
        for event in job.stops.flush():
            job.request.deliver(event)
        job.request.deliver(TokenEvent(id=None, finish_reason="cancelled"))

    def _step(self, job: Job) -> None:
        """Read one chunk of the prompt, or the last sampled token; sample when the prompt is complete."""
        prompt = job.request.prompt_ids
        if job.state is None:
            job.state = self.model.new_state(1)
        if job.is_prefilling:
            ids = prompt[job.num_read : job.num_read + self.chunk]
            job.num_read += len(ids)
        else:
            ids = (job.ids[-1],)
        tokens = torch.tensor([ids], dtype=torch.int64, device=self._device)
        streams = self.model.forward_streams(tokens, state=job.state)
        if job.request.params.prompt_logprobs and not job.ids:
            self._score_prompt(job, streams, job.num_read - len(ids))
        if not job.is_prefilling:
            logits_V = self.model.logits(self.model.final_hidden(streams[:, -1:]))[0, -1, : self._num_choices]
            self._emit(job, logits_V.float().cpu())

    def _score_prompt(self, job: Job, streams: Tensor, start: int) -> None:
        """Record the log probability of each prompt token that follows a token of this chunk."""
        prompt, scores = job.request.prompt_ids, job.request.prompt_scores
        if start == 0:
            scores.append(TokenScore(prompt[0], None))
        logits_SV = self.model.logits(self.model.final_hidden(streams))[0, :, : self._num_choices]
        logprobs_SV = sampler.log_probabilities(logits_SV).cpu()
        for logprobs_V, token in zip(logprobs_SV, prompt[start + 1 :], strict=False):
            best = sampler.best_tokens(logprobs_V, job.request.params.top_logprobs)
            scores.append(TokenScore(token, float(logprobs_V[token]), best))

    def _emit(self, job: Job, logits_V: Tensor) -> None:
        """Sample one token, and end the request if it was the last."""
        request, params = job.request, job.request.params
        token = sampler.sample(logits_V, params, request.seed, len(request.prompt_ids) + len(job.ids))
        request.mark_token()
        job.ids.append(token)
        event = TokenEvent(token)
        if params.logprobs:
            logprobs_V = sampler.log_probabilities(logits_V)
            event = replace(
                event,
                logprob=float(logprobs_V[token]),
                top_logprobs=sampler.best_tokens(logprobs_V, params.top_logprobs),
            )
        reason: FinishReason | None = None
        text = ""
        if token == self.tokenizer.eos_token_id or token in params.stop_token_ids:
            reason = "stop"
        else:
            text = job.decoder.push(token)
            reason = "length" if len(job.ids) == request.max_tokens else None
        if reason is not None:
            text += job.decoder.flush()
        is_control = token in self.tokenizer.control_token_ids
        ready = job.stops.push(replace(event, text=text), is_control=is_control)
        if job.stops.stopped:
            reason = "stop"
        if reason is not None:
            ready += job.stops.flush()
            ready[-1] = replace(ready[-1], finish_reason=reason)
            self._remove(job)
        for one in ready:
            request.deliver(one)


def _closed() -> RequestError:
    return RequestError(
        "The engine is closed, so the request cannot run. Start the server again and repeat it.",
        status=503,
        type="server_error",
    )


def _failed(error: BaseException) -> RequestError:
    return RequestError(
        f"The model failed while running this request: {type(error).__name__}: {error}. Nothing more can be "
        "generated for it. Send it again; if it fails again, the full trace is in the server's log.",
        status=500,
        type="server_error",
    )
