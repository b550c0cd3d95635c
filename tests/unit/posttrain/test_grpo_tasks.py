"""Prompts of a GRPO run, its batches, its judgements and what it keeps of evaluations: functions of seeds alone."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from rorqual.data.tasks import families
from rorqual.data.tasks.base import Item
from rorqual.errors import ConfigError, DataError
from rorqual.posttrain.grpo_batch import micro_batches
from rorqual.posttrain.grpo_config import GRPOConfig, JudgingSection, ModeSection
from rorqual.posttrain.grpo_judging import JUDGEMENT, Judging
from rorqual.posttrain.grpo_run import _minibatches
from rorqual.posttrain.grpo_tasks import Question, TaskStream
from rorqual.posttrain.rewards.base import Answer, Score

FAMILIES = families()


def stream(*tasks: dict[str, Any], seed: int = 5, **changes: Any) -> TaskStream:
    config = GRPOConfig.model_validate({"tasks": list(tasks), **changes})
    return TaskStream(config, FAMILIES, seed)


def test_a_prompt_depends_on_the_seed_and_its_number() -> None:
    tasks = {"source": "facts", "weight": 2.0}, {"source": "arith"}
    modes = {"off": {"window": 8}, "high": {"window": 32, "share": 2.0}}
    whole = [stream(*tasks, modes=modes).question(n) for n in range(60)]
    again = stream(*tasks, modes=modes)
    assert [again.question(n) for n in reversed(range(60))] == whole[::-1]
    assert stream(*tasks, modes=modes, seed=6).question(0) != whole[0]
    assert {q.task for q in whole} == {0, 1} and {(q.mode, q.window) for q in whole} == {("off", 8), ("high", 32)}
    assert all(q.item.thinking_mode == ("chat" if q.mode == "off" else "thinking") for q in whole)
    assert all(q.item.split == "train" for q in whole)
    assert all(q.item.split == "cal" for q in again.held_out(1, 10))


def test_where_and_what_a_prompt_announces() -> None:
    task = {"source": "facts", "where": {"class": ["K-taught"]}, "where_held_out": {"class": ["K-clean", "U-attr"]},
            "penalties": [1.0, 9.0], "budgets": [16], "confidence": True}  # fmt: skip
    questions = [stream(task).question(n) for n in range(12)]
    assert {q.item.stratum["class"] for q in questions} == {"K-taught"}
    assert {q.item.meta["penalty"] for q in questions} == {1.0, 9.0}
    for q in questions:
        assert f"costs {q.item.meta['penalty']:g}" in q.text and "16 tokens" in q.text and "Confidence: N%" in q.text
    assert {q.item.stratum["class"] for q in stream(task).held_out(0, 20)} == {"K-clean", "U-attr"}
    with pytest.raises(DataError, match="Correct the task's"):
        stream({"source": "arith", "where": {"digits": [77]}}).question(0)


def test_rows_of_a_data_set_in_both_forms(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Q{n}", "answer": n} if n % 2 else {"prompt": [{"role": "user", "content": f"Q{n}"}]}
            for n in range(30)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    made = stream({"source": str(file)})
    trained = {made.question(n).text for n in range(300)}
    held_out = {q.text for q in made.held_out(0, 60)}
    assert len(trained) == 27 and len(held_out) == 3 and not trained & held_out
    golds = {(q.item.gold, q.item.meta.get("answer")) for q in map(made.question, range(50)) if q.item.prompt}
    assert golds and all(gold == str(answer) for gold, answer in golds)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "is no JSON"), ('{"question": "x"}', "no column `prompt`"), ('{"prompt": "x"}', "1 rows")],
)
def test_rows_that_cannot_be_used(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=reason):
        stream({"source": str(tmp_path / "rows.jsonl")})


def test_sources_and_settings_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no task"):
        stream({"source": "riddles"})
    with pytest.raises(DataError, match="Cannot read"):
        stream({"source": str(tmp_path / "none.jsonl")})
    for settings, reason in (
        ({}, "at least one task"),
        ({"modes": {"deep": {}}}, "off, high and max"),
        ({"modes": {"off": {"share": 0}}}, "some share above 0"),
        ({"minibatches": 3, "prompts_per_step": 2}, "exceed prompts_per_step"),
    ):
        tasks = [{"source": "arith"}] if settings else []
        with pytest.raises(ValueError, match=reason):
            GRPOConfig.model_validate({"tasks": tasks, **settings})


def test_batches_hold_every_answer_once_within_their_size() -> None:
    lengths = [5, 3, 9, 9, 1, 30, 2, 8]
    groups = micro_batches(lengths, 20)
    assert sorted(chain(*groups)) == list(range(len(lengths)))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 20 for g in groups)
    parts = _minibatches(10, 3, seed=1)
    assert sorted(chain(*parts)) == list(range(10)) and {len(p) for p in parts} == {3, 4}
    assert parts == _minibatches(10, 3, seed=1) != _minibatches(10, 3, seed=2)


def test_judgements_are_about_right_and_wrong_answers_of_the_phase_before() -> None:
    judging = Judging(JudgingSection(share=0.5), {"off": ModeSection(window=9)}, seed=1)
    assert judging.questions(0, 8) == []
    items = [Item("own", f"own-{n}", [{"role": "user", "content": f"Q{n}"}], None, "chat", "", {}) for n in range(8)]
    questions = [Question(one, 0, "off", 9) for one in items]
    groups = [n for n in range(8) for _ in range(2)]
    answers = [Answer(items[g], "yes" if i % 2 else "no", 1, seed=7) for i, g in enumerate(groups)]
    scores = [Score(float(i % 2), bool(i % 2), False) for i in range(16)]
    judging.take(questions, answers, scores, groups)
    asked = judging.questions(1, 8)
    assert len(asked) == 4 and all(q.task == JUDGEMENT and q.window == 9 for q in asked)
    for q in asked:
        candidate = "yes" if q.item.meta["label"] else "no"
        assert f"Answer:\n{candidate}\n" in q.item.messages[0]["content"]
    assert sorted(q.item.meta["label"] for q in asked) == [0.0, 0.0, 1.0, 1.0]
    again = Judging(JudgingSection(share=0.5), {"off": ModeSection(window=9)}, seed=1)
    again.load_state_dict(json.loads(json.dumps(judging.state_dict())))
    assert again.questions(1, 8) == asked
