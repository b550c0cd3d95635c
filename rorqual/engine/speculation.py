"""Speculative decoding: drafted tokens are verified as further rows of the same step.

Drafts are what followed the same tokens earlier in the request's own text (`own_text.py`), where there are some that
promise enough, and otherwise the MTP module's, if the model has one.

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

from rorqual.engine.draft_policy import LONGEST_PAUSE, Policy, Terms, Trial
from rorqual.engine.job import Job
from rorqual.engine.own_text import OwnText
from rorqual.engine.stepper import Work
from rorqual.errors import CacheError, ConfigError
from rorqual.model.drafting import DraftMemory

MOST_DRAFTS = 5
"""Drafts of a request at a time that a module or a function makes."""

MOST_REPEATED = 15
"""Tokens at a time from the text itself: with the one before them what a step reads token by token."""

FEWEST = 3
"""Of them at first, and after wrong ones."""

MISSES, LONGEST_LOOK = 2, 32
"""So many looks in a row at which the text offers nothing double the tokens before the next one, up to so many: a look
costs little, but where nothing repeats itself it is all that a round has to spare."""
MOST_MISSES = MISSES * LONGEST_LOOK.bit_length()
"""More say no more."""

MOST_READ = 16
"""Tokens of a prompt, or of a pause, that the module reads before it drafts: a part of its window, as for short outputs
reading all of it would cost more than better drafts save."""

NEW_MEMORY = 0.5
"""What making a memory for the module costs in rounds, which short answers have to pay each."""

OwnDrafter = Callable[[Sequence[int], int], Sequence[int]]
"""From the tokens of a request so far and a number to at most so many drafts."""


class Drafts:
    """What speculation keeps for a running request."""

    def __init__(self, policy: Policy, greedy: bool) -> None:
        self.greedy = greedy
        self.kind, self.trial = policy.kinds[greedy], Trial()
        self.text_kind, self.text_trial = policy.text_kinds[greedy], Trial(policy.text_kinds[greedy].patience)
        self._trials = (self.kind, self.trial, self.text_kind, self.text_trial)
        self.text: OwnText | None = None
        self.repeated: list[int] = []
        """What the text itself offered in this round, verified or not, behind a match of this length."""
        self.match = 0
        self.bet: tuple[int, int, int] | None = None
        """A match that promised too little, the token behind it and the place where that would come: to learn from."""
        self.is_text = False
        """Whether that is what is verified."""
        self.misses = policy.misses[greedy]
        self.look_in = _spacing(self.misses)
        """Looks since the text offered something worth verifying, and tokens before the next one."""
        self.most_repeated = FEWEST
        """Drafts from the text at a time: more when all of them were right, fewer when some were not."""
        self.memory: DraftMemory | None = None
        """Made when there is something to remember: a request in a pause has none."""
        self.ids: list[int] = []
        """Drafts of this round, verified or not, and the module's probabilities."""
        self.chances: list[float] = []
        self.is_first = False
        """The module has read a part of the text before these drafts, which says nothing about the cost of others."""

    def miss(self, misses: dict[bool, int]) -> None:
        """The text offered nothing worth verifying; `misses`: of the kinds."""
        self.misses = misses[self.greedy] = min(self.misses + 1, MOST_MISSES)
        self.look_in = _spacing(self.misses)

    @property
    def wait(self) -> int:
        """Tokens before the module's drafts are tried."""
        return max(self.kind.wait, self.trial.wait)

    @property
    def text_wait(self) -> int:
        """Tokens before those of the text itself are."""
        return max(self.text_kind.wait, self.text_trial.wait, self.look_in)

    def pass_by(self, tokens: int = 1) -> None:
        """Count tokens of a pause."""
        for trial in self._trials:
            if trial.wait:
                trial.wait = max(0, trial.wait - tokens)
        if self.look_in:
            self.look_in = max(0, self.look_in - tokens)


def _spacing(misses: int) -> int:
    """Tokens before the next look after so many in vain."""
    return 1 << misses // MISSES >> 1


