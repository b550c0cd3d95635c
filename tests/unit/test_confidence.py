"""Signals, calibration, decisions and conformal thresholds of the referee's confidence."""

import json
import math
import random

import numpy as np
import pytest

from rorqual.errors import ConfigError
from rorqual.referee.confidence import (
    PROFILES,
    SIGNALS,
    Calibrator,
    Cascade,
    Observation,
    Token,
    band_around,
    boosting,
    entities,
    fit,
    from_chat_logprobs,
    isotonic,
    lexical_support,
    measure,
    promise,
    threshold_of,
)
from rorqual.referee.confidence.signals import entropy, semantic_entropy


def seen(**more):
    top = (math.log(0.7), math.log(0.2))
    tokens = (Token("Oslo", math.log(0.7), top), Token(".", math.log(0.5), (math.log(0.5),)))
    read = tuple(
        Token(t, p)
        for t, p in [("Where", None), (" was", -1.0), (" Ada", -4.0), (" Byron", -2.0), (" born", -0.5), ("?", -0.1)]
    )
    return Observation("Where was Ada Byron born?", "Oslo.", tokens, read, **more)


def test_each_signal_has_the_value_of_its_formula():
    found = measure(seen(samples=("Oslo", "oslo.", "Bergen", "Rome"), other_answers=("Oslo", "Rome"), p_true=0.4))
    assert found["mean_logprob"] == pytest.approx((math.log(0.7) + math.log(0.5)) / 2)
    assert found["min_logprob"] == pytest.approx(math.log(0.5))
    assert found["margin"] == pytest.approx(math.log(0.7 / 0.2))
    assert found["entropy"] == pytest.approx(-sum(p * math.log(p) for p in (0.7, 0.2, 0.1)))
    assert found["familiarity"] == pytest.approx(-3.0)
    assert found["weakest_part"] == pytest.approx(-2.0)
    assert found["fit"] == pytest.approx(-0.6)
    assert found["agreement"] == 0.5
    assert found["semantic_entropy"] == pytest.approx(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))
    assert found["p_true"] == 0.4
    assert "support" not in found and "abstain_mass" not in found


def test_shared_probability_is_the_mean_over_wordings():
    own = (math.log(0.7) + math.log(0.5)) / 2
    found = measure(seen(other_logprobs=(math.log(0.1), -math.inf)))
    expected = (math.exp(own) + 0.1 + math.exp(-30)) / 3
    assert found["shared_logprob"] == pytest.approx(math.log(expected))
    assert found["worst_logprob"] == -30.0


def test_recall_asks_backwards_from_the_answer():
    read = tuple(Token(t, p) for t, p in [("Oslo", None), (" is", -1.0), (" Ada", -0.5), (" Byron", -0.1), (".", -0.1)])
    assert measure(seen(statement_tokens=read))["recall"] == pytest.approx(-0.3)
    assert "recall" not in measure(seen())


def test_fit_needs_words_behind_the_entity():
    read = tuple(
        Token(t, p) for t, p in [("Birthplace", None), (" of", -1.0), (" Ada", -4.0), (" Byron", -2.0), ("?", -3)]
    )
    assert "fit" not in measure(Observation("Birthplace of Ada Byron?", "Oslo", seen().answer_tokens, read))
    other = seen(other_logprobs=(-1.0, -2.0), other_questions=(read, seen().question_tokens))
    found = measure(other)
    assert found["worst_fit"] == pytest.approx(-0.6)
    assert "worst_fit" not in measure(seen(other_logprobs=(-1.0,), other_questions=(read,)))
    assert found["shared_familiarity"] == pytest.approx(-3.0)


def test_a_rare_name_is_told_from_an_unknown_one_by_frequency():
    common = measure(seen(), {" Ada": -4.0, " Byron": -4.0, " x": -9.0})["familiarity"]
    assert common == pytest.approx(((-4 + 4) + (-2 + 4)) / 2)
    rare = measure(seen(), {" Ada": -8.0, " x": -9.0})["familiarity"]
    assert rare == pytest.approx(((-4 + 8) + (-2 + 9)) / 2)


