"""How many drafts pay: what rounds and drafts take against how likely drafts are to be right.

A draft costs the time of making it and of one more row in the step, which depends on the machine, the model, the
context and, with experts on the CPU, on where the rows are routed; so both are measured while the engine runs, never
assumed for long. They are measured in rounds: against rounds without drafts of the same moment, as a machine's speed
moves by more than a draft costs, and by medians. How likely a draft is to be right is counted by the probability that
the MTP module gave it, or, for drafts from the text itself, by the length of the match, apart for greedy and sampled
requests. A further draft is made, and verified, as long as the time it saves on average exceeds the time it costs.

What drafting gained is added up, for each request and for all of its kind together: the rounds that right drafts
saved less what rows and drafts cost. A request, or a kind, that has lost `PATIENCE` rounds stops and tries again after
a pause that doubles with each failure. So what can be lost is bounded: `PATIENCE` in the first `SHORTEST_PAUSE` tokens,
as much again in the next twice as many, and so on. After the longest pauses, and when no rows were verified for long,
costs are measured anew, so that a bad moment is not held on to for ever.

Source: serving practice: drafts of a fixed length often lose where the experts are on the CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from rorqual.engine.own_text import MatchOdds

BINS = 8
"""Classes of the module's probability."""
PLACES = 3
"""The first draft, the second, and those behind it are counted apart."""
START = 2.0
"""Drafts that the module's own probability counts for."""
MEMORY = 128.0
"""Drafts that a class's share of right ones looks back at."""
MARGIN = 1.2
"""How much more a draft has to promise than it costs: costs and odds are estimates."""
SAMPLES = 32
"""Rounds of a kind that its cost is taken from."""
ENOUGH = 4
"""Rounds of a kind before they count."""
COLD = 2
"""First rounds of a kind that do not: what they need is not in the cache yet."""
LATEST = 5
"""Rounds without drafts that stand for the present moment."""
PLAIN_EVERY = 32
"""One round in so many is made without drafts, so that its time stays known."""
STALE = 1024
"""Rounds without drafts after which what rows cost is measured anew."""
ROW, FIRST_ROW, DRAFT, READING = 0.25, 0.7, 0.3, 0.7
"""What a row, the first one besides, a draft, and drafts behind a text that is read first may cost in rounds, until it
is known."""
LEAST_ROW, LEAST_DRAFT = 0.1, 0.1
"""No row and no draft costs less, whatever was measured: a moment in which rounds without drafts were slow for another
reason would make all of them look free."""
ASIDE = 0.15
"""What looking, remembering and counting cost in rounds, where nothing is measured without them."""
SHORTEST_PAUSE, LONGEST_PAUSE = 256, 4096
"""Tokens."""
PATIENCE, TEXT_PATIENCE = 1.0, 4.0
"""A try ends when so many rounds are lost; what it gained before counts for no more than twice that. One wrong guess of
many tokens from the text is no reason to stop where they are chosen greedily."""


class Odds:
    """How likely a draft is to be right, by its place and the module's probability: counted, at first the latter.

    The module is surer of itself than it should be where it reads its own streams, behind the first draft.
    """

    def __init__(self) -> None:
        middles = [(i + 0.5) / BINS for i in range(BINS)]
        self._all = [[START] * BINS for _ in range(PLACES)]
        self._right = [[START * middle ** (1 + place / 2) for middle in middles] for place in range(PLACES)]
        self._shares = np.array(self._right, dtype=np.float32) / np.float32(START)
        self.kept = torch.from_numpy(self._shares)
        """The shares as fp32 [PLACES, BINS], for `DraftMemory.draft`."""

    def of(self, place: int, chance: float) -> float:
        """The share of right drafts among those at this place and of this probability."""
        place, i = _class_of(place, chance)
        return self._right[place][i] / self._all[place][i]

    def count(self, place: int, chance: float, is_right: bool) -> None:
        """One more."""
        place, i = _class_of(place, chance)
        if self._all[place][i] >= MEMORY:
            self._right[place][i], self._all[place][i] = self._right[place][i] / 2, self._all[place][i] / 2
        self._right[place][i] += is_right
        self._all[place][i] += 1
        self._shares[place, i] = self._right[place][i] / self._all[place][i]


