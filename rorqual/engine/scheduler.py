"""Who runs next, and how many tokens of each: bookkeeping only, no model, no threads.

Requests are ranked by priority (higher first), then by arrival. Up to `max_running` run, up to `max_queued` wait, one
more is refused (429). A round is one step of the model:

* every decoding request gets one token;
* what is left of the step's tokens, at most `chunk` and as many as its time allows (`pace.py`), goes to prompts: by
  rank in one round, and in the next, among equal priorities, the shortest rest first. The first takes as much as it
  can; those behind it join when the whole rest of their prompt fits, or it up to the end of a page of `GRAIN` tokens.

So a step never holds more than `step_tokens` tokens, however long the prompts are, and that bounds the time between two
tokens of a decoding request; the highest-ranked prompt moves on in every other round at least.

States count against `max_bytes` by the tokens known of each running request (`cost`), what they share once. When they
grow beyond it, the lowest-ranked running requests lose their states and wait again; they will read their tokens anew,
which costs time and changes nothing. A waiting request of strictly higher priority takes place and memory from lower
ones in the same way.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine.grain import GRAIN
from rorqual.engine.job import Job
from rorqual.engine.memory import Cost, free_of_charge
from rorqual.engine.pace import Pace
from rorqual.errors import ConfigError, RequestError


@dataclass
class Round:
    """What one round does."""

    gone: list[Job] = field(default_factory=list)
    """Taken out: cancelled or beyond their deadline."""
    preempted: list[Job] = field(default_factory=list)
    """Back among the waiting; their states have been dropped."""
    admitted: list[Job] = field(default_factory=list)
    work: list[tuple[Job, int]] = field(default_factory=list)
    """Jobs of the step with their numbers of tokens, decoding ones first."""
    charged_bytes: int = 0
    """Most that the running requests' states hold when it is done."""


