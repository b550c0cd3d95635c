"""Schedules as functions of consumed tokens."""

import dataclasses

import pytest

from rorqual.errors import ConfigError
from rorqual.train.schedules import Schedule

SCHEDULE = Schedule(
    total_tokens=1000,
    peak_lr=1.0,
    end_lr=0.1,
    warmup_steps=4,
    decay_from=0.6,
    dense_until=0.1,
    mtp_weight=0.3,
    mtp_weight_end=0.1,
    bias_speed=0.001,
    bias_off_from=0.97,
    seq_lens=((0.0, 4), (0.5, 8)),
    tokens_per_step=16,
)


def test_learning_rate_warms_up_holds_and_decays() -> None:
    assert [SCHEDULE.lr(step, 0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert SCHEDULE.lr(100, 599) == 1.0
    assert SCHEDULE.lr(100, 600) == 1.0
    assert SCHEDULE.lr(100, 800) == pytest.approx(0.55)
    assert SCHEDULE.lr(100, 1000) == pytest.approx(0.1)
    assert SCHEDULE.lr(100, 2000) == pytest.approx(0.1)


def test_switches() -> None:
    assert [SCHEDULE.is_dense(t) for t in (0, 99, 100)] == [True, True, False]
    assert [SCHEDULE.mtp(t) for t in (0, 599, 600)] == [0.3, 0.3, 0.1]
    assert [SCHEDULE.bias(t) for t in (0, 969, 970)] == [0.001, 0.001, 0.0]
    assert [SCHEDULE.seq_len(t) for t in (0, 499, 500, 1000)] == [4, 4, 8, 8]
    assert [SCHEDULE.rows(t) for t in (0, 500)] == [4, 2]


def test_batch_ramp_grows_to_full_size() -> None:
    ramp = dataclasses.replace(SCHEDULE, ramp_until=0.2, ramp_from=0.25, tokens_per_step=64)
    assert [ramp.rows(t) for t in (0, 100, 199, 200)] == [4, 10, 16, 16]


@pytest.mark.parametrize("ramp_until", [0.0, 0.3])
def test_number_of_steps_is_what_a_run_takes(ramp_until: float) -> None:
    schedule = dataclasses.replace(SCHEDULE, total_tokens=20_000, tokens_per_step=96, ramp_until=ramp_until)
    tokens = steps = 0
    while tokens < schedule.total_tokens:
        assert schedule.steps_from(tokens) == schedule.total_steps() - steps
        tokens += schedule.rows(tokens) * schedule.seq_len(tokens)
        steps += 1
    assert schedule.total_steps() == steps


def test_row_lengths_must_hold_from_the_start() -> None:
    with pytest.raises(ConfigError, match=r"seq_lens is \(\(0.5, 64\),\).*Begin at 0.0"):
        dataclasses.replace(SCHEDULE, seq_lens=((0.5, 64),))