def _class_of(place: int, chance: float) -> tuple[int, int]:
    return min(place, PLACES - 1), min(int(chance * BINS), BINS - 1)


class Times:
    """Measurements of one kind of work; `typical` is the median of the last."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=SAMPLES)
        self._typical: float | None = None
        self._cold = COLD

    def __len__(self) -> int:
        return len(self._last)

    def add(self, value: float) -> None:
        """One more."""
        if self._cold:
            self._cold -= 1
            return
        self._last.append(value)
        self._typical = None

    @property
    def typical(self) -> float:
        if self._typical is None:
            self._typical = _median(self._last)
        return self._typical


def _median(values: deque[float]) -> float:
    return sorted(values)[len(values) // 2]


class Costs:
    """What rounds of one number of decoding requests cost: seconds without drafts, and in such rounds the rest.

    Seconds are of whatever clock. Rows are verified drafts, whichever request they belong to.
    """

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=LATEST)
        self._age = self._rows_age = 0
        self._rows: dict[int, Times] = {}
        self._line: tuple[float, float] | None = None
        self.terms: Terms | None = None
        """What follows from these, until something is added."""
        self._drafts: dict[int, Times] = {}
        self._reading = Times()

    def add_plain(self, seconds: float) -> None:
        """A round without drafts."""
        self._plain.append(seconds)
        self._age, self._rows_age = 0, self._rows_age + 1
        if self._rows_age == STALE:
            self._rows, self._line, self.terms = {}, None, None

    def add_rows(self, count: int, seconds: float) -> None:
        """A round with `count` further rows, without the time for making drafts."""
        self._age, self._rows_age = self._age + 1, 0
        if count and self._plain:
            self._rows.setdefault(count, Times()).add(seconds / _median(self._plain) - 1)
            self._line = self.terms = None

    def add_drafts(self, count: int, seconds: float, *, is_first: bool) -> None:
        """One call that made `count` drafts; is_first: and read a part of the text before."""
        self.terms = None
        if self._plain and is_first:
            self._reading.add(seconds / _median(self._plain))
        elif self._plain:
            self._drafts.setdefault(count, Times()).add(seconds / _median(self._plain))

    def forget(self) -> None:
        """Measure what drafts cost from the start; rows, which drafts from the text need too, are measured on."""
        self._drafts, self.terms = {}, None

    @property
    def plain(self) -> float | None:
        """Seconds of a round without drafts; None while too few were seen, or none of late."""
        return _median(self._plain) if len(self._plain) >= ENOUGH and self._age < PLAIN_EVERY else None

    @property
    def row(self) -> float:
        """What a row costs, in rounds, behind the first."""
        return self._fit()[1]

    @property
    def first_row(self) -> float:
        """What it costs besides that there are any: other kernels, whose code and data are not in the cache where most
        rounds go without, choices by rows, what is taken back.
        """
        return self._fit()[0]

    def _fit(self) -> tuple[float, float]:
        """`first_row` and `row`: a line through the counts of rows that were seen, by least squares."""
        if self._line is None:
            known = [(count, times.typical) for count, times in self._rows.items() if len(times) >= ENOUGH]
            self._line = _line_through(known) if known else (FIRST_ROW, ROW)
        return self._line

    def drafts(self, count: int, *, is_first: bool = False) -> float:
        """What a call of `count` drafts costs, in rounds; of counts not seen, in proportion to the nearest."""
        if not count:
            return 0.0
        if is_first:
            return self._reading.typical if len(self._reading) else READING
        known = [number for number, times in self._drafts.items() if len(times) >= ENOUGH]
        if not known:
            return DRAFT * count
        nearest = min(known, key=lambda number: abs(number - count))
        return max(LEAST_DRAFT, self._drafts[nearest].typical / nearest) * count


def _line_through(known: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Where a line through counts and costs begins, and how it rises; of one count alone, as `FIRST_ROW` says."""
    count = sum(number for number, _ in known) / len(known)
    cost = sum(extra for _, extra in known) / len(known)
    square = sum((number - count) ** 2 for number, _ in known)
    if square:
        slope = sum((number - count) * (extra - cost) for number, extra in known) / square
    else:
        slope = (cost - FIRST_ROW) / count
    slope = min(max(LEAST_ROW, slope), max(LEAST_ROW, cost / count))
    return max(0.0, cost - slope * count), slope


