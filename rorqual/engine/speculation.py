"""Speculative decoding: tokens drafted by the MTP module are verified as further rows of the same step.

A request's next token and its drafts are read in one step. From the scores behind each of these rows the sampler
chooses with the random number that belongs to the position; while its choice is the draft that was read, the next row
counts too, and what follows the first other choice is taken back (`State.truncate`). So every token is chosen by the
sampler from the same scores and the same random number as without drafts: the output is the same, token by token,
greedy or sampled, and not only its distribution. (Speculative sampling with a residual distribution would accept a
little more at high temperatures, and tie a seed's output to what happened to be drafted.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rorqual.engine import sampler
from rorqual.engine.draft_policy import Policy, Terms, Trial
from rorqual.engine.grammar import Constraint
from rorqual.engine.job import Job
from rorqual.engine.stepper import Outcome, Work
from rorqual.errors import CacheError, ConfigError, RequestError
from rorqual.model.drafting import DraftMemory

MOST_DRAFTS = 5
"""Drafts of a request at a time."""

MOST_READ = 16
"""Tokens of a prompt, or of a pause, that the module reads before it drafts: a part of its window, as for short outputs
reading all of it would cost more than better drafts save."""

OwnDrafter = Callable[[Sequence[int], int], Sequence[int]]
"""From the tokens of a request so far and a number to at most so many drafts."""


class Drafts:
    """What speculation keeps for a running request."""

    def __init__(self, kind: Trial) -> None:
        self.kind, self.trial = kind, Trial()
        self.memory: DraftMemory | None = None
        """Made when there is something to remember: a request in a pause has none."""
        self.ids: list[int] = []
        """Drafts of this round, verified or not, and the module's probabilities."""
        self.chances: list[float] = []
        self.is_first = False
        """The module has read a part of the text before these drafts, which says nothing about the cost of others."""

    @property
    def wait(self) -> int:
        """Tokens before drafts are tried."""
        return max(self.kind.wait, self.trial.wait)

    def pass_by(self, tokens: int = 1) -> None:
        """Count tokens of a pause."""
        self.kind.wait = max(0, self.kind.wait - tokens)
        self.trial.wait = max(0, self.trial.wait - tokens)


