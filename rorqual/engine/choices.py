"""The tokens that a step's rows come to: one for each sampling job, and one more for each of its drafts that was right.

A draft is right where the sampler, with the random number of its position, chooses it (`speculation.py` says why).
"""

from __future__ import annotations

from torch import Tensor

from rorqual.engine import sampler
from rorqual.engine.grammar import Constraint
from rorqual.engine.job import Job
from rorqual.engine.stepper import Outcome
from rorqual.errors import RequestError


def choose(outcome: Outcome) -> list[list[int | RequestError]]:
    """The next tokens of each sampling job: one, and one more for each draft that was right."""
    assert outcome.logits is not None
    if not any(job.drafts or job.constraint for job in outcome.sampling):
        plain = [sampler.Choice(job.request.params, job.request.seed, job.num_tokens) for job in outcome.sampling]
        return [[token] for token in sampler.choose(outcome.logits, plain, outcome.best)]
    first = [sum(1 + len(job.drafts) for job in outcome.sampling[:i]) for i in range(len(outcome.sampling))]

    def choice(job: Job, i: int) -> sampler.Choice:
        return sampler.Choice(job.request.params, job.request.seed, job.num_tokens + i)

    # at once: the first token of each, and all that a greedy one may need
    places = [
        (n, i)
        for n, job in enumerate(outcome.sampling)
        if job.constraint is None
        for i in range(1 + (len(job.drafts) if job.request.params.temperature == 0 else 0))
    ]
    rows = [first[n] + i for n, i in places]
    logits = outcome.logits if len(rows) == len(outcome.logits) else outcome.logits[rows]
    best = [outcome.best[row] for row in rows]
    found = sampler.choose(logits, [choice(outcome.sampling[n], i) for n, i in places], best)
    chosen = dict(zip(places, found, strict=True))
    out: list[list[int | RequestError]] = []
    for n, job in enumerate(outcome.sampling):
        if job.constraint is not None:
            out.append(_choose_constrained(job, job.constraint, outcome.logits[first[n] :]))
            continue
        tokens = [chosen[n, 0]]
        for i, draft in enumerate(job.drafts, 1):
            if tokens[-1] != draft:
                break
            if (n, i) not in chosen:
                at = first[n] + i
                [chosen[n, i]] = sampler.choose(
                    outcome.logits[at : at + 1], [choice(job, i)], outcome.best[at : at + 1]
                )
            tokens.append(chosen[n, i])
        out.append(tokens)
    return out


def _choose_constrained(job: Job, constraint: Constraint, logits_RV: Tensor) -> list[int | RequestError]:
    """The same for a job that is held to a grammar, which is told of each token before the next one is chosen."""
    tokens: list[int | RequestError] = []
    for i in range(1 + len(job.drafts)):
        own = sampler.Choice(job.request.params, job.request.seed, job.num_tokens + i)
        try:
            [token] = sampler.choose(constraint.apply(logits_RV[i])[None], [own])
            if not isinstance(token, RequestError):
                constraint.advance(token)
        except RequestError as error:
            token = error
        tokens.append(token)
        if isinstance(token, RequestError) or i == len(job.drafts) or token != job.drafts[i]:
            break
    return tokens