def test_what_was_not_measured_makes_no_signal():
    assert measure(Observation("Where?", "There.")) == {}
    assert set(measure(seen())) <= {signal.name for signal in SIGNALS}


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("Tell me Orlo Pisk Kran's trade.", ["Orlo Pisk Kran"]),
        ("Name the employer of Ada Byron.", ["Ada Byron"]),
        ('Who wrote "The Long Road" in 1922?', ["The Long Road"]),
        ("Ada Byron works where?", ["Ada Byron"]),
        ("Which is larger, Mars or Venus?", ["Mars", "Venus"]),
        ("why is the sky blue?", []),
    ],
)
def test_entities_are_found_by_their_spelling(question, names):
    assert entities(question) == names


def test_entropy_counts_the_unseen_rest_once():
    assert entropy((math.log(0.5), math.log(0.5))) == pytest.approx(math.log(2))
    assert entropy((math.log(0.5),)) == pytest.approx(math.log(2))
    assert semantic_entropy(["The Mill", "mill.", " MILL"]) == 0.0


def test_support_needs_the_answer_and_the_entity_in_one_place():
    text = "Ada Byron lived in Rome. She was born in Oslo.\nOrlo Pisk was born in Paris."
    assert lexical_support("Where was Ada Byron born?", "Oslo", text) == 1.0
    assert lexical_support("Where was Ada Byron born?", "Paris", text) < 1.0
    assert lexical_support("Where was Ada Byron born?", "Berlin", text) == 0.0


def test_chat_logprobs_are_read_and_nonsense_is_not():
    content = [
        {
            "token": "Os",
            "logprob": -0.1,
            "top_logprobs": [{"token": "x", "logprob": -3.0}, {"token": "Os", "logprob": -0.1}],
        },
        {"token": "<｜end▁of▁sentence｜>", "logprob": 0.0},
        {"token": "lo", "logprob": None},
        "no entry",
    ]
    assert from_chat_logprobs({"content": content}) == (Token("Os", -0.1, (-0.1, -3.0)),)
    assert from_chat_logprobs(None) == () and from_chat_logprobs({"content": None}) == ()


# -- the fit --


