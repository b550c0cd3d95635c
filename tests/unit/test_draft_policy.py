"""When drafts are made: by measured costs, with losses that are bounded whatever the drafts are worth."""

import pytest

from rorqual.engine.draft_policy import (
    ASIDE,
    COLD,
    ENOUGH,
    FIRST_ROW,
    LATEST,
    LEAST_DRAFT,
    LEAST_ROW,
    MARGIN,
    PATIENCE,
    PLAIN_EVERY,
    SHORTEST_PAUSE,
    Costs,
    Policy,
    Trial,
)  # fmt: skip

FIRST = 0.2
"""What the first row costs besides, in rounds."""


def costs_of(row: float, draft: float, speed: float = 1.0) -> Costs:
    """As measured on a machine on which a round takes `speed` seconds."""
    costs = Costs()
    for _ in range(LATEST):
        costs.add_plain(speed)
    for _ in range(COLD + ENOUGH):
        for count in (2, 8):
            costs.add_rows(count, speed * (1 + FIRST + count * row))
        costs.add_drafts(2, speed * 2 * draft, is_first=False)
    return costs


def test_costs_are_in_rounds_and_unmoved_by_outliers_or_a_slower_machine() -> None:
    costs = costs_of(0.2, 0.1)
    costs.add_plain(50.0)
    costs.add_rows(2, 90.0)
    costs.add_drafts(2, 30.0, is_first=False)
    assert costs.plain == 1.0
    assert costs.row == pytest.approx(0.2) and costs.first_row == pytest.approx(FIRST)
    assert costs.drafts(1) == pytest.approx(0.1)
    for _ in range(LATEST):  # three times slower from here on
        costs.add_plain(3.0)
    for _ in range(9):
        costs.add_rows(2, 3 * (1.4 + FIRST))
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
    policy._costs[requests] = costs_of(0.15, 0.12)
    terms = policy.terms(requests)
    assert terms is not None
    assert terms.to_verify == pytest.approx(min(1.0, 0.15 * requests * MARGIN))
    assert terms.to_draft == pytest.approx(min(1.0, 0.27 * requests * MARGIN))
    assert terms.aside == pytest.approx((FIRST + ASIDE) * requests * MARGIN)
    assert policy.keep(terms, [0.95, 0.95, 0.01, 0.95], True) <= 3


@pytest.mark.parametrize("is_right", [False, True])
def test_what_can_be_lost_is_bounded(is_right: bool) -> None:
    """Drafts that are always wrong cost PATIENCE rounds for each pause, and pauses double."""
    policy, lost, tries, tokens = Policy(5), 0.0, 0, 10_000
    policy._costs[1] = costs_of(0.3, 0.2)
    kind = policy.kinds[True]
    for _ in range(tokens):
        if kind.wait:
            kind.wait -= 1
            continue
        policy._costs[1] = costs_of(0.3, 0.2)  # forgotten when a try ends
        policy.judge(Trial(), True, 1, 1, 1, int(is_right), is_first=False)
        lost += FIRST + 0.5 + ASIDE - is_right
        tries += 1
    if is_right:
        assert tries == tokens
    else:
        assert lost <= (PATIENCE + FIRST + 0.5 + ASIDE) * 9, (
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


def test_no_row_is_free_however_slow_other_rounds_were_when_it_was_measured() -> None:
    assert costs_of(-0.05, 0.0).row == LEAST_ROW
    assert costs_of(0.2, 0.0).drafts(2) == pytest.approx(2 * LEAST_DRAFT)


def test_of_one_number_of_rows_alone_a_part_is_taken_for_what_the_first_one_costs_besides() -> None:
    costs = Costs()
    costs.add_plain(1.0)
    for _ in range(COLD + ENOUGH):
        costs.add_rows(4, 1 + FIRST_ROW + 4 * 0.3)
    assert costs.first_row == pytest.approx(FIRST_ROW) and costs.row == pytest.approx(0.3)
    policy = Policy(15)
    odds = policy.text_odds[True]
    assert odds.keep(2, 15, costs.row, 0.0) > 0, "a row that pays by itself"
    assert odds.keep(2, 15, costs.row, costs.first_row) == 0, "does not where it is the first"
