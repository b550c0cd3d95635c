"""Drafts from a request's own text: what followed the last tokens where they stood before.

Code repeats names and lines, and answers repeat what they were asked about. Looking that up takes microseconds where a
round of the model takes hundreds, so it pays even where it seldom finds anything. Only the request's own tokens are
looked at: drafts show in the time that tokens take, and must not tell one user of another's text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from rorqual.engine.job import Job
from rorqual.ops.last_match import last_match

LATEST = 1 << 15
"""Tokens of a prompt that are looked at: a search takes a few microseconds."""
LONGEST = 16
"""Tokens of a match; more say no more."""
START = 4.0
"""Drafts that the odds assumed at first count for."""
MEMORY = 128.0
"""Drafts that the share of right ones looks back at."""


class OwnText:
    """The tokens of a job as far as they are searched."""

    def __init__(self, job: Job) -> None:
        self._ids = array("i", job.request.prompt_array[-LATEST:].tobytes())
        self._sampled = 0

    def repeat(self, job: Job, most: int) -> tuple[int, list[int]]:
        """How long the match is, and at most `most` tokens that followed it; behind the end it goes round again."""
        if len(job.ids) > self._sampled:
            self._ids.extend(job.ids[self._sampled :])
            self._sampled = len(job.ids)
        length, place = last_match(self._ids, LONGEST)
        if not length:
            return 0, []
        found = self._ids[place : place + most].tolist()
        while len(found) < most:
            found += found[: most - len(found)]
        return length, found


class MatchOdds:
    """How likely a token behind a match is to come again, by the length of the match: counted, at first assumed."""

    def __init__(self) -> None:
        self._all = [START] * (LONGEST + 1)
        self._right = [START * (1 - 0.7 ** max(1, length - 1)) for length in range(LONGEST + 1)]

    def of(self, length: int) -> float:
        """The share of right ones."""
        length = min(length, LONGEST)
        return self._right[length] / self._all[length]

    def count(self, length: int, is_right: bool) -> None:
        """One more."""
        length = min(length, LONGEST)
        if self._all[length] >= MEMORY:
            self._right[length], self._all[length] = self._right[length] / 2, self._all[length] / 2
        self._right[length] += is_right
        self._all[length] += 1

    def keep(self, length: int, most: int, least: float, aside: float = 0.0) -> int:
        """How many of `most` drafts behind a match to verify: as long as all are right with probability `least`, which
        is what one costs; none when together they do not promise `aside` more than they cost.
        """
        product, count, gain = 1.0, 0, 0.0
        while count < most:
            product *= self.of(length + count)
            if product < least:
                break
            count, gain = count + 1, gain + product - least
        return count if gain > aside else 0

    def learn(self, length: int, ids: Sequence[int], tokens: Sequence[int]) -> None:
        """Drafts, verified or not, against the tokens that came, as far as both go."""
        for place, (draft, token) in enumerate(zip(ids, tokens, strict=False)):
            self.count(length + place, draft == token)
            if draft != token:
                return
