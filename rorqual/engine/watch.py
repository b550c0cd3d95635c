"""What a running or waiting request is doing now, for people who look on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rorqual.engine.job import Job

Phase = Literal["waiting", "restoring", "reading", "answering"]
"""Waits for a place; runs again what the prefix cache has no windows for; reads its prompt; samples tokens."""


@dataclass(frozen=True)
class RequestView:
    """A moment of one request; no text, no token."""

    number: int
    """Of arrival."""
    phase: Phase
    prompt_tokens: int
    read_tokens: int
    """Of the prompt, those from the cache included."""
    cached_tokens: int
    output_tokens: int
    max_tokens: int
    priority: int
    age_s: float
    """Since it was submitted."""
    scope: str
    """Its `cache_scope`: whose it is."""


def view_of(job: Job, *, is_running: bool, now: float) -> RequestView:
    """now: of the monotonic clock, one for all requests of a picture, so that ages keep their order.

    May be called from any thread while the engine works: a number may be one step old."""
    request, num_output = job.request, len(job.ids)
    phase: Phase = "waiting"
    if is_running:
        reads = num_output == 0 or job.num_read < len(request.prompt_ids)
        phase = "answering"
        if reads:
            phase = "restoring" if getattr(job.state, "is_replaying", False) else "reading"
    cache = request.cache
    return RequestView(
        number=job.order,
        phase=phase,
        prompt_tokens=len(request.prompt_ids),
        read_tokens=min(job.num_read, len(request.prompt_ids)),
        cached_tokens=0 if cache is None else cache.cached_tokens,
        output_tokens=num_output,
        max_tokens=request.max_tokens,
        priority=request.priority,
        age_s=request.age_at(now),
        scope=request.cache_scope,
    )
