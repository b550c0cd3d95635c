"""How a trial grades: what is right by the line, and answers near it that are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from rorqual.evals.trial.questions import Question, read_set
from rorqual.referee import Answer, Call

OSLO = {"question": "Capital?", "answer": ["Oslo", "Kristiania"]}
SUM = {"question": "Sum?", "answer": 42}
JSON = {"question": "n?", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}}, "answer": {"n": 1}}
LIST = {"question": "n?", "schema": {"type": "array"}, "answer": [[1, 2], []]}
OPEN = {"question": "Who?", "unanswerable": True}
WEATHER = {"question": "Weather?", "tools": [{"type": "function", "function": {"name": "weather"}}],
           "answer": {"name": "weather", "arguments": {"days": 3}}}  # fmt: skip


def question(line: dict[str, Any], folder: Path) -> Question:
    path = folder / "set.jsonl"
    path.write_text(json.dumps(line))
    return read_set(path).questions[0]


@pytest.mark.parametrize("line, said, grade, passed", [
    (OSLO, "Oslo", "C", True),
    (OSLO, "It was called Kristiania.", "C", True),
    (OSLO, "Not Oslo.", "I", False),
    (OSLO, "Oslo or Bergen", "I", False),
    (OSLO, "Oslofjord", "I", False),
    (OSLO, "", "I", False),
    (OSLO, "I don't know.", "A", False),
    (OSLO, "Oslo, " + "a word " * 40, "I", False),
    (SUM, "42", "C", True),
    (SUM, "The sum is 42.", "C", True),
    (SUM, "142", "I", False),
    (JSON, '{"n": 1}', "C", True),
    (JSON, '{"n": 1.0}', "C", True),  # JSON has one kind of number
    (JSON, '{"n": true}', "I", False),
    (JSON, '{"n": 2}', "I", False),
    (JSON, '{"n": 1, "m": 0}', "I", False),
    (JSON, '```json\n{"n": 1}\n```', "I", False),
    (LIST, "[1, 2]", "C", True),
    (LIST, "[]", "C", True),
    (LIST, "[2, 1]", "I", False),
    (OPEN, "I don't know.", "A", True),
    (OPEN, "The text does not say.", "A", True),
    (OPEN, "Anna.", "I", False),
    (OPEN, "", "I", False),
])  # fmt: skip
def test_texts(line: dict[str, Any], said: str, grade: str, passed: bool, tmp_path: Path) -> None:
    found = question(line, tmp_path).grade(Answer(said, finish="stop"))
    assert (found.grade, found.passed) == (grade, passed), found.reason


@pytest.mark.parametrize("calls, grade", [
    ([("weather", '{"days": 3}')], "C"),
    ([("weather", '{"days": "3"}')], "I"),
    ([("weather", '{"days": 3, "city": "Oslo"}')], "I"),
    ([("Weather", '{"days": 3}')], "I"),
    ([("weather", '{"days": 3,}')], "I"),
    ([("weather", '{"days": 3}')] * 2, "I"),
    ([], "I"),
])  # fmt: skip
def test_calls(calls: list[tuple[str, str]], grade: str, tmp_path: Path) -> None:
    made = tuple(Call(f"c{i}", name, arguments) for i, (name, arguments) in enumerate(calls))
    assert question(WEATHER, tmp_path).grade(Answer("", calls=made, finish="tool_calls")).grade == grade


def test_kinds_and_requests(tmp_path: Path) -> None:
    kinds = [question(line, tmp_path).kind for line in (OSLO, JSON, OPEN, WEATHER)]
    assert kinds == ["answer", "schema", "unanswerable", "tool call"]
    given = question({**OSLO, "evidence": ["One.", {"id": "b", "text": "Two."}]}, tmp_path)
    assert given.body() == {"messages": [{"role": "user", "content": "[doc-1] One.\n\n[b] Two.\n\nCapital?"}]}
    assert [(one.id, one.text) for one in given.evidence] == [("doc-1", "One."), ("b", "Two.")]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"}]
    asked = question({"messages": messages, "answer": "Oslo", "evidence": "One."}, tmp_path)
    assert asked.body() == {"messages": messages}  # a conversation is asked as it stands