class Scheduler:
    """Raises: ConfigError for limits that would let no request run.

    step_tokens: most tokens of one step; `max_running + chunk` unless given.
    max_bytes, cost: most bytes of all running states together, and what they hold at most.
    gap_s: how long a step may take while requests decode, which shortens the chunk; None: whatever it takes.
    clock: seconds, as `Request` counts its deadline.
    """

    def __init__(
        self,
        max_running: int,
        max_queued: int,
        chunk: int = 512,
        step_tokens: int | None = None,
        *,
        max_bytes: int | None = None,
        cost: Callable[[int], int] | None = None,
        gap_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("max_running", max_running), ("max_queued", max_queued), ("chunk", chunk)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, so no request could ever run. Set it to 1 or more.")
        self.step_tokens = max_running + chunk if step_tokens is None else step_tokens
        if self.step_tokens <= max_running:
            raise ConfigError(
                f"step_tokens is {step_tokens}, but {max_running} requests may run, and a step that they fill with one "
                f"token each leaves none for prompts. Set it to {max_running + 1} or more, or lower max_running."
            )
        self.max_bytes, self.cost = max_bytes, cost if isinstance(cost, Cost) else Cost(cost or free_of_charge)
        if max_bytes is not None and self.cost(1) > max_bytes:
            raise ConfigError(
                f"max_state_bytes is {max_bytes:,}, but the state of a single token takes {self.cost(1):,} bytes. "
                "Set it to a multiple of that."
            )
        self.max_running, self.max_queued, self.chunk = max_running, max_queued, chunk
        self.pace = Pace(chunk, gap_s)
        self._clock = clock
        self.waiting: list[Job] = []  # by rank
        self.running: list[Job] = []
        self._arrivals = 0
        self._is_by_rest_next = False
        self.expected_wait_s: Callable[[], float | None] = lambda: None
        """When a place is likely to be free, for the refusal of one request too many."""

    @property
    def is_full(self) -> bool:
        """Whether one more would be one too many: free places are taken by those that wait at the next round."""
        return len(self.waiting) >= self.max_queued + max(0, self.max_running - len(self.running))

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def used_bytes(self) -> int:
        """What the running requests are charged for."""
        return self.cost.together(self.running)

    def fits(self, num_tokens: int, guard: Any = None) -> bool:
        """Whether a request of so many tokens could run if it were alone, with its retrieval guard."""
        return self.max_bytes is None or self.cost(num_tokens) + self.cost.of_guard(guard, num_tokens) <= self.max_bytes

    def add(self, job: Job) -> None:
        """Queue a job. Raises: RequestError (429) when the queue is full."""
        if self.is_full:
            raise RequestError(
                f"{len(self.running)} requests are running and {len(self.waiting)} are waiting, which is all "
                "this server takes. Try again when some have finished, or raise max_queued.",
                status=429,
                type="rate_limit_error",
                retry_after_s=self.expected_wait_s(),
            )
        job.order, self._arrivals = self._arrivals, self._arrivals + 1
        self._wait(job)

    def remove(self, job: Job) -> None:
        """Take a job out, wherever it is."""
        if job in self.running:
            self.running.remove(job)
        elif job in self.waiting:
            self.waiting.remove(job)

    def next_round(self) -> Round:
        """Decide the next round, and account for it."""
        out = Round(gone=self._remove_gone())
        while len(self.running) > 1 and self.max_bytes is not None and self.used_bytes > self.max_bytes:
            self._preempt(self._lowest(), out)
        self._admit(out)
        out.work, out.charged_bytes = self._share(), self.used_bytes
        return out

    def _remove_gone(self) -> list[Job]:
        now = self._clock()
        gone = [job for job in (*self.waiting, *self.running) if job.request.is_over(now)]
        for job in gone:
            self.remove(job)
        return gone

    def _wait(self, job: Job) -> None:
        bisect.insort(self.waiting, job, key=lambda one: one.rank)

    def _lowest(self) -> Job:
        return max(self.running, key=lambda job: job.rank)

    def _preempt(self, job: Job, out: Round) -> None:
        self.running.remove(job)
        job.forget()
        self._wait(job)
        out.preempted.append(job)

    def _admit(self, out: Round) -> None:
        """Move waiting jobs to running ones by rank; the first that does not fit holds up those behind it."""
        while self.waiting:
            job = self.waiting[0]
            victims = self._victims(job)
            if victims is None:
                return
            self.waiting.pop(0)
            for victim in victims:
                self._preempt(victim, out)
            self.running.append(job)
            out.admitted.append(job)

    def _victims(self, job: Job) -> list[Job] | None:
        """Running jobs of lower priority that must make way for this one, lowest first; None when it has to wait."""
        stays = sorted(self.running, key=lambda one: one.rank)
        victims: list[Job] = []
        while not self._has_room(job, stays):
            if stays[-1].request.priority >= job.request.priority:
                return None
            victims.append(stays.pop())
        return victims

    def _has_room(self, job: Job, others: list[Job]) -> bool:
        if not others:
            return True  # what could never fit was refused when it was submitted
        if len(others) >= self.max_running:
            return False
        if self.max_bytes is None:
            return True
        # Room to grow, lest it be thrown out again at once; more for a long one, which has more to read again.
        wanted = min(job.most_tokens, job.num_tokens + max(GRAIN, job.num_tokens // 4))
        gone = [one for one in self.running if one not in others]
        return self.cost.together(others, gone) + self.cost.joining(job, wanted) <= self.max_bytes

    def _share(self) -> list[tuple[Job, int]]:
        """Tokens of the step: one for each decoding job, the rest for prompts."""
        work = [(job, 1) for job in self.running if not job.is_prefilling]
        left = min(self.pace(len(work)), self.step_tokens - len(work))
        is_first = True
        for job in self._readers():
            rest = job.num_tokens - job.num_read
            count = min(rest, left)
            if count < rest and (not is_first or count >= GRAIN):  # end where a page ends
                count = max(0, (job.num_read + count) // GRAIN * GRAIN - job.num_read)
            if count:
                work.append((job, count))
                left -= count
            is_first = False
        return work

    def _readers(self) -> list[Job]:
        """Those who read their prompts, in this step's order: by priority, then by turns the earliest or the shortest
        rest first. So a question does not wait until a book before it has been read, nor the book for all questions.
        """
        readers = [job for job in self.running if job.is_prefilling]
        by_rest, self._is_by_rest_next = self._is_by_rest_next, len(readers) > 1 and not self._is_by_rest_next

        def place(job: Job) -> tuple[int, int, int]:
            priority, order = job.rank
            return priority, job.num_tokens - job.num_read if by_rest else 0, order

        return sorted(readers, key=place)

    def _one(self, job: Job, num_tokens: int) -> int:
        return self.cost(num_tokens) + self.cost.of_guard(job.guard, num_tokens)

    def room_for_drafts(self, work: list[tuple[Job, int]], most: int) -> int:
        """How many drafts this round's step may hold besides; none where `most` for each might be too many bytes."""
        grown = sum(self._one(job, job.num_tokens + most) - self._one(job, job.num_tokens) for job in self.running)
        if self.max_bytes is not None and self.used_bytes + grown > self.max_bytes:
            return 0
        return self.step_tokens - sum(count for _, count in work)