class Speculation:
    """Drafts for the requests of one engine.

    drafter: makes drafts in place of the text and the module; all of them are then verified in every round.
    Raises ConfigError when the model cannot verify drafts.
    """

    def __init__(self, model: Any, num_choices: int, drafter: OwnDrafter | None = None) -> None:  # Any: LanguageModel
        if not can_verify(model):
            raise ConfigError(
                f"speculate needs a model that reads several tokens of a sequence in a step and takes some back, and "
                f"{type(model).__name__} does not (it has no `next_scores`). Leave speculation off."
            )
        self._has_module = drafter is None and has_mtp(model)
        self._model, self._num_choices, self._drafter = model, num_choices, drafter
        self.policy = Policy(MOST_DRAFTS)
        # where one thread does all, its own time, in which other programs of a busy machine do not count
        is_alone = getattr(getattr(model, "reference", None), "is_cpu", False) and torch.get_num_threads() == 1
        self._clock = time.thread_time if is_alone else time.perf_counter
        self._began = self._draft_s = 0.0
        self._is_odd = False
        self._requests = 1
        self.is_resting = False
        """Whether the round at hand is one in which nothing is drafted or watched."""
        self._resting: list[Job] = []
        self._rest = self._planned = 0
        """Rounds of the pause at hand that are left, and all of them."""

    def rests(self, work: Work) -> bool:
        """Whether nothing is drafted or watched in a round because all its requests pause; called once a round.

        A pause of many rounds is found out once, so that these cost as little as without speculation.
        """
        if (
            self._rest and len(work) == len(self._resting) and work[0][0] is self._resting[0]
            and (len(work) == 1 or all(one[0] is job for one, job in zip(work, self._resting, strict=True)))
        ):  # fmt: skip
            self._rest -= 1
            return True
        self._count_rest()
        if self._drafter is not None:
            return False
        jobs, requests = [job for job, _ in work], _kind_of(work)
        rounds = LONGEST_PAUSE * len(jobs)
        for job in jobs:
            rounds = min(rounds, 0 if job.is_prefilling or not rounds else self._rest_of(job, requests))
        rounds //= max(1, len(jobs))  # a kind's pause is shorter for many requests
        self.is_resting = rounds > 0
        if self.is_resting:
            self._resting, self._rest, self._planned = jobs, rounds - 1, rounds
        return self.is_resting

    def _rest_of(self, job: Job, requests: int) -> int:
        """Tokens in which nothing needs to be done for a request; its text is looked at if that is due."""
        mine = self.of(job)
        # a memory fills before the first draft
        rest = mine.wait - MOST_READ if self._has_module else LONGEST_PAUSE
        if rest <= 0:
            return 0
        if wait := mine.text_wait:
            return min(rest, wait)
        self._look(job, mine, 1)
        if mine.match:
            terms, odds = self.policy.terms(requests), self.policy.text_odds[mine.greedy]
            if terms is None or odds.keep(mine.match, mine.most_repeated, terms.to_verify, terms.aside):
                return 0
            mine.bet = mine.match, mine.repeated[0], len(job.ids)
            mine.match = 0
            mine.miss(self.policy.misses)
        return min(rest, max(1, mine.look_in))

    def _look(self, job: Job, mine: Drafts, most: int) -> None:
        """What the text offers, at most so many tokens."""
        if mine.text is None:
            mine.text = OwnText(job)
        if mine.bet is not None:
            length, token, at = mine.bet
            if at < len(job.ids):
                self.policy.text_odds[mine.greedy].count(length, job.ids[at] == token)
            mine.bet = None
        mine.match, mine.repeated = mine.text.repeat(job, most)
        if not mine.match:
            mine.miss(self.policy.misses)

    def _count_rest(self) -> None:
        for job in self._resting:
            if job.drafting is not None:  # it may have left
                job.drafting.pass_by(self._planned - self._rest)
        self._resting, self._rest, self._planned, self.is_resting = [], 0, 0, False

    def watches(self, work: Work) -> bool:
        """Whether the module needs the streams of what some job reads in this round."""
        return self._has_module and any(self.of(job).wait <= MOST_READ for job, _ in work)

    def propose(self, work: Work, room: int) -> None:
        """Put drafts on decoding jobs of a round, at most `room` in all."""
        self._began, self._draft_s, self._is_odd, self._requests = self._clock(), 0.0, False, _kind_of(work)
        jobs = [job for job, _ in work if not job.is_prefilling]
        if self._drafter is not None:
            for job in jobs:
                most = _most(job, room, MOST_DRAFTS)
                if most > 0 and self._can_draft(job, most):
                    job.drafts = self._own_drafts(self._drafter, job, most)
                    room -= len(job.drafts)
            return
        is_mixed = len(jobs) < len(work)
        for job in jobs:
            mine = self.of(job)
            mine.pass_by()
            if not is_mixed:
                job.drafts = self._drafts_of(job, mine, room)
                room -= len(job.drafts)

    def _own_drafts(self, drafter: OwnDrafter, job: Job, most: int) -> tuple[int, ...]:
        found = list(drafter((*job.request.prompt_ids, *job.ids), most))[:most]
        return tuple(token for token in found if 0 <= token < self._num_choices)

    def _drafts_of(self, job: Job, mine: Drafts, room: int) -> tuple[int, ...]:
        """From the text itself where it promises enough, or else from the module."""
        greedy, mine.is_text, mine.match = job.request.params.temperature == 0, False, 0
        can_module = self._has_module and mine.wait == 0
        if mine.text_wait == 0:
            self._look(job, mine, MOST_REPEATED)
        if not mine.match and not can_module:
            return ()
        terms = self.policy.terms(self._requests)
        if terms is None:
            return ()
        most = _most(job, room, MOST_REPEATED)
        if mine.match:
            count = self.policy.text_odds[greedy].keep(
                mine.match, min(most, mine.most_repeated), terms.to_verify, terms.aside
            )
            if count and self._can_draft(job, count):
                mine.is_text = True
                return tuple(mine.repeated[:count])
            mine.miss(self.policy.misses)
        most = min(most, MOST_DRAFTS, terms.most)
        return self._draft(job, most, terms) if can_module and most > 0 and self._can_draft(job, most) else ()

    def _can_draft(self, job: Job, most: int) -> bool:
        """Whether the job's state can take so many drafts in and give them back."""
        state = job.state
        if state is None or not job.may_draft or job.num_read < job.alone_until or not state.is_exact:
            return False
        if state.rewind < most or state.lengths[0] - state.floor[0] < 0:
            return False
        try:
            state.reserve(1 + most)
        except CacheError:  # no pages to spare for drafts
            return False
        return True

    def _draft(self, job: Job, most: int, terms: Terms) -> tuple[int, ...]:
        """By the module."""
        mine, greedy = self.of(job), job.request.params.temperature == 0
        begin, end = (0, 0) if mine.memory is None else mine.memory.waiting
        if mine.memory is None or begin == end or end != job.num_read:
            return ()
        began = self._clock()
        odds = self.policy.odds[greedy]
        mine.ids, mine.chances = mine.memory.draft(
            job.known(begin + 1, end + 1), most, odds.kept, terms.to_draft, self._num_choices
        )
        seconds = self._clock() - began
        self._draft_s += seconds
        mine.is_first = end - begin > 1 + MOST_DRAFTS
        self._is_odd = self._is_odd or mine.is_first
        self.policy.costs(self._requests).add_drafts(len(mine.ids), seconds, is_first=mine.is_first)
        return tuple(mine.ids[: self.policy.keep(terms, mine.chances, greedy)])

    def of(self, job: Job) -> Drafts:
        """What is kept for a job; made when it is asked for."""
        if job.drafting is None:
            job.drafting = Drafts(self.policy, job.request.params.temperature == 0)
        drafts: Drafts = job.drafting
        return drafts

    def remember(self, job: Job, streams: Any) -> None:
        """The trunk's streams [n, N, D] of what a job has just read."""
        mine = self.of(job)
        if self._has_module and mine.wait <= MOST_READ:
            if mine.memory is None:
                mine.memory = DraftMemory(self._model, MOST_DRAFTS, MOST_READ, torch.bfloat16)
                for trial in (mine.kind, mine.trial):
                    trial.add(-NEW_MEMORY)
            mine.memory.remember(streams, job.num_read)

    def count(self, job: Job, tokens: Sequence[int], verified: int) -> None:
        """Learn from what a job's drafts came to: the tokens chosen in this round, after `verified` of its drafts."""
        mine: Drafts | None = job.drafting
        if mine is None or not (mine.match or mine.ids):
            return
        greedy, right = job.request.params.temperature == 0, len(tokens) - 1
        if mine.match:
            self.policy.text_odds[greedy].learn(mine.match, mine.repeated, tokens)
        if mine.is_text:
            mine.most_repeated = min(MOST_REPEATED, 2 * verified) if right == verified else max(FEWEST, right + 1)
            if right:
                mine.misses = self.policy.misses[greedy] = 0
            else:
                mine.miss(self.policy.misses)
            self.policy.judge(mine.text_trial, greedy, self._requests, 0, verified, right, is_first=False, is_text=True)
        elif mine.ids:
            self.policy.learn(mine.ids, mine.chances, tokens, greedy)
            self.policy.judge(
                mine.trial, greedy, self._requests, len(mine.ids), verified, right, is_first=mine.is_first
            )
        mine.ids, mine.chances, mine.match, mine.is_text = [], [], 0, False

    def end_round(self, extra: int) -> None:
        """Account for a round in which all jobs decoded, with `extra` drafts among its rows."""
        costs, seconds = self.policy.costs(self._requests), self._clock() - self._began
        if not self._draft_s and not extra:
            costs.add_plain(seconds)
        elif not self._is_odd:
            costs.add_rows(extra, seconds - self._draft_s)


def _kind_of(work: Work) -> int:
    """What the costs of a round are kept by: its requests, negative where some of them sample."""
    for job, _ in work:
        if job.request.params.temperature != 0:
            return -len(work)
    return len(work)


def _most(job: Job, room: int, most: int) -> int:
    """Most drafts that a round may hold for a job: behind them comes one token more."""
    return min(room, most, job.request.max_tokens - len(job.ids) - 1)


def has_mtp(model: Any) -> bool:
    """Whether a model can draft."""
    return can_verify(model) and len(getattr(model, "mtp", ())) > 0


def can_verify(model: Any) -> bool:
    """Whether a model reads several tokens of a sequence in a step, and takes some back."""
    return hasattr(model, "next_scores")
