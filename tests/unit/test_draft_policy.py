"""When drafts are made: by measured costs, with losses that are bounded whatever the drafts are worth."""

import pytest

from rorqual.engine.draft_policy import (
    ASIDE,
    COLD,
    ENOUGH,
    LATEST,
    MARGIN,
    PATIENCE,
    PLAIN_EVERY,
    SHORTEST_PAUSE,
    Costs,
    Policy,
    Trial,
)  # fmt: skip


def costs_of(row: float, draft: float, speed: float = 1.0) -> Costs:
    """As measured on a machine on which a round takes `speed` seconds."""
    costs = Costs()
    for _ in range(LATEST):
        costs.add_plain(speed)
    for _ in range(COLD + ENOUGH):
        costs.add_rows(2, speed * (1 + 2 * row))
        costs.add_drafts(2, speed * 2 * draft, is_first=False)
    return costs


def test_costs_are_in_rounds_and_unmoved_by_outliers_or_a_slower_machine() -> None:
    costs = costs_of(0.2, 0.1)
    costs.add_plain(50.0)
    costs.add_rows(2, 90.0)
    costs.add_drafts(2, 30.0, is_first=False)
    assert costs.plain == 1.0
    assert costs.row == pytest.approx(0.2) and costs.drafts(1) == pytest.approx(0.1)
    for _ in range(LATEST):  # three times slower from here on
        costs.add_plain(3.0)
    for _ in range(9):
        costs.add_rows(2, 3 * 1.4)
    assert costs.row == pytest.approx(0.2)


def test_rounds_without_drafts_are_looked_at_again() -> None:
    costs = costs_of(0.2, 0.1)
    assert costs.plain is not None
    for _ in range(PLAIN_EVERY):
        costs.add_rows(1, 1.2)
    assert costs.plain is None
    costs.add_plain(1.0)
    assert costs.plain is not None


@pytest.mark.parametrize("requests", [1, 4])
def test_a_draft_has_to_promise_more_than_it_costs(requests: int) -> None:
    policy = Policy(5)
    assert policy.terms(requests) is None, "what a round takes is not known yet"
    policy._costs[requests] = costs_of(0.05, 0.02)
    terms = policy.terms(requests)
    assert terms is not None
    assert terms.to_verify == pytest.approx(0.05 * requests * MARGIN)
    assert terms.to_draft == pytest.approx(0.07 * requests * MARGIN)
    assert policy.keep(terms, [0.95, 0.95, 0.01, 0.95], True) <= 3


@pytest.mark.parametrize("is_right", [False, True])
def test_what_can_be_lost_is_bounded(is_right: bool) -> None:
    """Drafts that are always wrong cost PATIENCE rounds for each pause, and pauses double."""
    policy, lost, tries, tokens = Policy(5), 0.0, 0, 10_000
    policy._costs[1] = costs_of(0.5, 0.2)
    kind = policy.kinds[True]
    for _ in range(tokens):
        if kind.wait:
            kind.wait -= 1
            continue
        policy._costs[1] = costs_of(0.5, 0.2)  # forgotten when a try ends
        policy.judge(Trial(), True, 1, 1, 1, int(is_right), is_first=False)
        lost += 0.7 + ASIDE - is_right
        tries += 1
    if is_right:
        assert tries == tokens
    else:
        assert lost <= (PATIENCE + 0.7 + ASIDE) * 9, (
            "1 at first, and 1 behind each of 128, 256, ... 2048, 2048, ... tokens"
        )
        assert lost < 0.01 * tokens / 4


def test_a_success_makes_pauses_short_again() -> None:
    trial = Trial()
    for _ in range(2):
        trial.add(-PATIENCE - 1)
    assert trial.pause == 4 * SHORTEST_PAUSE and trial.wait == 2 * SHORTEST_PAUSE
    for _ in range(20):
        trial.add(0.5)
    assert trial.pause == SHORTEST_PAUSE
