"""The n-gram yardstick: against counts by hand, a slow definition, and its sums of probability."""

import itertools
import math
from collections import Counter

import ngram
import numpy as np
import pytest
import torch
from ngram import NGram, as_text, documents_of

from rorqual.train.feed import Rows

HALF = (0.5, 0.5, 0.5)


def text_of(documents: list[list[int]], vocab: int, order: int) -> ngram.Text:
    return as_text([(np.array(d), np.ones(len(d), dtype=bool)) for d in documents], vocab, order)


def test_unigrams_by_hand() -> None:
    """0 twice, 1 once, 2 never: (c - 1/2) / 3 plus 2 * 1/2 / 3 shared out over three ids."""
    model = NGram.fit(text_of([[0, 1, 0]], 3, 1), 3, 1, [HALF])
    found = np.exp(-model.score(text_of([[0, 1, 2]], 3, 1)))
    assert found == pytest.approx([1.5 / 3 + 1 / 9, 0.5 / 3 + 1 / 9, 1 / 9])


def test_bigrams_by_hand() -> None:
    """Document 0 1 0 1 of V = 2; start mark s. Bigrams: s0 once, 01 twice, 10 once; distinct left neighbours: of 0 two
    (s, 1), of 1 one (0).
    """
    model = NGram.fit(text_of([[0, 1, 0, 1]], 2, 2), 2, 2, [HALF, HALF])
    unigram = [1.5 / 3 + 1.0 / 3 / 2, 0.5 / 3 + 1.0 / 3 / 2]
    assert sum(unigram) == pytest.approx(1)
    found = np.exp(-model.score(text_of([[0, 1, 1, 0], [1]], 2, 2)))
    expected = [
        0.5 / 1 + 0.5 / 1 * unigram[0],  # 0 at a start
        1.5 / 2 + 0.5 / 2 * unigram[1],  # 1 after 0
        0.0 + 0.5 / 1 * unigram[1],  # 1 after 1: never
        0.5 / 1 + 0.5 / 1 * unigram[0],  # 0 after 1
        0.0 + 0.5 / 1 * unigram[1],  # 1 at a start: never
    ]
    assert found == pytest.approx(expected)


def test_an_unseen_context_passes_the_question_on() -> None:
    model = NGram.fit(text_of([[0, 1, 0, 1]], 3, 3), 3, 3, [HALF] * 3)
    text = text_of([[2, 2, 0]], 3, 3)
    assert model.score(text)[2] == pytest.approx(model.score(text, 1)[2])


def slow(documents: list[list[int]], vocab: int, order: int, discounts: list[ngram.Discounts]) -> dict:
    """P(token | context) for every context of order - 1, by the definition, in dictionaries."""
    padded = [[vocab] * (order - 1) + d for d in documents]
    counts: list[Counter] = [Counter() for _ in range(order + 1)]
    for d in padded:
        for t in range(order - 1, len(d)):
            counts[order][tuple(d[t - order + 1 : t + 1])] += 1
    for length in range(order - 1, 0, -1):
        for run in counts[length + 1]:
            counts[length][run[1:]] += 1

    def p(token: int, context: tuple[int, ...]) -> float:
        length = len(context) + 1
        below = 1 / vocab if length == 1 else p(token, context[1:])
        mine = {run: c for run, c in counts[length].items() if run[:-1] == context}
        total = sum(mine.values())
        if not total:
            return below
        d = discounts[length - 1]
        taken = sum(d[min(c, 3) - 1] for c in mine.values())
        c = counts[length][(*context, token)]
        return (c - (d[min(c, 3) - 1] if c else 0) + taken * below) / total

    contexts = itertools.product(range(vocab + 1), repeat=order - 1)
    return {(context, token): p(token, context) for context in contexts for token in range(vocab)}


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_slow_definition_and_sums_to_one(order: int) -> None:
    draw = np.random.default_rng(order)
    documents = [draw.integers(0, 4, size=n).tolist() for n in (9, 1, 30, 17)]
    model = NGram.fit(text_of(documents, 4, order), 4, order)
    discounts = [level.discounts for level in model._levels]
    truth = slow(documents, 4, order, discounts)
    for context in itertools.product(range(5), repeat=order - 1):
        got = []
        for token in range(4):
            ids = np.array([*context, token])
            if any(b == 4 and a != 4 for a, b in itertools.pairwise(context)):
                continue  # a start mark is never in the middle
            real = ids[ids != 4]
            got.append(float(np.exp(-model.score(text_of([real.tolist()], 4, order))[-1])))
            if len(real) == order or 4 in context:
                assert got[-1] == pytest.approx(truth[context, token], rel=1e-12), (context, token)
        assert not got or sum(got) == pytest.approx(1, abs=1e-12), context


def test_discounts_from_counts_of_counts() -> None:
    """Ten runs once, six twice, four three times, two four times: Y = 10 / 22."""
    counts = np.array([1.0] * 10 + [2.0] * 6 + [3.0] * 4 + [4.0] * 2)
    y = 10 / 22
    assert ngram._discounts(counts) == pytest.approx((1 - 2 * y * 0.6, 2 - 3 * y * 4 / 6, 3 - 4 * y * 2 / 4))
    assert ngram._discounts(np.array([5.0, 6.0])) == (0.75, 0.75, 0.75)


def test_longer_runs_help_where_text_repeats() -> None:
    draw = np.random.default_rng(0)
    phrases = [draw.integers(0, 30, size=6).tolist() for _ in range(12)]
    documents = [sum((phrases[i] for i in draw.integers(0, 12, size=20)), []) for _ in range(40)]
    model = NGram.fit(text_of(documents[:30], 30, 5), 30, 5)
    held = text_of(documents[30:], 30, 5)
    losses = [float(model.score(held, n).mean()) for n in range(1, 6)]
    assert losses[2] < losses[1] < losses[0] < math.log(30) + 0.1 and losses[4] < 0.6


def test_documents_of_packed_rows() -> None:
    """Segments, padding and labels that are not to be learned."""
    tokens = torch.tensor([[5, 6, 7, 8, 9, 2], [1, 2, 3, 4, 0, 0]])
    labels = torch.tensor([[6, 7, -100, 9, -100, -100], [-100, 3, 4, -100, -100, -100]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 2]])
    found = [(d.tolist(), m.tolist()) for d, m in documents_of(Rows(tokens, labels, segments, (5, 4)))]
    assert found == [
        ([5, 6, 7], [False, True, True]),
        ([8, 9], [False, True]),
        ([1, 2, 3, 4], [False, False, True, True]),
    ]
    text = as_text(documents_of(Rows(tokens, labels, segments, (5, 4))), 10, 3)
    assert text.tokens.tolist() == [10, 10, 10, 5, 6, 7, 10, 10, 8, 9, 10, 10, 1, 2, 3, 4]
    assert int(text.is_target.sum()) == int((labels != -100).sum())
