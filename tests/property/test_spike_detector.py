"""Falling losses with noise never set off the detector; spikes of 1.9 nats always do, wherever they stand."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st
from small_models import drawn

from rorqual.train.spikes import SpikeDetector

STEPS = 700


@st.composite
def curves(draw: st.DrawFn) -> list[float]:
    """A loss that falls linearly, as a power or exponentially, with normal noise."""
    noise = math.exp(draw(st.floats(math.log(0.002), math.log(0.15))))
    top, pace = draw(st.floats(4, 12)), math.exp(draw(st.floats(math.log(10), math.log(400))))
    kind, power = draw(st.sampled_from(["line", "power", "exponential"])), draw(st.floats(0.05, 0.6))
    generator = random.Random(draw(st.integers(0, 10**6)))

    def base(step: int) -> float:
        if kind == "line":
            return top * (1 - 0.8 * step / STEPS)
        share = (1 + step / pace) ** -power if kind == "power" else math.exp(-step / pace)
        return 1.5 + (top - 1.5) * share

    return [base(step) + generator.gauss(0, noise) for step in range(1, STEPS + 1)]


@given(curves())
@drawn(60)
def test_a_falling_loss_is_no_spike(losses: list[float]) -> None:
    detector = SpikeDetector()
    assert [detector.observe(step, loss) for step, loss in enumerate(losses, 1)] == [None] * STEPS


@given(curves(), st.integers(130, STEPS - 5))
@drawn(60)
def test_a_rise_of_1_9_nats_is_noticed_at_once_and_its_begin_found(losses: list[float], begin: int) -> None:
    detector = SpikeDetector()
    for step, loss in enumerate(losses, 1):
        spike = detector.observe(step, loss + (1.9 if step >= begin else 0.0))
        assert spike is None or step >= begin
        if spike is not None:
            assert step <= begin + 2
            # A step of plain noise that stood out just before may count to the excursion.
            assert begin - 3 <= spike.onset <= begin
            return
    raise AssertionError("not noticed")


@given(curves(), st.integers(130, STEPS - 1))
@drawn(20)
def test_what_was_remembered_can_be_saved_and_taken_over(losses: list[float], cut: int) -> None:
    whole, first, second = SpikeDetector(), SpikeDetector(), SpikeDetector()
    risen = [loss + (1.9 if step > cut + 3 else 0.0) for step, loss in enumerate(losses, 1)]
    expected = [whole.observe(step, loss) for step, loss in enumerate(risen, 1)]
    found = [first.observe(step, loss) for step, loss in enumerate(risen[:cut], 1)]
    second.load_state_dict(first.state_dict())
    found += [second.observe(step, loss) for step, loss in enumerate(risen[cut:], cut + 1)]
    assert found == expected
