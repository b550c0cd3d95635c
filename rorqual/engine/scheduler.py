"""Who runs next: bookkeeping only, no model, no threads.

Requests are admitted first come, first served, up to `max_running`; more wait, up to `max_queued`; beyond
that a request is refused (429). A round gives every decoding request one token, and the oldest request that
still has prompt to read one chunk of it. So a long prompt delays the others by one chunk a round, and moves
itself.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine.request import Request
from rorqual.engine.stops import StopFilter
from rorqual.errors import ConfigError, RequestError


@dataclass(eq=False)
class Job:
    """A request with what the engine keeps for it while it runs."""

    request: Request
    decoder: Any  # the tokenizer's stream decoder: push(id) -> str, flush() -> str
    stops: StopFilter
    state: Any = None  # the model's State; made at admission, owned by this job alone
    num_read: int = 0  # prompt tokens already in the state
    ids: list[int] = field(default_factory=list)  # sampled so far

    @property
    def is_prefilling(self) -> bool:
        return self.num_read < len(self.request.prompt_ids)


class Scheduler:
    """Raises: ConfigError for limits below one."""

    def __init__(self, max_running: int, max_queued: int) -> None:
        for name, value in (("max_running", max_running), ("max_queued", max_queued)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, so no request could ever run. Set it to 1 or more.")
        self.max_running, self.max_queued = max_running, max_queued
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= self.max_queued

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, job: Job) -> None:
        """Queue a job. Raises: RequestError (429) when the queue is full."""
        if self.is_full:
            raise RequestError(
                f"{len(self.running)} requests are running and {len(self.waiting)} are waiting, which is all "
                "this server takes. Try again when some have finished, or raise max_queued.",
                status=429,
                type="rate_limit_error",
            )
        self.waiting.append(job)

    def remove_cancelled(self) -> list[Job]:
        """Take out every job whose request was cancelled."""
        gone = [job for job in (*self.waiting, *self.running) if job.request.cancelled]
        for job in gone:
            self.remove(job)
        return gone

    def remove(self, job: Job) -> None:
        if job in self.running:
            self.running.remove(job)
        elif job in self.waiting:
            self.waiting.remove(job)

    def admit(self) -> list[Job]:
        """Move waiting jobs to free places, oldest first; returns the ones moved."""
        moved: list[Job] = []
        while self.waiting and len(self.running) < self.max_running:
            moved.append(self.waiting.popleft())
            self.running.append(moved[-1])
        return moved

    def next_round(self) -> list[Job]:
        """The jobs that make one step now: all that decode, and the oldest that still reads its prompt."""
        prefilling = [job for job in self.running if job.is_prefilling][:1]
        return [job for job in self.running if not job.is_prefilling] + prefilling
