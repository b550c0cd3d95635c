"""From a sampled token to what its request hears: text as far as it is certain, scores, and whether it was the last."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rorqual.engine import sampler
from rorqual.engine.events import FinishReason, TokenEvent
from rorqual.engine.interfaces import TextTokenizer
from rorqual.engine.job import Job
from rorqual.engine.recording import drawn_from


class Delivery:
    """Knows the tokenizer's special tokens; text and stop strings are the job's own."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def events(
        self, job: Job, token: int, logits_V: Tensor | None, version: int = 0
    ) -> tuple[list[TokenEvent], FinishReason | None]:
        """The events of a token that has just been appended to `job.ids`, and why the request ends with it, if it does.

        logits_V: fp32 [V], what the token was sampled from; needed where the request asks for log probabilities.
        version: of the weights.
        """
        params = job.request.params
        logprob: float | None = None
        best: tuple[tuple[int, float], ...] = ()
        if params.logprobs and logits_V is not None:
            logprobs_V = sampler.log_probabilities(logits_V)
            logprob, best = float(logprobs_V[token]), sampler.best_tokens(logprobs_V, params.top_logprobs)
        drawn = drawn_from(logits_V, params, token) if params.record and logits_V is not None else None
        reason: FinishReason | None = None
        text = ""
        if token == self._tokenizer.eos_token_id or token in params.stop_token_ids:
            reason = "stop"
        else:
            text = job.decoder.push(token)
            reason = "length" if len(job.ids) == job.request.max_tokens else None
        if reason is not None:
            text += job.decoder.flush()
        is_control = token in self._tokenizer.control_token_ids
        event = TokenEvent(
            token, text, logprob, best,
            policy_logprob=None if drawn is None else drawn[0],
            support=None if drawn is None else drawn[1],
            experts=job.take_experts(),
            policy_version=version,
        )  # fmt: skip
        ready = job.stops.push(event, is_control=is_control)
        if job.stops.stopped:
            reason, job.request.stop_string = "stop", job.stops.matched
        if reason is not None:
            ready += job.stops.flush()
            ready[-1] = replace(ready[-1], finish_reason=reason)
        return ready, reason
