"""Experts spread over ranks give what one process gives, bit for bit, whatever the routing and the number of waves."""

import pytest
from exchange_cases import EXPERTS, Case, run_all
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

EDGES = [
    Case([0, 0, 0, 0], []),
    Case([0, 5, 0, 0], [[1, 6]] * 5),  # one rank has all tokens, two experts have all work
    Case([2, 1, 3, 2], [[7, 7, 7]] * 8),  # one expert three times over
    Case([2, 0, 1, 1], [[5, 0, 7], [6, 3, 2], [0, 1, 2], [4, 4, 1]], "bfloat16"),
    Case([3, 1, 0, 2], [[0, 3], [7, 1], [2, 2], [5, 6], [4, 0], [1, 7]], hidden=40, width=32),  # not in C
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    counts = draw(st.lists(st.integers(0, 9), min_size=4, max_size=4))
    active, few = draw(st.integers(1, 4)), draw(st.integers(0, EXPERTS - 1))
    chosen = st.lists(st.integers(0, few), min_size=active, max_size=active)
    experts = draw(st.lists(chosen, min_size=sum(counts), max_size=sum(counts)))
    hidden = draw(st.sampled_from([16, 40, 48]))
    return Case(counts, experts, draw(st.sampled_from(["float32", "bfloat16"])), hidden)


def drawn(number: int) -> list[Case]:
    """Cases that hypothesis draws; all of them go through one set of processes."""
    found: list[Case] = []

    @settings(
        max_examples=number, phases=[Phase.generate], database=None, derandomize=True, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases())
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_one_process(world: int) -> None:
    chosen = EDGES + drawn(14)
    assert len(chosen) > 15 and any(sum(case.counts) == 0 for case in chosen)
    answers = run_ranks(run_all, world, chosen)
    for problems, found in answers:
        assert not problems, problems[:5]
        assert len(found) == 7 and all(found.values()), found
