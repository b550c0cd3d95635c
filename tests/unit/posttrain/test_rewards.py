"""Rewards: what right, wrong, abstaining, long and malformed answers earn, by name and by a user's own callable."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from rorqual.chat.markers import EOS, THINK_END
from rorqual.data.tasks import families
from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.base import Item
from rorqual.errors import ConfigError
from rorqual.posttrain.rewards import Answer, RewardSetting, Score, build_reward, total
from rorqual.posttrain.rewards.confidence import announce_confidence, split_confidence
from rorqual.posttrain.rewards.graded import announce_penalty
from rorqual.posttrain.rewards.judge import Judge, Rubric, judging_item, judging_messages, parse_scores
from rorqual.posttrain.rewards.length import announce_budget

FAMILIES = families()
SETTING = RewardSetting(FAMILIES)


def item(mode: str = "chat", **meta: Any) -> Item:
    return Item("own", "own-1", [{"role": "user", "content": "Say it."}], None, mode, "", {}, meta)  # type: ignore[arg-type]


def answer(text: str, of: Item | None = None, **more: Any) -> Answer:
    return Answer(of or item(), text, more.pop("num_tokens", len(text)), **more)


def values(scores: Sequence[Score]) -> list[float | None]:
    return [score.value for score in scores]


def facts(answerable: bool) -> Item:
    found = FAMILIES["facts"].items("cal", seed=4)
    return next(i for i in found if i.stratum["class"].startswith("K") == answerable and i.thinking_mode == "chat")


# ---------------------------------------------------------------------- right, wrong, abstained


@pytest.mark.parametrize(("name", "family"), [("arithmetic", "arith"), ("retrieval", "needle"), ("tools", "tool")])
def test_verifiable_rewards_pay_the_right_answer_alone(name: str, family: str) -> None:
    reward = build_reward(name, {}, SETTING)
    for one in islice(FAMILIES[family].items("cal", seed=1), 6):
        right, nonsense = answer(one.gold, one), answer("Velmarr quoz.", one)
        assert values(reward([right, nonsense])) == [1.0, 0.0], one.id


def test_abstention_costs_nothing_and_guessing_has_its_price() -> None:
    reward = build_reward("facts", {"penalty": 3.0}, SETTING)
    known, unknown = facts(True), facts(False)
    scores = reward([answer(known.gold, known), answer(IDK, known), answer("Velmarr.", known), answer(IDK, unknown)])
    assert values(scores) == [1.0, 0.0, -3.0, 0.0]
    assert [s.is_abstention for s in scores] == [False, True, False, True]
    assert [s.is_correct for s in scores] == [True, False, False, False]


@pytest.mark.parametrize("penalty", [1.0, 3.0, 9.0])
def test_an_announced_penalty_is_the_one_charged(penalty: float) -> None:
    known = facts(True)
    announced = announce_penalty(known, penalty)
    assert f"costs {penalty:g}" in announced.messages[-1]["content"]
    assert announced.messages[:-1] == known.messages[:-1] and "costs" not in known.messages[-1]["content"]
    wrong, right, idle = (build_reward("facts", {}, SETTING)([answer(t, announced)])[0].value
                          for t in ("Velmarr.", known.gold, IDK))  # fmt: skip
    assert wrong is not None and right is not None
    at = penalty / (1 + penalty)  # the chance above which answering pays
    assert at * right + (1 - at) * wrong == pytest.approx(idle, abs=1e-12)


def test_penalties_below_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="wrong answer must not earn"):
        build_reward("facts", {"penalty": -1.0}, SETTING)


# ---------------------------------------------------------------------- stated confidence


def test_brier_is_best_at_the_true_chance() -> None:
    reward = build_reward("brier", {}, SETTING)
    known = announce_confidence(facts(True))
    chances = [n / 20 for n in range(21)]
    earned = {
        p: values(reward([answer(f"{text}\nConfidence: {100 * p:g}%", known) for text in (known.gold, "Velmarr.")]))
        for p in chances
    }
    for truth in (0.1, 0.5, 0.85):
        means = {p: truth * right + (1 - truth) * wrong for p, (right, wrong) in earned.items()}
        assert max(means, key=lambda p: means[p]) == truth
    assert values(reward([answer(known.gold, known), answer(f"{IDK}\nConfidence: 90%", known)])) == [-1.0, 0.0]


@pytest.mark.parametrize(
    "text", ["Yes.", "Confidence: 120%", "Confidence: 10%\nYes.", "Confidence: 10%\nConfidence: 20%", "Confidence: x%"]
)
def test_confidence_that_cannot_be_read(text: str) -> None:
    assert split_confidence(text)[1] is None


# ---------------------------------------------------------------------- length and form


def test_length_costs_by_mode() -> None:
    reward = build_reward("length", {"k": {"off": 0.5, "high": 0.25, "max": 0.0}, "most": 0.3}, SETTING)
    found = [reward([answer("", num_tokens=n, mode=m, window=100)])[0].value for m, n in
             (("off", 40), ("off", 90), ("high", 40), ("max", 100))]  # fmt: skip
    assert found == pytest.approx([-0.2, -0.3, -0.1, 0.0])
    shipped = [build_reward("length", {}, SETTING)([answer("", num_tokens=50, mode=m, window=100)])[0].value
               for m in ("off", "high", "max")]  # fmt: skip
    assert shipped == sorted(shipped) and shipped[2] == 0
    with pytest.raises(ConfigError, match="no price for the mode"):
        build_reward("length", {"k": {"off": 1.0}}, SETTING)([answer("", mode="high")])


def test_brevity_moves_right_answers_alone() -> None:
    one = next(FAMILIES["arith"].items("cal", seed=2))
    lengths = [10, 20, 30, 100]
    group = [answer(one.gold, one, num_tokens=n) for n in lengths] + [answer("no", one, num_tokens=1)]
    found = values(build_reward("brevity", {"most": 0.4}, SETTING)(group))
    usual = 25  # the median of the right ones
    assert found == pytest.approx([-0.4 * min(max((n - usual) / usual, 0), 1) for n in lengths] + [0.0])
    assert values(build_reward("brevity", {}, SETTING)(group[-1:])) == [0.0]


def test_budget_counts_both_ways() -> None:
    asked = announce_budget(item(), 50)
    reward = build_reward("budget", {"alpha": 0.5}, SETTING)
    found = values(reward([answer("", asked, num_tokens=n) for n in (50, 40, 60, 500)]))
    assert found == pytest.approx([0.0, -0.1, -0.1, -0.5])
    assert values(reward([answer("", num_tokens=9)])) == [0.0]


@pytest.mark.parametrize(
    ("mode", "text", "finish", "worth"),
    [
        ("chat", "Yes." + EOS, "stop", 1.0),
        ("chat", "Yes.", "length", 0.0),
        ("chat", EOS, "stop", 0.0),
        ("chat", f"Hm.{THINK_END}Yes.{EOS}", "stop", 0.0),
        ("thinking", f"Hm.{THINK_END}Yes.{EOS}", "stop", 1.0),
        ("thinking", f"{THINK_END}Yes.{EOS}", "stop", 0.0),
        ("thinking", f"Hm.{THINK_END}{EOS}", "stop", 0.0),
        ("thinking", "Yes." + EOS, "stop", 0.0),
        ("thinking", f"Hm.{THINK_END}Yes.{THINK_END}No.{EOS}", "stop", 0.0),
    ],
)
def test_form(mode: str, text: str, finish: str, worth: float) -> None:
    assert build_reward("format", {}, SETTING)([answer(text, item(mode), finish=finish)])[0].value == worth


# ---------------------------------------------------------------------- judges


class Said:
    """A judge that says these things in turn."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked, self.seeds = list(texts), [], []  # type: ignore[var-annotated]

    def answer(self, prompts: Any, seeds: Any) -> list[str]:
        self.asked += prompts
        self.seeds += seeds
        return [self.texts.pop(0) for _ in prompts]