class Speculation:
    """Drafts for the requests of one engine.

    drafter: makes drafts in place of the MTP module; all of them are then verified in every round.
    Raises ConfigError when the model has no MTP module and there is no drafter, or cannot verify drafts.
    """

    def __init__(self, model: Any, num_choices: int, drafter: OwnDrafter | None = None) -> None:  # Any: LanguageModel
        if not can_verify(model) or (drafter is None and not has_mtp(model)):
            raise ConfigError(
                "speculate=True needs a model with an MTP module, and this one has none, so nothing drafts tokens. "
                "Load a checkpoint with mtp.* tensors (num_nextn_predict_layers), or leave speculation off."
            )
        self._model, self._num_choices, self._drafter = model, num_choices, drafter
        self.policy = Policy(MOST_DRAFTS)
        self._draft_s = 0.0
        self._is_odd = False
        self._requests = 1
        self.is_resting = False
        """Whether the round at hand is one in which nothing is drafted or watched."""
        self._resting: list[Job] = []
        self._rest = self._passed = 0

    def rests(self, work: Work) -> bool:
        """Whether nothing is drafted or watched in a round because all its requests pause; called once a round.

        A pause of many rounds is found out once, so that these cost as little as without speculation.
        """
        if self._rest and len(work) == len(self._resting):
            self._rest -= 1
            if all(one[0] is job for one, job in zip(work, self._resting, strict=True)):
                self._passed += 1
                return True
        self._count_rest()
        jobs = [job for job, _ in work]
        if self._drafter is not None or any(job.is_prefilling for job in jobs):
            return False
        # a kind's pause is shorter for many requests, and a memory fills before the first draft
        rounds = (min((self.of(job).wait for job in jobs), default=0) - MOST_READ) // max(1, len(jobs))
        self.is_resting = rounds > 0
        if self.is_resting:
            self._resting, self._rest, self._passed = jobs, rounds - 1, 1
        return self.is_resting

    def _count_rest(self) -> None:
        for job in self._resting:
            self.of(job).pass_by(self._passed)
        self._resting, self._rest, self._passed, self.is_resting = [], 0, 0, False

    def propose(self, work: Work, room: int) -> None:
        """Put drafts on decoding jobs of a round, at most `room` in all."""
        self._draft_s, self._is_odd, self._requests = 0.0, False, len(work)
        jobs = [job for job, _ in work if not job.is_prefilling]
        terms = None
        if self._drafter is None:
            is_mixed = len(jobs) < len(work)
            jobs = [job for job in jobs if self._is_on(job)]
            terms = self.policy.terms(len(work)) if jobs and not is_mixed else None
            if terms is None:
                return
        for job in jobs:
            most = min(room, MOST_DRAFTS, job.request.max_tokens - len(job.ids) - 1)
            if most < 1 or not self._can_draft(job):
                continue
            if self._drafter is not None:
                known = (*job.request.prompt_ids, *job.ids)
                found = list(self._drafter(known, most))[:most]
                job.drafts = tuple(token for token in found if 0 <= token < self._num_choices)
            elif terms is not None:
                job.drafts = self._draft(job, min(most, terms.most), terms)
            room -= len(job.drafts)

    def _is_on(self, job: Job) -> bool:
        """Whether drafts are tried for a job now; called once a round while it decodes."""
        mine = self.of(job)
        mine.pass_by()
        return mine.wait == 0

    def _can_draft(self, job: Job) -> bool:
        """Whether the job's state can take drafts in and give them back."""
        state = job.state
        if state is None or not job.may_draft or job.num_read < job.alone_until or not state.is_exact:
            return False
        if state.rewind < MOST_DRAFTS or state.lengths[0] - state.floor[0] < 0:
            return False
        try:
            state.reserve(1 + MOST_DRAFTS)
        except CacheError:  # no pages to spare for drafts
            return False
        return True

    def _draft(self, job: Job, most: int, terms: Terms) -> tuple[int, ...]:
        mine, greedy = self.of(job), job.request.params.temperature == 0
        begin, end = (0, 0) if mine.memory is None else mine.memory.waiting
        if mine.memory is None or begin == end or end != job.num_read:
            return ()
        began = time.perf_counter()
        odds = self.policy.odds[greedy]
        mine.ids, mine.chances = mine.memory.draft(
            job.known(begin + 1, end + 1), most, odds.kept, terms.to_draft, self._num_choices
        )
        seconds = time.perf_counter() - began
        self._draft_s += seconds
        mine.is_first = end - begin > 1 + MOST_DRAFTS
        self._is_odd = self._is_odd or mine.is_first
        self.policy.costs(self._requests).add_drafts(len(mine.ids), seconds, is_first=mine.is_first)
        return tuple(mine.ids[: self.policy.keep(terms, mine.chances, greedy)])

    def of(self, job: Job) -> Drafts:
        """What is kept for a job; made when it is asked for."""
        if job.drafting is None:
            job.drafting = Drafts(self.policy.kinds[job.request.params.temperature == 0])
        drafts: Drafts = job.drafting
        return drafts

    def remember(self, job: Job, streams: Any) -> None:
        """The trunk's streams [n, N, D] of what a job has just read."""
        mine = self.of(job)
        if self._drafter is None and mine.wait <= MOST_READ:
            if mine.memory is None:
                mine.memory = DraftMemory(self._model, MOST_DRAFTS, MOST_READ, torch.bfloat16)
            mine.memory.remember(streams, job.num_read)

    def count(self, job: Job, tokens: Sequence[int], verified: int) -> None:
        """Learn from what a job's drafts came to: the tokens chosen in this round, after `verified` of its drafts."""
        if self._drafter is None and job.drafting is not None and job.drafting.ids:
            mine, greedy = self.of(job), job.request.params.temperature == 0
            self.policy.learn(mine.ids, mine.chances, tokens, greedy)
            self.policy.judge(
                mine.trial, greedy, self._requests, len(mine.ids), verified, len(tokens) - 1, is_first=mine.is_first
            )
            mine.ids, mine.chances = [], []

    def end_round(self, work: Work, extra: int, seconds: float) -> None:
        """Account for a round in which all jobs decoded, with `extra` drafts among its rows."""
        costs = self.policy.costs(len(work))
        if not self._draft_s:
            costs.add_plain(seconds)
        elif not self._is_odd:
            costs.add_rows(extra, seconds - self._draft_s)


def has_mtp(model: Any) -> bool:
    """Whether a model can draft."""
    return can_verify(model) and len(getattr(model, "mtp", ())) > 0


def can_verify(model: Any) -> bool:
    """Whether a model reads several tokens of a sequence in a step, and takes some back."""
    return hasattr(model, "next_scores")


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
