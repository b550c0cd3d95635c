"""The C search for forced entries agrees with the plain one, whatever way the tokens came in and were taken back."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.ops.forced_entries import ANSWERS, ASKS, Grams, Policy, force_reference
from rorqual.ops.native import library

USER, ASSISTANT = 20, 21
ROLES = np.zeros(24, np.uint8)
ROLES[USER], ROLES[ASSISTANT] = ASKS, ANSWERS


def some_policy(draw: random.Random) -> Policy:
    return Policy(
        ratio=4, window=draw.choice((4, 8, 13)), first=draw.choice((0, 2)), last=draw.choice((0, 3)),
        system_first=draw.choice((0, 2)), system_last=draw.choice((0, 1)), pinned_most=draw.choice((0, 3, 9)),
        recent=draw.choice((1, 6, 20)), message=draw.choice((0, 5, 40)), half=draw.choice((2, 32)),
        cut=draw.choice((1, 3, 8)),
        hits=draw.choice((1, 3, 16)), visits=draw.choice((3, 20, 512)),
        back=draw.choice((0, 1)), behind=draw.choice((0, 2)),
        lexical_most=draw.choice((0, 4, 30)),
    )  # fmt: skip


@pytest.mark.skipif(library.load() is None, reason="no C compiler: the plain search runs, which is the reference")
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_the_search_is_the_plain_one(seed: int) -> None:
    draw = random.Random(seed)
    policy, letters = some_policy(draw), draw.choice((3, 8, 20))
    pins = [(at, at + draw.randrange(0, 20)) for at in (draw.randrange(150) for _ in range(draw.randrange(3)))]
    grams, tokens = Grams(policy.ratio, ROLES), list[int]()

    def some(count: int) -> list[int]:
        return [draw.randrange(20, 22) if draw.random() < 0.04 else draw.randrange(letters) for _ in range(count)]

    for _ in range(8):
        if tokens and draw.random() < 0.3:
            tokens = tokens[: draw.randrange(len(tokens))]
            grams.cut(len(tokens))
        if draw.random() < 0.2:
            grams = grams.copy()
        new = some(draw.choice((1, 1, 7, 90, 300)))
        tokens += new
        if len(new) == 1:
            found = grams.force_next(new[0], policy, pins)
        else:
            grams.add(new)
            found = grams.force(policy, len(tokens) - len(new), pins)
        for row in {0, len(new) // 2, len(new) - 1}:
            entries, kinds = force_reference(tokens, len(tokens) - len(new) + row, policy, ROLES, pins)
            size = int(found.sizes[row])
            assert found.entries[row, :size].tolist() == entries
            assert (found.entries[row, size:] == -1).all()
            assert found.kinds[row].tolist() == kinds


def test_what_repeats_the_question_is_shown_with_what_follows() -> None:
    tokens = [i % 17 for i in range(400)]
    key, value = [18, 19, 18], [22, 23]
    tokens[203:206], tokens[206:208] = key, value
    grams = Grams(4, ROLES)
    grams.add([*tokens, *key])
    policy = Policy(ratio=4, window=16, hits=1, lexical_most=30)
    found = grams.force(policy, len(tokens) + 2)
    shown = set(found.entries[0].tolist())
    assert {205 // 4 + i for i in range(-1, 9)} <= shown
    assert found.kinds[0].tolist() == [0, 0, 10]


def test_anchors_pins_and_system_message() -> None:
    grams = Grams(4, ROLES)
    grams.add([1] * 40 + [USER] + [i % 13 for i in range(300)])
    policy = Policy(ratio=4, window=16, first=2, last=3, system_first=4, system_last=2, pinned_most=20)
    found = grams.force(policy, 340, [(100, 104)])
    near = (340 - 16) // 4 + 2
    # the system message fills entries 0 to 9; two of its first four are anchors already
    assert set(found.entries[0, : found.sizes[0]].tolist()) == {0, 1, 2, 3, 8, 9, 25, 26, near - 1, near - 2, near - 3}
    assert found.kinds[0].tolist() == [5, 6, 0]