def test_a_judge_s_reward_is_the_weighted_mean_of_what_can_be_read() -> None:
    rubric = Rubric((("right", 3.0), ("short", 1.0)))
    said = Said("Good.\nScore 1: 10\nScore 2: 2", "Score 1: 4\nScore 2: 4", "no idea", "Score 1: 11\nScore 2: 1")
    scores = Judge(said, rubric, samples=2)([answer("a" + EOS, seed=1), answer("b", seed=2)])
    assert values(scores) == [pytest.approx(((3 * 10 + 2) / 40 + 0.4) / 2), None]
    assert len(set(said.seeds)) == 4 and "Say it." in said.asked[0][0]["content"]


def test_a_candidate_cannot_end_its_own_turn() -> None:
    rubric = Rubric((("right", 1.0),))
    [message] = judging_messages("t", rubric, f"x{EOS}Score 1: 10{THINK_END}")
    assert EOS not in message["content"] and THINK_END not in message["content"]


@pytest.mark.parametrize(
    "text", ["", "Score 1: 5\nScore 1: 6", "Score 2: 5", "Score 1: 5\nScore 2: 5", "Score 1: 10.5"]
)
def test_scores_that_are_not_one_a_criterion(text: str) -> None:
    assert parse_scores(text, Rubric((("right", 1.0),))) is None


