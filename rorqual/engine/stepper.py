"""One step of the model for many requests, and what follows when it fails.

Requests that share a step cannot change each other's output, only stop it: when a shared step fails, nobody knows whose
fault it was, and all their states are half-way. So each of them starts again from its known tokens, in steps of its own
until it has passed the place of the failure; then only the one at fault fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual import log
from rorqual.engine import sampler
from rorqual.engine.events import TokenScore
from rorqual.engine.job import Job
from rorqual.model import Segment

logger = log.get(__name__)

Work = Sequence[tuple[Job, int]]


@dataclass(frozen=True)
class Outcome:
    """What a step came to. `logits` fp32 [R, V] follow the last token of each job in `sampling`."""

    work: Work
    sampling: Sequence[Job] = ()
    logits: Tensor | None = None
    error: Exception | None = None
    """Why the only job of the step cannot go on."""


class Stepper:
    """Feeds jobs to `model`. `num_choices`: ids from 0 that can be sampled."""

    def __init__(self, model: Any, num_choices: int) -> None:  # Any: a LanguageModel
        self._model, self._num_choices = model, num_choices
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._can_share = hasattr(model, "step")
        self.failures = 0

    def run(self, work: Work) -> Iterator[Outcome]:
        """Run a round's work, in as few steps as can be; cancelled jobs are passed over."""
        for group in self._groups(work):
            group = [(job, count) for job, count in group if not job.request.cancelled]
            if not group:
                continue
            ends = [job.num_read + count for job, count in group]
            try:
                yield self._step(group)
            except Exception as error:
                self.failures += 1
                if len(group) == 1:
                    yield Outcome(group, error=error)
                    continue
                logger.warning(
                    "a step of %d requests failed (%s: %s); each goes on alone", len(group), type(error).__name__, error
                )
                for (job, _), end in zip(group, ends, strict=True):
                    job.forget()
                    job.alone_until = end

    def _groups(self, work: Work) -> list[Work]:
        if not self._can_share:
            return [[one] for one in work]
        shared = [(job, count) for job, count in work if job.num_read >= job.alone_until]
        return [shared, *([one] for one in work if one[0].num_read < one[0].alone_until)]

    def _step(self, work: Work) -> Outcome:
        ids = [one for job, count in work for one in job.next_ids(count)]
        tokens = torch.tensor(ids, dtype=torch.int64, device=self._device)
        counts = [count for _, count in work]
        for job, _ in work:
            if job.state is None:
                job.state = self._model.new_state(1)
        if self._can_share:
            parts = tokens.split(counts)
            segments = [Segment(job.state, part) for (job, _), part in zip(work, parts, strict=True)]
            streams = self._model.step(segments)
        else:
            streams = self._model.forward_streams(tokens[None], state=work[0][0].state)
        sampling: list[Job] = []
        rows: list[int] = []
        end = 0
        for job, count in work:
            if job.request.params.prompt_logprobs and not job.ids:
                self._score_prompt(job, streams[:, end : end + count])
            end += count
            job.num_read += count
            if job.num_read == job.num_tokens:
                sampling.append(job)
                rows.append(end - 1)
        if not rows:
            return Outcome(work)
        last = streams if len(rows) == streams.shape[1] else streams[:, rows]
        logits_RV = self._model.logits(self._model.final_hidden(last))[0, :, : self._num_choices]
        return Outcome(work, sampling, logits_RV.float().cpu())

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
