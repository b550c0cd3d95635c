"""One step of the model for many requests, and what follows when it fails.

Requests that share a step cannot change each other's output, only stop it: when a shared step fails, nobody knows whose
fault it was, and all their states are half-way. So each of them starts again from its known tokens, in steps of its own
until it has passed the place of the failure; then only the one at fault fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual import log
from rorqual.engine import sampler
from rorqual.engine.events import TokenScore
from rorqual.engine.job import Job
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.model import Segment, Trace
from rorqual.model.scores import best_of

logger = log.get(__name__)

Work = Sequence[tuple[Job, int]]


@dataclass(frozen=True)
class Outcome:
    """What a step came to. `logits` fp32 [R, V] follow the last token of each job in `sampling`, and its drafts.

    best: the likeliest token of each row, the first among equals; a NaN counts as the largest.
    """

    work: Work
    sampling: Sequence[Job] = ()
    logits: Tensor | None = None
    best: Sequence[int] = ()
    error: Exception | None = None
    """Why the only job of the step cannot go on."""


class _Rows(NamedTuple):
    """What follows some rows of a step: hidden [1, R, D], logits [1, R, V] and the likeliest token of each."""

    hidden: Tensor
    logits: Tensor
    best: list[int]


class Stepper:
    """Feeds jobs to `model`. `num_choices`: ids from 0 that can be sampled."""

    def __init__(
        self,
        model: Any,  # a LanguageModel
        num_choices: int,
        cache: PrefixCache | None = None,
    ) -> None:
        self._model, self._num_choices, self._cache = model, num_choices, cache
        self.watch: Callable[[Job, Tensor], None] | None = None
        """Is shown the streams [n, N, D] of what a job reads, before they are counted."""
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._can_share = hasattr(model, "next_scores")
        self.failures = 0

    def run(self, work: Work) -> Iterator[Outcome]:
        """Run a round's work, in as few steps as can be; cancelled jobs are passed over."""
        for group in self._groups(work):
            group = [(job, count) for job, count in group if not job.request.cancelled]
            if not group:
                continue
            ends = [job.num_read + count for job, count in group]
            for job, _ in group:
                job.request.mark_step(len(group), job.is_prefilling)
            try:
                yield self._step(group)
            except Exception as error:
                self.failures += 1
                has_drafts = any(job.drafts for job, _ in group)
                if len(group) == 1 and not has_drafts:
                    yield Outcome(group, error=error)
                    continue
                logger.warning(
                    "a step of %d requests failed (%s: %s); each goes on alone", len(group), type(error).__name__, error
                )
                for (job, _), end in zip(group, ends, strict=True):
                    job.may_draft = job.may_draft and not job.drafts
                    job.forget()
                    job.alone_until = end

    def _groups(self, work: Work) -> list[Work]:
        if not self._can_share:
            return [[one] for one in work]
        shared = [(job, count) for job, count in work if job.num_read >= job.alone_until]
        return [shared, *([one] for one in work if one[0].num_read < one[0].alone_until)]

    def _start(self, job: Job, count: int) -> int:
        """Give a job its state, from the prefix cache if there is one; how many of `count` tokens it reads now.

        None are left when the very prompt was there with the scores behind it.
        """
        cache = self._cache
        if cache is None:
            if job.state is None:
                job.state = self._model.new_state(1)
                self._guard(job)
            return count
        if job.state is None:
            known = job.request.prompt_array
            if job.ids:
                known = np.concatenate([known, np.asarray(job.ids, dtype=np.int32)])
            params = job.request.params
            asks = not (params.prompt_logprobs or params.routing)  # these need every token read
            job.lease = cache.begin(known, asks, job.request.cache_scope)
            job.state, job.num_read = job.lease.state, job.lease.num_cached
            self._guard(job)
            if job.request.cache is None:  # not after a preemption
                job.request.cache = job.lease.explanation
        stop = cache.next_stop(job.lease) if job.is_prefilling else None
        return min(count, job.num_tokens - job.num_read, count if stop is None else stop - job.num_read)

    @staticmethod
    def _guard(job: Job) -> None:
        if job.guard is not None:
            job.state.guard_by(job.guard.anew())

    def _step(self, work: Work) -> Outcome:
        work = [(job, self._start(job, count)) for job, count in work]
        ready = [job for job, count in work if not count]
        fed = [(job, count) for job, count in work if count]
        sampling, parts = self._feed(fed) if fed else ([], [])
        if ready:
            hidden = torch.stack([job.lease.hidden for job in ready]).to(self._device)
            logits = self._model.logits(hidden[None])[..., : self._num_choices]
            parts = [*parts, _Rows(hidden[None], logits, best_of(logits))]
            sampling = [*sampling, *ready]
        if not sampling:
            return Outcome(work)
        logits_RV = parts[0].logits[0] if len(parts) == 1 else torch.cat([part.logits[0] for part in parts])
        best = [token for part in parts for token in part.best]
        return Outcome(work, sampling, logits_RV.float().cpu(), best)

    def _feed(self, work: Work) -> tuple[list[Job], list[_Rows]]:
        """Read tokens: who samples now, and what follows their last tokens, if anybody does."""
        tokens = [[*job.next_ids(count), *job.drafts] for job, count in work]
        sampling: list[Job] = []
        places: dict[int, int] = {}  # by the job's id, the row of `wanted` that follows its last token
        wanted: list[int] = []
        end = 0
        for (job, count), part in zip(work, tokens, strict=True):
            end += len(part)
            if job.num_read + count == job.num_tokens:
                sampling.append(job)
                places[id(job)] = len(wanted)
                wanted += range(end - 1 - len(job.drafts), end)
        trace = Trace(router=True, router_ids=True) if any(job.request.params.routing for job, _ in work) else None
        streams, rows = self._read(work, tokens, wanted, trace)
        experts_TLA = None if trace is None else experts_of(trace)
        end = 0
        for (job, count), part in zip(work, tokens, strict=True):
            if job.request.params.prompt_logprobs and not job.ids:
                self._score_prompt(job, streams[:, end : end + count])
            if self.watch is not None:
                self.watch(job, streams[0, end : end + len(part)])
            if experts_TLA is not None and job.request.params.routing:
                job.keep_experts(experts_TLA[end : end + count])
            end += len(part)
            job.num_read += count
        if self._cache is not None:
            for job, count in work:
                self._store(self._cache, job, count, rows.hidden[0] if rows else None, places.get(id(job)))
        return sampling, [rows] if rows else []

    def _read(
        self, work: Work, tokens: list[list[int]], wanted: list[int], trace: Trace | None
    ) -> tuple[Tensor, _Rows | None]:
        """One step of the model: all streams [1, T, N, D], and what follows the `wanted` rows, if there are any."""
        traced = {} if trace is None else {"trace": trace}
        if self._can_share:
            segments = [Segment(job.state, part) for (job, _), part in zip(work, tokens, strict=True)]
            scores = self._model.next_scores(segments, wanted, self._num_choices, **traced)
            rows = _Rows(scores.hidden, scores.logits, scores.best) if wanted else None
            return scores.streams, rows
        streams = self._model.forward_streams(
            torch.tensor(tokens, device=self._device), state=work[0][0].state, **traced
        )
        if not wanted:
            return streams, None
        hidden = self._model.final_hidden(streams[:, wanted])
        logits = self._model.logits(hidden)[..., : self._num_choices]
        return streams, _Rows(hidden, logits, best_of(logits))

    @staticmethod
    def _store(cache: PrefixCache, job: Job, count: int, hidden_RD: Tensor | None, place: int | None) -> None:
        """Keep what a prompt has become; decoding is kept at its end. `place`: the row that follows its last token."""
        if place is None:
            cache.progress(job.lease)
        elif hidden_RD is not None and (not job.ids or count > 1):
            cache.end_of_prompt(job.lease, hidden_RD[place])

    def _score_prompt(self, job: Job, streams: Tensor) -> None:
        """Record the log probability of each prompt token that follows a token of this chunk, unless it is known."""
        prompt, scores = job.request.prompt_ids, job.request.prompt_scores
        if not scores:
            scores.append(TokenScore(prompt[0], None))
        known = len(scores) - 1 - job.num_read  # of this chunk: those before a preemption
        if known >= streams.shape[1]:
            return
        logits_SV = self._model.logits(self._model.final_hidden(streams[:, known:]))[0, :, : self._num_choices]
        logprobs_SV = sampler.log_probabilities(logits_SV).cpu()
        for logprobs_V, token in zip(logprobs_SV, prompt[len(scores) :], strict=False):
            best = sampler.best_tokens(logprobs_V, job.request.params.top_logprobs)
            scores.append(TokenScore(token, float(logprobs_V[token]), best))


def experts_of(trace: Trace) -> NDArray[np.int16]:
    """The experts that the learned routers of a traced row chose, in the order of the layers: [T, L, A]."""
    ids = [record.experts[0] for record in trace.routers if not record.is_hash and record.experts is not None]
    if not ids:
        return np.zeros((0, 0, 0), dtype=np.int16)
    out: NDArray[np.int16] = torch.stack(ids, 1).cpu().numpy().astype(np.int16)
    return out