def world(count, seed):
    """Answers that are right with a known probability, which two signals tell together."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=count), rng.normal(size=count)
    p = 1 / (1 + np.exp(-(2 * a - 1.5 * b)))
    rows = [
        {"mean_logprob": float(x), "entropy": float(y), "agreement": float(x + y)} for x, y in zip(a, b, strict=True)
    ]
    return rows, (rng.random(count) < p).tolist(), p


def test_the_fit_finds_the_true_probability():
    rows, right, _ = world(4000, 1)
    calibrator = fit(rows, right, model_sha="m", names=["mean_logprob", "entropy"])
    fresh, _, p = world(4000, 2)
    assert np.abs(calibrator.p(fresh) - p).mean() < 0.05


def test_no_signal_ever_speaks_against_its_direction():
    rows, right, _ = world(600, 3)
    noise = random.Random(3)
    rows = [{**row, "margin": noise.gauss(0, 1)} for row in rows]
    calibrator = fit(rows, right, model_sha="m")
    base = {"mean_logprob": 0.0, "entropy": 0.0, "agreement": 0.5, "margin": 0.0}
    for signal in SIGNALS:
        if signal.name in base:
            curve = calibrator.p([{**base, signal.name: x} for x in np.linspace(-3, 3, 50)])
            steps = np.diff(curve) if signal.rises else -np.diff(curve)
            assert (steps >= 0).all(), signal.name


def test_a_signal_that_is_missing_changes_nothing():
    rows, right, _ = world(600, 4)
    model = boosting.fit(np.array([[r["mean_logprob"], r["entropy"]] for r in rows]), np.array(right), [True, False])
    missing = model.log_odds(np.array([[np.nan, np.nan]]))
    assert missing[0] == pytest.approx(model.base)


def test_the_isotonic_curve_is_the_least_squares_rising_fit():
    scores = np.arange(6.0)
    curve = isotonic.fit(scores, np.array([False, True, False, True, True, True]))
    assert curve.chances == (0.0, 0.5, 1.0, 1.0, 1.0) or curve.chances == (0.0, 0.5, 1.0)
    assert (np.diff(curve(np.linspace(-5, 9, 200))) > 0).all()


def test_a_set_that_cannot_be_fitted_is_refused_with_the_cause():
    rows, right, _ = world(400, 5)
    with pytest.raises(ConfigError, match="30"):
        fit(rows[:10], right[:10], model_sha="m")
    with pytest.raises(ConfigError, match="all 400 calibration answers are right"):
        fit(rows, [True] * 400, model_sha="m")
    with pytest.raises(ConfigError, match="signal"):
        fit([{}] * 400, right, model_sha="m")


def test_an_artefact_is_for_its_model_alone(tmp_path):
    rows, right, _ = world(300, 6)
    made = fit(rows, right, model_sha="abc", frequency={"x": -1.0}).with_measured(auroc=0.9)
    path = made.save(tmp_path / "confidence.json")
    again = Calibrator.load(path, model_sha="abc")
    assert again == made
    assert (again.p(rows) == made.p(rows)).all()
    with pytest.raises(ConfigError, match="fitted on the model abc"):
        Calibrator.load(path, model_sha="other")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "version": 99}))
    with pytest.raises(ConfigError, match="version 99"):
        Calibrator.load(path, model_sha="abc")
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is no calibration"):
        Calibrator.load(path, model_sha="abc")


# -- decisions --


def test_profiles_answer_when_it_pays():
    for profile, loss in PROFILES.items():
        t = threshold_of(profile)
        assert t - loss * (1 - t) == pytest.approx(0)  # what an answer at the threshold gains is what it may lose
    with pytest.raises(ConfigError):
        threshold_of("bold")


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.5, 1.0])
def test_a_band_never_holds_more_than_its_share(share):
    rng = np.random.default_rng(0)
    for chances in (np.sort(rng.random(401)), np.repeat([0.1, 0.5, 0.9], 100), np.full(50, 0.5)):
        band = band_around(0.5, chances.tolist(), share)
        inside = np.mean([band.holds(p) for p in chances])
        assert inside <= share + 1e-9


def test_a_band_is_as_wide_in_log_odds_on_both_sides():
    band = band_around(0.5, np.linspace(0.01, 0.99, 99).tolist(), 0.6)
    assert 0.55 <= band.high - band.low <= 0.6
    assert band.low == pytest.approx(1 - band.high)
    tilted = band_around(0.9, np.linspace(0.01, 0.99, 99).tolist(), 0.6)
    odds = [math.log(p / (1 - p)) for p in (tilted.low, 0.9, tilted.high)]
    assert odds[1] - odds[0] == pytest.approx(odds[2] - odds[1])


def test_the_cascade_spends_what_it_may_and_agrees_with_itself():
    rows, right, _ = world(3000, 7)
    calibrator = fit(rows[:1500], right[:1500], model_sha="m")
    cascade = Cascade.plan(calibrator, 0.75, {0: 0, 1: 3}, 0.3)
    p, calls = cascade.run(rows[1500:])
    assert 0.2 < calls < 0.4
    for row, expected in list(zip(rows[1500:], p, strict=True))[:200]:
        choice, first = cascade.choose(row, 0)
        if choice == "look closer":
            choice, first = cascade.choose(row, 1)
        assert first == pytest.approx(expected)
        assert choice == ("answer" if expected > 0.75 else "abstain")


# -- the promise --


@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_the_promise_holds_on_average_and_spreads_as_said(alpha):
    rng = np.random.default_rng(11)
    rates = []
    for _ in range(400):
        made = promise(rng.random(199).tolist(), alpha)
        rates.append((rng.random(4000) > made.threshold).mean())
    rank = math.floor(alpha * 200)
    assert np.mean(rates) == pytest.approx(rank / 200, abs=4 * made.spread / math.sqrt(400))
    assert np.std(rates) == pytest.approx(made.spread, rel=0.2)


def test_too_few_errors_promise_by_silence():
    assert promise([0.3, 0.9], 0.05).threshold == math.inf
    with pytest.raises(ConfigError):
        promise([0.5], 1.0)