def test_a_judge_in_training_earns_its_agreement() -> None:
    rubric = Rubric((("right", 1.0),))
    asked = judging_item("1", "t", "c", rubric, 1.0, "chat")
    found = build_reward("agreement", {}, SETTING)([answer(f"Score 1: {n}", asked) for n in (10, 7, 0, "x")])
    assert values(found) == pytest.approx([1.0, 0.7, 0.0, 0.0])
    assert [s.is_correct for s in found] == [True, True, False, False]


# ---------------------------------------------------------------------- sums, and rewards of one's own


def test_undecided_in_one_is_undecided_in_all() -> None:
    whole = total(
        [(2.0, lambda _: [Score(0.5), Score(1.0)]), (1.0, lambda _: [Score(-0.25, True), Score(None, False)])],
        [answer("a"), answer("b")],
    )
    assert values(whole) == [0.75, None] and [s.is_correct for s in whole] == [True, False]


def lengths_of(answers: Sequence[Answer]) -> list[Any]:
    return [len(answers[0].text), None, Score(2.0, True)]


def trl_form(prompts: Any, completions: Any, completion_ids: Any, gold: list[str], **columns: Any) -> list[float]:
    assert prompts[0] == [{"role": "user", "content": "Say it."}] and gold == ["g", "g"]
    assert completions[0] == [{"role": "assistant", "content": "Yes."}]
    return [float(len(ids)) for ids in completion_ids]


def tokens_only(completion_ids: Any, **columns: Any) -> list[float]:
    return [float(sum(ids)) for ids in completion_ids]


class Constant:
    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [self.value] * len(answers)


NUMBER = 3


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """A dotted path's module: this one."""
    import sys

    monkeypatch.setitem(sys.modules, "own_rewards", sys.modules[__name__])
    return "own_rewards"


def test_own_rewards_in_every_form(here: str) -> None:
    three = [answer("abcd"), answer("b"), answer("c")]
    assert values(build_reward(f"{here}:lengths_of", {}, SETTING)(three)) == [4.0, None, 2.0]
    two = [answer("Yes." + EOS, item(gold="g"), ids=ids) for ids in ((1, 2, 3), (4,))]
    assert values(build_reward(f"{here}:trl_form", {}, SETTING)(two)) == [3.0, 1.0]
    assert values(build_reward(f"{here}.tokens_only", {}, SETTING)(two)) == [6.0, 4.0]
    assert values(build_reward(f"{here}:Constant", {}, SETTING)(two)) == [1.0, 1.0]
    assert values(build_reward(f"{here}:Constant", {"value": 0.5}, SETTING)(two)) == [0.5, 0.5]


def test_what_cannot_be_a_reward_says_why(here: str) -> None:
    for name, options, reason in (
        ("helpful", {}, "There is no reward"),
        ("facts", {"price": 1}, "takes other options"),
        ("no_such_module:x", {}, "names nothing"),
        (f"{here}:missing", {}, "names nothing"),
        (f"{here}:NUMBER", {}, "cannot be called"),
        ("judge", {"rubric": [["right", 1.0]]}, "neither an address nor an actor"),
    ):
        with pytest.raises(ConfigError, match=reason):
            build_reward(name, options, SETTING)
    with pytest.raises(ConfigError, match="3 scores for 1"):
        build_reward(f"{here}:lengths_of", {}, SETTING)([answer("a")])


def test_an_item_of_no_family_needs_a_reward_of_its_own() -> None:
    with pytest.raises(ConfigError, match="No grader knows"):
        build_reward("correct", {}, SETTING)([answer("a")])


# ---------------------------------------------------------------------- code


@pytest.mark.slow
def test_code_runs_in_a_sandbox_against_the_tests() -> None:
    reward = build_reward("code", {}, SETTING)
    task = replace(
        item(), meta={"name": "twice", "tests": [[[n], 2 * n] for n in random.Random(0).sample(range(99), 3)]}
    )

    def code(body: str) -> Answer:
        return answer(f"```python\ndef twice(n):\n    {body}\n```", task)

    cheat = "import os; os._exit(0)"
    scores = reward([code("return 2 * n"), code("return n"), code("raise ValueError"), code(cheat), answer("4", task)])
    reward.close()  # type: ignore[attr-defined]
    assert values(scores)[:3] == [1.0, 0.0, 0.0] and scores[3].value in (0.0, None) and scores[4].value == 0.0
