"""Public sets from a user's files: what is read, what is refused, and how answers are judged."""

import csv
import json
from pathlib import Path

import httpx2
import pytest
from eval_targets import ScriptedTarget

from rorqual.data.tasks import World
from rorqual.errors import ConfigError
from rorqual.evals.model_grader import ModelGrader
from rorqual.evals.public import PublicQuestions
from rorqual.evals.run import RunSettings, evaluate
from rorqual.evals.suites import build
from rorqual.evals.suites.base import Setting, say
from rorqual.referee.judge_url import JudgeServer

WORLD = World.build()


def omniscience(folder: Path) -> Path:
    path = folder / "omniscience.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question_id", "domain", "topic", "question", "answer"])
        writer.writerow(["q1", "Science", "Physics", "In which year was X found?", "1,912"])
        writer.writerow(["q2", "Science", "Physics", "Who found it?", "The Curie Group"])
        writer.writerow(["q3", "Law", "Courts", "Which court?", "High Court of Tor"])
        writer.writerow(["q4", "Law", "Courts", "Where?", "Velmar"])
    return path


def test_omniscience_by_the_formulas(tmp_path: Path) -> None:
    settings = RunSettings("facts", options={"set": str(omniscience(tmp_path))})
    items = build("facts", Setting(WORLD, options=settings.options)).items("test", 0)
    said = {"q1": "It was 1912.", "q2": "curie group", "q3": "I don't know.", "q4": "Velmar or Tor"}
    target = ScriptedTarget(items, lambda item: say(item, said[item.id[-2:]]))
    result = evaluate(settings, target, WORLD, tmp_path / "run").result
    assert result["grades"] == {"C": 2, "P": 0, "I": 1, "A": 1, "X": 0}
    head = result["headline"]
    assert (head["ACC"], head["OI"], head["HR"]) == (0.5, 25.0, 0.5)
    assert set(result["strata"]["domain"]) == {"Science", "Law"}
    assert result["baselines"]["always-abstain"]["HR"] == 0


def test_a_model_grades_what_strings_take_for_wrong(tmp_path: Path) -> None:
    asked: list[str] = []
    says = {"Marie and Pierre": "Partial.", "High Court": "correct", "somewhere": "It could be correct or incorrect."}

    def reply(request: httpx2.Request) -> httpx2.Response:
        text = json.loads(request.content)["messages"][0]["content"]
        asked.append(text)
        word = next(word for answer, word in says.items() if f"Answer: {answer}" in text)
        return httpx2.Response(200, json={"choices": [{"message": {"content": word}, "finish_reason": "stop"}]})

    settings = RunSettings("facts", options={"set": str(omniscience(tmp_path))})
    items = build("facts", Setting(WORLD, options=settings.options)).items("test", 0)
    said = {"q1": "It was 1912.", "q2": "Marie and Pierre", "q3": "High Court, Tor", "q4": "somewhere"}
    target = ScriptedTarget(items, lambda item: say(item, said[item.id[-2:]]))
    grader = ModelGrader(JudgeServer("http://judge", "big", transport=httpx2.MockTransport(reply)))
    result = evaluate(settings, target, WORLD, tmp_path / "run", grader=grader).result
    assert result["grades"] == {"C": 2, "P": 1, "I": 0, "A": 0, "X": 1} and not result["valid"]
    assert len(asked) == 3 and all("1912" not in text for text in asked)  # strings had decided that one
    assert result["spec"]["judge"] == "strings, then big of http://judge"
    with pytest.raises(ConfigError, match="grades exactly"):
        evaluate(RunSettings("arith", size="tiny"), target, WORLD, tmp_path / "other", grader=grader)


def test_gold_passes_and_adversaries_fail(tmp_path: Path) -> None:
    family = PublicQuestions(omniscience(tmp_path))
    for item in family.items("test", 3):
        assert family.grade(item, item.gold).passed
        for output in family.adversary(item):
            assert not family.grade(item, output).passed, (output, item.gold)


def test_simpleqa_and_mrcr_are_known_by_their_columns(tmp_path: Path) -> None:
    simple = tmp_path / "simple.csv"
    simple.write_text('metadata,problem,answer\n"{\'topic\': \'Art\'}","Who painted it?","Anna Vel"\n')
    suite = build("facts", Setting(WORLD, options={"set": str(simple)}))
    assert suite.items("test", 0)[0].messages[0]["content"] == "Who painted it?"
    dialogue = [
        {"role": "user", "content": "write a poem about tapirs"},
        {"role": "assistant", "content": "First tapir."},
        {"role": "user", "content": "Prepend aB3 to the 1st (1 indexed) poem about tapirs."},
    ]
    row = {
        "prompt": json.dumps(dialogue),
        "answer": "aB3First tapir.",
        "random_string_to_prepend": "aB3",
        "n_needles": 2,
    }
    mrcr = tmp_path / "mrcr.jsonl"
    mrcr.write_text(json.dumps(row) + "\n")
    suite = build("mrcr", Setting(WORLD, options={"set": str(mrcr)}))
    item = suite.items("test", 0)[0]
    assert [suite.grade(item, say(item, text)).score for text in ("aB3First tapir.", "First tapir.")] == [1.0, 0.0]
    near = suite.grade(item, say(item, "aB3First tapirs"))
    assert 0.8 < near.score < 1 and near.grade == "P"


def test_other_files_are_refused_with_what_would_do(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for name in ("facts", "mrcr"):
        with pytest.raises(ConfigError, match="has the columns a, b. The suite"):
            build(name, Setting(WORLD, options={"set": str(other)}))
    with pytest.raises(ConfigError, match="--set is for the suites facts and mrcr"):
        build("arith", Setting(WORLD, options={"set": str(other)}))
    with pytest.raises(ConfigError, match="cannot be read"):
        build("facts", Setting(WORLD, options={"set": str(tmp_path / "absent.csv")}))
