"""Rows of data sets: every known shape is read alike, and what cannot be used is named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from mock_model import byte_tokenizer

from rorqual.data.tasks import CANARY
from rorqual.errors import DataError
from rorqual.posttrain.conversations import Conversation, PlainText, ReadReport, read_rows, read_samples, sample_of
from rorqual.posttrain.masking import examples_of

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = {"function": {"name": "look", "arguments": {"x": 1, "y": "é"}}, "id": "c1", "type": "function"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


def samples(path: Path, **how: Any) -> list[Conversation | PlainText]:
    return list(read_samples(read_rows(path), **how))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"messages": json.dumps(TALK)},
        {"messages": [{**message, "tool_calls": None, "reasoning_content": None} for message in TALK]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": TALK[1:]},
        {"prompt": TALK[:1], "completion": "b"},
        {"prompt": TALK[:1], "completion": TALK[1:], "unrelated": 3},
        {"messages": TALK, "text": None, "chosen": None},
    ],
)
def test_shapes_of_one_conversation(row: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    expected = examples_of(Conversation(TALK), tokenizer)
    sample = sample_of(row, "")
    assert isinstance(sample, Conversation) and examples_of(sample, tokenizer) == expected


def test_texts() -> None:
    assert sample_of({"prompt": "a", "completion": "b"}, "s") == PlainText("b", "a", "s")
    assert sample_of({"text": "ab"}, "s") == PlainText("ab", None, "s")


def test_tools_and_calls_in_columnar_shape() -> None:
    """Arrow gives every object the keys of all; arguments may be objects."""
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    wide = {**CALL, "function": {"name": "look", "arguments": {"x": 1, "y": "é", "z": None}}}
    for call in (CALL, wide, {"name": "look", "arguments": {"x": 1, "y": "é"}, "id": "c1"}):
        for tool in (TOOL, TOOL["function"], {**TOOL, "strict": None}):
            row = {"messages": [TALK[0], {**message, "tool_calls": [call]}], "tools": [tool]}
            sample = sample_of(row, "")
            assert isinstance(sample, Conversation) and sample.tools is not None
            assert sample.tools[0]["function"] == TOOL["function"]
            [only] = sample.messages[1]["tool_calls"]
            assert only["function"] == {"name": "look", "arguments": '{"x": 1, "y": "é"}'} and only["id"] == "c1"


@pytest.mark.parametrize(
    ("more", "mode", "effort"),
    [
        ({}, None, None),
        ({"thinking_mode": "chat"}, "chat", None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat", None),
        ({"chat_template_kwargs": '{"thinking": true}'}, "thinking", None),
        ({"reasoning_effort": "max"}, "thinking", "max"),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, "thinking", "high"),
        ({"reasoning_effort": "none"}, "chat", None),
        ({"reasoning_effort": "max", "thinking_mode": "chat"}, "chat", None),
    ],
)
def test_modes(more: dict[str, Any], mode: str | None, effort: str | None) -> None:
    sample = sample_of({"messages": TALK, **more}, "")
    assert isinstance(sample, Conversation)
    assert (sample.thinking_mode, sample.reasoning_effort) == (mode, effort)


def test_other_names_of_reasoning() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        sample = sample_of({"messages": [TALK[0], {**TALK[1], name: "r"}]}, "")
        assert isinstance(sample, Conversation) and sample.messages[1]["reasoning_content"] == "r"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data"),
        ({"chosen": TALK, "rejected": TALK}, "preference data"),
        ({"prompt": "a", "completion": "b", "label": True}, "verdict"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "verdicts"),
        ({"prompt": "a"}, "no completion"),
        ({"question": "a"}, "columns question"),
        ({"messages": "nothing"}, "no JSON"),
        ({"messages": [1]}, "no list of objects"),
        ({"messages": TALK, "chat_template_kwargs": {"colour": "red"}}, "colour"),
        ({"messages": TALK, "reasoning_effort": "much"}, "effort"),
        ({"messages": TALK, "thinking_mode": "deep"}, "thinking mode"),
        ({"messages": TALK, "tools": {"a": 1}}, "no list"),
        ({"messages": TALK, "tools": [3]}, "no list of objects"),
        ({"messages": TALK, "functions": [TOOL["function"]]}, "before tools"),
        ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, "says nothing"),
        ({"messages": [TALK[0], {**TALK[1], "function_call": {"name": "look"}}]}, "before tool_calls"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": 3}]}, "tool_calls that are no list"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": [{"function": "look"}]}]}, "call that is no object"),
        ({"messages": TALK, "images": ["a.png"]}, "picture"),
        ({"messages": TALK, "chat_template_kwargs": [1]}, "no object"),
        ({"messages": TALK, "reasoning_effort": ["max"]}, "effort"),
        ({"text": ""}, "without text"),
        ({"messages": TALK, "canary": "x"}, "canary"),
        ('{"messages": [', "no JSON"),
        ("[1, 2]", "holds a list"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: Any, why: str) -> None:
    path = lines(tmp_path / "chat.jsonl", {"messages": TALK}, "", row, {"messages": TALK})
    with pytest.raises(DataError, match=r"chat\.jsonl:3") as fault:
        samples(path)
    assert why in str(fault.value)
    report = ReadReport()
    assert len(samples(path, skip_bad=True, report=report)) == 2
    assert (report.rows, report.skipped) == (3, 1) and why in report.faults[0]


def test_test_items_are_refused_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": TALK, "meta": CANARY})
    with pytest.raises(DataError, match=r"a\.jsonl:1 is a test item"):
        samples(path, skip_bad=True)


def test_rows_come_one_at_a_time(tmp_path: Path) -> None:
    rows = read_rows(lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}))
    assert next(rows) == ("a.jsonl:1", {"text": "one"})
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "ok"}\n\xff\xfe broken\n')
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read"):
        list(read_rows(tmp_path / "b.jsonl"))


def test_files_and_folders(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", {"text": "b"})
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a1"}, {"text": "a2"}]))
    found = [(place, row["text"]) for place, row in read_rows(tmp_path)]
    assert found == [("a.json: row 1", "a1"), ("a.json: row 2", "a2"), ("b.jsonl:1", "b")]
    (tmp_path / "empty").mkdir()
    for path, why in (("empty", "no .jsonl"), ("nowhere.jsonl", "No such file"), ("x.txt", "is no .jsonl")):
        with pytest.raises(DataError, match=why):
            list(read_rows(tmp_path / path))


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": TALK, "tools": None},
        {"messages": [TALK[0], {**TALK[1], "tool_calls": [CALL]}], "tools": [TOOL]},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = samples(tmp_path / "a.parquet")
    assert isinstance(first, Conversation) and first.messages == TALK and first.tools is None
    assert isinstance(second, Conversation)
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"x": 1, "y": "é"}'
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet at all PAR1")
    with pytest.raises(DataError, match="no readable parquet"):
        samples(tmp_path / "bad.parquet")


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list([{"messages": TALK}, {"messages": TALK}])
    saved.save_to_disk(str(tmp_path / "one"))
    assert len(samples(tmp_path / "one")) == 2
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "many"))
    with pytest.raises(DataError, match="several splits"):
        samples(tmp_path / "many")
