"""A request as its caller sees it: iterate over events, wait for the result, or cancel."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.events import Completion, FinishReason, Timing, TokenEvent, TokenScore, Usage
from rorqual.engine.exactness import Exactness
from rorqual.engine.guard import GuardUse
from rorqual.engine.params import SamplingParams
from rorqual.engine.store.explain import Explanation
from rorqual.errors import RequestError

Listener = Callable[[TokenEvent], None]
Progress = Callable[[int, int], None]
"""Called with the prompt tokens read so far and all of them; begins anew when a request loses its state."""


class Request:
    """Handle returned by `Engine.submit`. Safe to use from any thread.

    Iterate over it for `TokenEvent`s, call `result()` for the whole `Completion`, or `cancel()`.
    With a listener, events go there instead of to the iterator, called from the engine's thread.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        ids: NDArray[np.int32] | None = None,
        max_tokens: int,
        seed: int,
        priority: int = 0,
        timeout_s: float | None = None,
        listener: Listener | None = None,
        on_progress: Progress | None = None,
        wake: Callable[[], None] = lambda: None,
        cache_scope: str = "",
    ) -> None:
        self.id = str(uuid.uuid4())  # known to who asked; nobody can guess it
        self.prompt_ids = tuple(prompt_ids)
        self.prompt_array = np.asarray(self.prompt_ids, dtype=np.int32) if ids is None else ids
        self.params = params
        self.max_tokens = max_tokens
        self.seed = seed
        self.priority = priority
        self.timeout_s = timeout_s
        self.cache_scope = cache_scope
        self.error: RequestError | None = None
        self.cache: Explanation | None = None  # what the prefix cache did for it, once it runs
        self.drafted = self.accepted = 0  # tokens, by speculation
        self.guard: GuardUse | None = None  # what the retrieval guard did, once it ends
        self.exactness: Exactness | None = None  # what is promised about its bits, once it ends
        self.batched_with = self.prompt_steps = 0
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None  # the one that ended it
        self.events: list[TokenEvent] = []
        self.prompt_scores: list[TokenScore] = []
        self._listener = listener
        self._on_progress = on_progress
        self._wake = wake
        self._inbox: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._is_suspended = False
        self.saved: bytes | None = None  # its state, once a suspended request has ended
        self._done = threading.Event()
        self._submitted = time.monotonic()
        self._started = self._first = self._last = 0.0

    def __iter__(self) -> Iterator[TokenEvent]:
        """Events as they come; raises the request's `RequestError` when it failed."""
        if self._listener is not None:
            raise RuntimeError("this request reports to its listener; iterate over one submitted without")
        while True:
            event = self._inbox.get()
            if event.finish_reason == "error":
                assert self.error is not None
                raise self.error
            yield event
            if event.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Ask the engine to stop; the last event then says `cancelled`. Does nothing once finished."""
        self._cancelled.set()
        self._wake()

    def suspend(self) -> None:
        """Cancel it and keep its state in `saved`, for another request with all its tokens: `submit(..., saved=...)`.

        Nothing is saved for one that has read nothing; with a prefix cache that keeps what was computed.
        """
        self._is_suspended = True
        self.cancel()

    @property
    def is_suspended(self) -> bool:
        return self._is_suspended

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def is_over(self, now: float) -> bool:
        """Whether the request was cancelled or its deadline has passed at `now` (of `time.monotonic`)."""
        return self.cancelled or self.is_late(now)

    def is_late(self, now: float) -> bool:
        """Whether `timeout_s` have passed since the request was submitted."""
        return self.timeout_s is not None and now >= self._submitted + self.timeout_s

    @property
    def finished(self) -> bool:
        return self._done.is_set()

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        cached = 0 if self.cache is None else self.cache.cached_tokens
        sampled = sum(event.id is not None for event in self.events)
        return Usage(len(self.prompt_ids), sampled, cached, self.drafted, self.accepted)

    @property
    def timing(self) -> Timing:
        """Seconds spent so far in each phase; 0 for a phase not reached."""
        return Timing(
            queue_s=max(0.0, self._started - self._submitted),
            first_token_s=max(0.0, self._first - self._started),
            decode_s=max(0.0, self._last - self._first),
        )

    @property
    def age_s(self) -> float:
        """Seconds since the request was submitted."""
        return self.age_at(time.monotonic())

    def age_at(self, now: float) -> float:
        """Seconds from its submission to `now`, a time of the monotonic clock."""
        return now - self._submitted

    @property
    def running_s(self) -> float | None:
        """Seconds since the request got its place; None while it waits for one."""
        return time.monotonic() - self._started if self._started else None

    def result(self, timeout_s: float | None = None) -> Completion:
        """Wait for the end. Raises: the request's RequestError if it failed, or TimeoutError."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the request still runs after {timeout_s} s; wait longer or cancel() it")
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None
        tokens = [event for event in self.events if event.id is not None]
        return Completion(
            prompt_ids=self.prompt_ids,
            ids=tuple(event.id for event in tokens if event.id is not None),
            text="".join(event.text for event in self.events),
            finish_reason=self.finish_reason,
            seed=self.seed,
            usage=self.usage,
            timing=self.timing,
            logprobs=tuple(event.logprob or 0.0 for event in tokens) if self.params.logprobs else None,
            top_logprobs=tuple(event.top_logprobs for event in tokens) if self.params.logprobs else None,
            prompt_scores=tuple(self.prompt_scores) if self.params.prompt_logprobs else None,
            exactness=self.exactness,
        )

    # Called by the engine's thread only.

    def mark_started(self) -> None:
        """The request got a place among the running ones; only the first one counts."""
        self._started = self._started or time.monotonic()

    def report_progress(self, done: int) -> None:
        """So many prompt tokens are read. A callback that raises cancels its request, as a listener does."""
        if self._on_progress is not None:
            try:
                self._on_progress(done, len(self.prompt_ids))
            except Exception:
                self._cancelled.set()

    def mark_step(self, num_sharing: int, is_prefilling: bool) -> None:
        """A step of the model for so many requests, of which this is one, was done."""
        self.batched_with = max(self.batched_with, num_sharing - 1)
        self.prompt_steps += is_prefilling

    def mark_token(self) -> None:
        """A token was sampled (its event may still be held back)."""
        self._last = time.monotonic()
        self._first = self._first or self._last

    def deliver(self, event: TokenEvent) -> None:
        """Record an event and hand it on. A listener that raises cancels its request, nobody else's."""
        self.events.append(event)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
        if self._listener is None:
            self._inbox.put(event)
        else:
            try:
                self._listener(event)
            except Exception:  # the listener's owner is gone, for instance a closed event loop
                self._cancelled.set()
        if event.finish_reason is not None:
            self._done.set()

    def fail(self, error: RequestError) -> None:
        """End with an error."""
        self.error = error
        self.deliver(TokenEvent(id=None, finish_reason="error"))