@dataclass
class Trial:
    """How drafting goes for a request, or for a kind of them.

    patience: rounds that a try may lose. gain: rounds saved in this try. wait: tokens until the next try; pause: what
    it will be if that fails.
    """

    patience: float = PATIENCE
    gain: float = 0.0
    wait: int = 0
    pause: int = SHORTEST_PAUSE

    def add(self, gained: float) -> None:
        """Count what a round gained, in rounds."""
        self.gain = min(self.gain + gained, 2 * self.patience)
        if self.gain == 2 * self.patience:
            self.pause = SHORTEST_PAUSE
        elif self.gain < -self.patience:
            self.gain, self.wait = 0.0, self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)


class Terms(NamedTuple):
    """What a draft has to promise in this round: at least `to_draft` to make a further one, `to_verify` to keep it; and
    all of them together `aside` more than that.
    """

    most: int
    to_draft: float
    to_verify: float
    aside: float = 0.0


@dataclass
class Policy:
    """Decides for one engine. `most`: drafts of a request at a time."""

    most: int
    odds: dict[bool, Odds] = field(default_factory=lambda: {True: Odds(), False: Odds()})
    """For greedy requests (True) and sampled ones; so are the trials."""
    kinds: dict[bool, Trial] = field(default_factory=lambda: {True: Trial(), False: Trial()})
    text_odds: dict[bool, MatchOdds] = field(default_factory=lambda: {True: MatchOdds(), False: MatchOdds()})
    """The same for drafts from the text itself."""
    text_kinds: dict[bool, Trial] = field(default_factory=lambda: {True: Trial(TEXT_PATIENCE), False: Trial()})
    misses: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    """Rounds since the text of the latest request offered something: the next one begins with as many."""
    _costs: dict[int, Costs] = field(default_factory=dict)

    def costs(self, requests: int) -> Costs:
        """Of rounds in which so many requests decode; the number is negative where some of them sample, which takes
        longer for every row.
        """
        found = self._costs.get(requests)
        if found is None:
            found = self._costs[requests] = Costs()
        return found

    def terms(self, requests: int) -> Terms | None:
        """For the next round, in which so many requests decode; None: no drafts, so that its time becomes known."""
        costs = self.costs(requests)
        if costs.plain is None:
            return None
        if costs.terms is not None and costs.terms.most == self.most:
            return costs.terms
        row, further = costs.row, max(0.0, costs.drafts(2) - costs.drafts(1))
        worth = 1 / abs(requests) / MARGIN
        aside = (costs.first_row + ASIDE) / worth
        costs.terms = Terms(self.most, min(1.0, (row + further) / worth), min(1.0, row / worth), aside)
        return costs.terms

    def keep(self, terms: Terms, chances: Sequence[float], greedy: bool) -> int:
        """How many of the drafts to verify."""
        product, count = 1.0, 0
        for place, chance in enumerate(chances):
            product *= self.odds[greedy].of(place, chance)
            if product < terms.to_verify:
                break
            count += 1
        return count

    def learn(self, ids: Sequence[int], chances: Sequence[float], tokens: Sequence[int], greedy: bool) -> None:
        """Drafts and their probabilities, verified or not, against the tokens that came, as far as both go."""
        for place, (draft, chance, token) in enumerate(zip(ids, chances, tokens, strict=False)):
            self.odds[greedy].count(place, chance, draft == token)
            if draft != token:
                return

    def judge(
        self, trial: Trial, greedy: bool, requests: int, made: int, verified: int, right: int, *, is_first: bool,
        is_text: bool = False,
    ) -> None:  # fmt: skip
        """What a round came to for a request: of `made` drafts some were `verified`, of which so many were `right`.

        By what such rounds take on the whole: one round's own time says more about the machine's other work.
        is_text: the drafts are from the text itself, and `made` counts those of the module beside them.
        """
        costs = self.costs(requests)
        spent = verified * costs.row + bool(verified) * costs.first_row + costs.drafts(made, is_first=is_first) + ASIDE
        kind = (self.text_kinds if is_text else self.kinds)[greedy]
        for one in (trial, kind):
            one.add(right - spent * abs(requests))
        if kind.wait == LONGEST_PAUSE and not is_text:
            costs.forget()
