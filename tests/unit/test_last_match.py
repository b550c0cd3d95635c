"""Where the end of a text stood before: C against plain Python, and what a job's text gives as drafts."""

import random
from array import array

import numpy as np

from rorqual.engine.job import Job
from rorqual.engine.own_text import LATEST, LONGEST, MatchOdds, OwnText
from rorqual.engine.params import SamplingParams
from rorqual.engine.request import Request
from rorqual.engine.stops import StopFilter
from rorqual.ops import last_match as op


def job_of(prompt: list[int]) -> Job:
    request = Request(prompt, SamplingParams(), ids=np.array(prompt, dtype=np.int32), max_tokens=99, seed=1)
    return Job(request, None, StopFilter(()))


def test_c_finds_what_the_reference_finds() -> None:
    draw = random.Random(1)
    for n in [*range(8), *(draw.randrange(8, 400) for _ in range(300))]:
        ids = array("i", (draw.randrange(draw.choice((2, 4, 30))) for _ in range(n)))
        most = draw.choice((2, 3, 16))
        assert op.last_match(ids, most) == op.reference(ids, most), (n, ids)


def test_what_a_match_is() -> None:
    assert op.last_match(array("i", (1, 2, 3, 9, 1, 2, 3)), 16) == (3, 3)
    assert op.last_match(array("i", (7, 2, 3, 5, 1, 2, 3, 6, 2, 3)), 16) == (2, 7), "the latest of equal ones"
    assert op.last_match(array("i", (1, 2, 3, 5, 8, 2, 3, 6, 1, 2, 3)), 16) == (3, 3), "a longer one goes before"
    assert op.last_match(array("i", (5, 5, 5, 5)), 2) == (2, 3)
    assert op.last_match(array("i", (1, 2, 1, 3)), 16) == (0, 0)


def test_a_job_s_text_grows_and_goes_round() -> None:
    job = job_of([1, 2, 3, 4, 9, 1, 2])
    text = OwnText(job)
    assert text.repeat(job, 3) == (2, [3, 4, 9])
    assert text.repeat(job, 8) == (2, [3, 4, 9, 1, 2, 3, 4, 9])
    job.ids = [3, 4]
    assert text.repeat(job, 2) == (4, [9, 1])
    job.ids = [3, 4, 6]
    assert text.repeat(job, 2) == (0, [])


def test_only_the_latest_part_of_a_long_prompt_is_searched() -> None:
    job = job_of([5, 6, 7, *range(100, 100 + LATEST), 5, 6])
    assert OwnText(job).repeat(job, 2) == (0, [])


def test_odds_follow_what_came() -> None:
    odds = MatchOdds()
    before = odds.of(2)
    for _ in range(40):
        odds.learn(2, [1, 2, 3], [1, 2, 9])
    assert odds.of(2) > 0.85 > before and odds.of(4) < 0.15 and odds.of(3) > 0.85
    assert odds.keep(2, 15, 0.5) == 2 and odds.keep(2, 1, 0.5) == 1
    assert odds.keep(4, 15, 0.5) == 0
    for _ in range(1000):
        odds.count(LONGEST + 5, True)
    assert odds.of(LONGEST) > 0.99
