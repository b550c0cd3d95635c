"""How many drafts pay: measured seconds of rounds and drafts against how likely drafts are to be right.

A draft costs the time of making it and of one more row in the step, which depends on the machine, the model, the
context and, with experts on the CPU, on where the rows are routed; so both are measured while the engine runs, never
assumed. How likely a draft is to be right is counted by the probability that the MTP module gave it, apart for greedy
and sampled requests. A further draft is made, and verified, as long as the time it saves on average exceeds the time it
costs. What drafting really gained is followed for each request: below break-even it stops, and is tried again after a
pause that grows with each failure. A new request goes on where the last of its kind stood.

Source: serving practice: drafts of a fixed length often lose where the experts are on the CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

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
SAMPLES = 24
"""Rounds of a kind that its cost is taken from."""
ENOUGH = 4
"""Rounds of a kind before they count."""
PLAIN_EVERY = 32
"""One round in so many is made without drafts, so that its cost stays known."""
SHORTEST_PAUSE, LONGEST_PAUSE = 64, 1024
"""Tokens."""
PATIENCE, CREDIT = 5.0, 5.0
"""A try ends when so many rounds' time is lost; what it gained before counts for no more than the other. Single rounds
gain or lose about one round's time, so their mean shows only over many."""


class Odds:
    """How likely a draft is to be right, by its place and the module's probability: counted, at first the latter.

    The module is surer of itself than it should be where it reads its own streams, behind the first draft.
    """

    def __init__(self) -> None:
        middles = [(i + 0.5) / BINS for i in range(BINS)]
        self._all = [[START] * BINS for _ in range(PLACES)]
        self._right = [[START * middle ** (1 + place / 2) for middle in middles] for place in range(PLACES)]
        self.kept = torch.tensor(self._right) / START
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
        self.kept[place, i] = self._right[place][i] / self._all[place][i]


def _class_of(place: int, chance: float) -> tuple[int, int]:
    return min(place, PLACES - 1), min(int(chance * BINS), BINS - 1)


class Times:
    """Measured seconds of one kind of work. `typical` is their lower quartile: what disturbs a machine only adds."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=SAMPLES)
        self._typical: float | None = None

    def __len__(self) -> int:
        return len(self._last)

    def add(self, seconds: float) -> None:
        """One more."""
        self._last.append(seconds)
        self._typical = None

    @property
    def typical(self) -> float:
        if self._typical is None:
            self._typical = sorted(self._last)[len(self._last) // 4]
        return self._typical


class Costs:
    """Seconds of rounds by requests and extra rows, and of drafts by their number."""

    def __init__(self) -> None:
        self._rounds: dict[int, dict[int, Times]] = {}
        self._drafts: dict[int, Times] = {}

    def add_round(self, requests: int, extra: int, seconds: float) -> None:
        """A round of one token for each of `requests`, and `extra` drafts that were verified."""
        self._rounds.setdefault(requests, {}).setdefault(extra, Times()).add(seconds)

    def add_drafts(self, count: int, seconds: float) -> None:
        """One call that made `count` drafts."""
        self._drafts.setdefault(count, Times()).add(seconds)

    def plain(self, requests: int) -> float | None:
        """A round without drafts; None while too few were seen."""
        seen = self._rounds.get(requests, {}).get(0)
        return seen.typical if seen is not None and len(seen) >= ENOUGH else None

    def row(self, requests: int) -> float | None:
        """What a row more costs: a line through the plain round and those with drafts; None while these are too few."""
        plain = self.plain(requests)
        known = [
            (extra, times.typical)
            for extra, times in self._rounds.get(requests, {}).items()
            if extra and len(times) >= ENOUGH
        ]  # fmt: skip
        if plain is None or not known:
            return None
        return max(0.0, sum((at - plain) * extra for extra, at in known) / sum(extra**2 for extra, _ in known))

    def drafts(self, count: int) -> float:
        """A call of `count` drafts: as measured, or in proportion to the nearest number that was; 0 before any."""
        if not self._drafts or not count:
            return 0.0
        nearest = min(self._drafts, key=lambda n: abs(n - count))
        return self._drafts[nearest].typical * count / nearest


@dataclass
class Trial:
    """How drafting goes for one request.

    length: most drafts now, one more after a round in which all were right, one less after another. gain: time
    saved in this try, in rounds without drafts. wait: tokens until the next try; pause: what it will be if that fails.
    """

    length: int = 1
    gain: float = 0.0
    wait: int = 0
    pause: int = SHORTEST_PAUSE

    def add(self, gained: float, plain: float) -> None:
        """Count a round that gained so many seconds where one without drafts takes `plain`."""
        self.gain = min(self.gain + gained / plain, CREDIT)
        if self.gain == CREDIT:
            self.pause = SHORTEST_PAUSE
        elif self.gain < -PATIENCE:
            self.gain, self.wait = 0.0, self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)


@dataclass(frozen=True)
class Terms:
    """What a draft has to promise in this round: at least `to_draft` to make a further one, `to_verify` to keep it."""

    most: int
    to_draft: float
    to_verify: float


@dataclass
class Policy:
    """Decides for one engine. `most`: drafts of a request at a time."""

    most: int
    costs: Costs = field(default_factory=Costs)
    odds: dict[bool, Odds] = field(default_factory=lambda: {True: Odds(), False: Odds()})
    """For greedy requests (True) and sampled ones."""
    _last: dict[bool, Trial] = field(default_factory=lambda: {True: Trial(), False: Trial()})
    _rounds: int = 0
    _looked: int = 0
    _plain: int = 0

    def new_trial(self, greedy: bool) -> Trial:
        """For a new request: where the last one of its kind stands."""
        return replace(self._last[greedy], length=1)

    def terms(self, requests: int) -> Terms | None:
        """For the next round, in which so many requests decode; None: no drafts, so that its cost becomes known."""
        self._rounds += 1
        plain = self.costs.plain(requests)
        if plain is None or self._rounds % PLAIN_EVERY == 0:
            return None
        row = self.costs.row(requests)
        if row is None:  # look what a row costs, with one draft and with two by turns of `ENOUGH`
            self._looked += 1
            return Terms(1 + self._looked // ENOUGH % 2, 0.0, 0.0)
        worth = plain / requests / MARGIN
        further = max(0.0, self.costs.drafts(2) - self.costs.drafts(1))
        return Terms(self.most, min(1.0, (row + further) / worth), min(1.0, row / worth))

    def wants_plain(self, requests: int) -> bool:
        """Whether a round without drafts is to be counted: few of them do, while drafts rest."""
        self._plain += 1
        return self._plain % 8 == 0 or self.costs.plain(requests) is None

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

    def adapt(self, trial: Trial, verified: int, accepted: int) -> None:
        """The length after a round in which `accepted` of `verified` drafts were right."""
        if verified:
            trial.length = min(trial.length + 1, self.most) if accepted == verified else max(1, trial.length - 1)

    def judge(self, trials: Sequence[tuple[Trial, bool]], requests: int, tokens: int, seconds: float) -> None:
        """What a round gained for the requests with drafts in it, by what it really took: also the time for making
        them, for reading a prompt's end before the first, and whatever else came with them.
        """
        plain = self.costs.plain(requests)
        for trial, greedy in trials if plain else ():
            assert plain is not None
            each = tokens * plain / requests - seconds
            trial.add(max(each, -plain) / len(trials), plain / requests)
            self._last[greedy] = replace(trial)
