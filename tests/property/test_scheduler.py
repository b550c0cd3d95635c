"""The scheduler as bookkeeping: whatever is admitted, cancelled and finished, its promises hold in every round."""

import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import drawn

from rorqual.engine.job import Job
from rorqual.engine.pace import Pace
from rorqual.engine.params import SamplingParams
from rorqual.engine.request import Request
from rorqual.engine.scheduler import GRAIN, Round, Scheduler
from rorqual.engine.stops import StopFilter
from rorqual.errors import ConfigError, RequestError


def job(prompt: int, max_tokens: int, priority: int = 0, timeout_s: float | None = None) -> Job:
    params = SamplingParams()
    request = Request(range(prompt), params, max_tokens=max_tokens, seed=0, priority=priority, timeout_s=timeout_s)
    return Job(request, None, StopFilter(()))


def cost(num_tokens: int) -> int:
    """A fixed part, and pages of 8 tokens."""
    return 100 + 10 * -(-num_tokens // 8)


@dataclass
class Play:
    """A scheduler, and what a model would do with its rounds."""

    scheduler: Scheduler
    live: list[Job] = field(default_factory=list)
    done: list[Job] = field(default_factory=list)
    stood: Job | None = None
    """The first in rank, where it did not move in the last round."""

    def submit(self, one: Job) -> None:
        if not self.scheduler.fits(one.most_tokens):
            return  # the engine refuses these at once
        if self.scheduler.is_full:
            with pytest.raises(RequestError, match="Try again") as caught:
                self.scheduler.add(one)
            assert caught.value.status == 429
            return
        self.scheduler.add(one)
        self.live.append(one)

    def round(self) -> Round:
        before = [*self.scheduler.waiting]
        plan = self.scheduler.next_round()
        for one in plan.gone:
            self.live.remove(one)
        self.check(plan, [one for one in before if one not in plan.gone])
        for one, count in plan.work:
            assert one.next_ids(count) == (*range(one.num_tokens - len(one.ids)), *one.ids)[one.num_read :][:count]
            one.num_read += count
            if one.num_read == one.num_tokens:
                one.ids.append(1000 + len(one.ids))
                if len(one.ids) == one.request.max_tokens:
                    self.scheduler.remove(one)
                    self.live.remove(one)
                    self.done.append(one)
        return plan

    def check(self, plan: Round, waited: list[Job]) -> None:
        s = self.scheduler
        assert sorted(map(id, [*s.running, *s.waiting])) == sorted(map(id, self.live)), "each in one place"
        assert len(s.running) <= s.max_running
        assert s.max_bytes is None or s.used_bytes <= s.max_bytes
        assert [one.rank for one in s.waiting] == sorted(one.rank for one in s.waiting)
        counts = {id(one): count for one, count in plan.work}
        assert len(counts) == len(plan.work) and all(one in s.running for one, _ in plan.work)
        assert sum(counts.values()) <= s.step_tokens
        assert sum(count for one, count in plan.work if one.is_prefilling) <= s.chunk
        for one, count in plan.work:
            assert 1 <= count <= one.num_tokens - one.num_read
        for one in s.running:
            assert one.is_prefilling or counts[id(one)] == 1, "decoding never pauses"
        if self.live:
            first = min(self.live, key=lambda one: one.rank)
            moves = first in [one for one, _ in plan.work]
            assert moves or self.stood is not first, "the first moves in every other round"
            self.stood = None if moves else first
        for one in plan.admitted:
            passed = [other for other in waited if other in s.waiting and other not in plan.preempted]
            assert all(one.rank < other.rank for other in passed), "nobody is overtaken in the queue"
        for one in plan.preempted:
            assert one.state is None and one.num_read == 0


prompts = st.integers(1, 12) | st.integers(1, 300)
submissions = st.tuples(st.just("submit"), prompts, st.integers(1, 20), st.integers(-1, 1))
actions = (
    submissions | st.tuples(st.just("round"), st.integers(1, 6)) | st.tuples(st.just("cancel"), st.integers(0, 99))
)


@drawn(150)
@given(
    max_running=st.integers(1, 5),
    max_queued=st.integers(1, 6),
    chunk=st.sampled_from([1, 5, 64, 128, 200, 256]),
    spare=st.none() | st.integers(1, 40),
    max_bytes=st.none() | st.integers(150, 900),
    acts=st.lists(actions, min_size=1, max_size=40),
)
def test_promises_hold_and_everything_ends(
    max_running: int,
    max_queued: int,
    chunk: int,
    spare: int | None,
    max_bytes: int | None,
    acts: list[tuple[str, int, int, int]],
) -> None:
    steps = None if spare is None else max_running + spare
    play = Play(Scheduler(max_running, max_queued, chunk, steps, max_bytes=max_bytes, cost=cost))
    for kind, *numbers in acts:
        if kind == "submit":
            play.submit(job(*numbers))
        elif kind == "cancel":
            if play.live:
                play.live[numbers[0] % len(play.live)].request.cancel()
        else:
            for _ in range(numbers[0]):
                play.round()
    # The first in rank moves by at least one token in two rounds, so what is left bounds the rounds that are needed.
    most = 2 * sum(one.most_tokens for one in play.live) + 1
    for _ in range(most):
        if play.scheduler.is_idle:
            break
        play.round()
    assert play.scheduler.is_idle and not play.live
    assert all(len(one.ids) == one.request.max_tokens for one in play.done)


def test_a_step_is_shared_by_prompts_that_fit_and_pages_of_those_that_do_not() -> None:
    scheduler = Scheduler(8, 8, chunk=512)
    for prompt in (200, 1000, 50, 90):
        scheduler.add(job(prompt, 4))
    assert [count for _, count in scheduler.next_round().work] == [200, 2 * GRAIN, 50]
    assert [count for _, count in scheduler.next_round().work] == [50, 90, 200, GRAIN], "the shortest first"
    assert scheduler.next_round().work[0][1] == 200, "planning alone reads nothing"


def test_decoding_requests_come_first_and_bound_the_prompts() -> None:
    scheduler = Scheduler(4, 8, chunk=64, step_tokens=8)
    talkers = [job(1, 50) for _ in range(3)]
    for one in talkers:
        scheduler.add(one)
    play = Play(scheduler, live=[*talkers])
    play.round()
    reader = job(100, 1)
    play.submit(reader)
    plan = play.round()
    assert plan.work == [*((one, 1) for one in talkers), (reader, 5)]


def test_short_prompts_and_a_long_one_before_them_take_turns() -> None:
    """With 128 tokens a step, a question of 100 behind a book is read by the second step; the book has the others."""
    play = Play(Scheduler(8, 8, chunk=128))
    book, question, urgent = job(5000, 1), job(100, 1), job(300, 1, priority=1)
    for one in (book, question):
        play.submit(one)
    assert play.round().work == [(book, 128)]
    assert play.round().work == [(question, 100)] and question in play.done
    assert play.round().work == [(book, 128)]
    play.submit(urgent)
    for count in (128, 128, 44):
        assert play.round().work[0] == (urgent, count), "priority goes before turns"
    assert book.num_read > 256 or play.round().work == [(book, 128)]


def test_a_higher_priority_takes_the_place_of_the_lowest() -> None:
    scheduler = Scheduler(2, 8)
    old, young, urgent, equal = job(4, 9), job(4, 9), job(4, 9, priority=1), job(4, 9)
    for one in (old, young):
        scheduler.add(one)
    scheduler.next_round()
    young.state, young.num_read = object(), 4
    scheduler.add(equal)
    assert not scheduler.next_round().preempted, "equals wait"
    scheduler.add(urgent)
    plan = scheduler.next_round()
    assert (plan.preempted, plan.admitted) == ([young], [urgent])
    assert young.state is None
    assert scheduler.waiting == [young, equal], "it keeps its place in the order"


def test_memory_goes_to_the_first_and_is_asked_back_from_the_last() -> None:
    play = Play(Scheduler(4, 8, max_bytes=460, cost=cost))
    jobs = [job(8, 250) for _ in range(3)]
    for one in jobs:
        play.submit(one)
    play.round()
    # A page for each of two is 110 bytes; the third asks for room to grow, 270.
    assert play.scheduler.running == jobs[:2]

    play = Play(Scheduler(4, 8, max_bytes=500, cost=cost))
    jobs = [job(8, 150) for _ in range(2)]
    for one in jobs:
        play.submit(one)
    preempted = [one for _ in range(400) for one in play.round().preempted]
    assert preempted == [jobs[1]], "both grow to 250 bytes; then the second waits for the end of the first"
    assert play.done == jobs


def test_cancelled_and_late_requests_leave_at_the_next_round() -> None:
    offset = 0.0
    scheduler = Scheduler(1, 8, clock=lambda: time.monotonic() + offset)
    running, late, waiting = job(4, 9), job(4, 9, timeout_s=50), job(4, 9)
    for one in (running, late, waiting):
        scheduler.add(one)
    assert scheduler.next_round().gone == []
    offset = 51.0
    running.request.cancel()
    plan = scheduler.next_round()
    assert set(plan.gone) == {running, late}
    assert [one for one, _ in plan.work] == [waiting]


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"step_tokens": 4}, "step_tokens is 4, but 4 requests may run.*Set it to 5 or more"),
        ({"max_bytes": 100, "cost": cost}, "max_state_bytes is 100.*takes 110 bytes"),
    ],
)
def test_limits_that_let_nothing_run_are_refused(limits: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Scheduler(4, 4, **limits)  # type: ignore[arg-type]


def test_a_step_reads_as_much_as_its_time_allows() -> None:
    pace = Pace(1024, gap_s=0.05)
    assert pace(8) == 1024, "nothing is known yet"
    for _ in range(40):
        pace.observe(0, 10, 0.010)  # a millisecond for each that decodes
        pace.observe(512, 10, 0.010 + 512 * 1e-4)
    assert pace(0) == 1024, "nobody waits"
    assert pace(10) == 384, "40 ms are left, of 0.1 ms a token: 400, in whole pages"
    assert pace(30) == GRAIN, "20 ms are 200 tokens"
    assert pace(60) == GRAIN, "no time is left, and the prompt moves on"
    for _ in range(40):
        pace.observe(256, 0, 256 * 4e-5)  # the machine is quicker now
    assert pace(10) == 896
    assert Pace(1024, None)(10) == 1024


@given(
    gap_s=st.floats(1e-4, 1.0),
    steps=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 70), st.floats(1e-6, 10.0)), max_size=20),
    chunk=st.sampled_from([1, 100, 128, 500, 512]),
)
def test_whatever_was_measured_a_prompt_moves_on(gap_s: float, steps: list[tuple[int, int, float]], chunk: int) -> None:
    pace = Pace(chunk, gap_s)
    for prompt_tokens, decoding, seconds in steps:
        pace.observe(prompt_tokens, decoding, seconds)
        for others in (0, 1, 64):
            assert min(chunk, GRAIN) <= pace(others) <= chunk


def test_a_burst_before_the_first_round_may_fill_places_and_queue() -> None:
    scheduler = Scheduler(3, 2)
    for _ in range(5):
        scheduler.add(job(4, 4))
    with pytest.raises(RequestError, match="Try again"):
        scheduler.add(job(4, 4))
    scheduler.next_round()
    assert (len(scheduler.running), len(scheduler.waiting)) == (3, 2)
    with pytest.raises(RequestError, match="Try again"):
        scheduler.add(job(4, 4))
