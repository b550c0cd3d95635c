"""The detector's rules one by one."""

import math

from rorqual.train.spikes import SpikeDetector, Thresholds


def calm(detector: SpikeDetector, steps: int, start: int = 1) -> None:
    """Losses around 3 with residuals of about 0.05."""
    for step in range(start, start + steps):
        assert detector.observe(step, 3.0 + 0.05 * math.sin(2.4 * step)) is None


def test_nothing_fires_before_the_warmup_except_what_is_no_number() -> None:
    detector = SpikeDetector()
    calm(detector, 50)
    assert detector.observe(51, 9.0) is None
    spike = detector.observe(52, math.nan)
    assert spike is not None and (spike.step, spike.onset, spike.score) == (52, 52, math.inf)
    assert SpikeDetector().observe(1, math.inf) is not None


def test_an_excursion_begins_with_its_first_step_that_stands_out() -> None:
    detector = SpikeDetector()
    calm(detector, 200)
    assert detector.observe(201, 3.15) is None and detector.onset == 201  # about 4 sigma: stands out, no spike
    assert detector.observe(202, 3.18) is None
    spike = detector.observe(203, 4.5)
    assert spike is not None and (spike.step, spike.onset) == (203, 201)
    assert 2.9 < spike.predicted < 3.1 and spike.score > 6


def test_steps_that_stand_out_do_not_raise_the_bar() -> None:
    detector = SpikeDetector()
    calm(detector, 200)
    before = detector.variance, detector.level
    for step in range(201, 230):
        assert detector.observe(step, 3.17) is None
    assert (detector.variance, detector.level) == before
    assert detector.observe(230, 3.6) is not None


def test_a_lasting_rise_becomes_the_new_normal() -> None:
    detector = SpikeDetector(Thresholds(lookback=10))
    calm(detector, 200)
    for step in range(201, 211):
        assert detector.observe(step, 3.17) is None
    assert detector.seen > 100
    assert detector.observe(211, 3.17) is None
    assert detector.seen == 1 and detector.is_calm and detector.level == 3.17


def test_a_quiet_loss_may_twitch() -> None:
    detector = SpikeDetector()
    for step in range(1, 300):
        assert detector.observe(step, 2.0) is None
    assert detector.observe(300, 2.15) is None  # infinitely many sigma, but less than min_rise
    assert detector.observe(301, 2.25) is not None


def test_falling_is_no_news() -> None:
    detector = SpikeDetector()
    calm(detector, 200)
    assert detector.observe(201, 0.5) is None and detector.is_calm
