"""Any call, any text: a valid call is not touched, a repaired one obeys its schema, nothing else goes out."""

import asyncio
import json
from typing import Any

import jsonschema
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rorqual.referee import Answer, Asked, Call, Options, Policy, Referee, Verdict
from rorqual.referee.json_text import NotJson, read_leniently, read_strictly
from rorqual.referee.policy import BudgetBody

LEAVES: dict[str, tuple[dict[str, Any], st.SearchStrategy[Any]]] = {
    "string": ({"type": "string"}, st.text(max_size=8)),
    "integer": ({"type": "integer", "minimum": -50, "maximum": 50}, st.integers(-50, 50)),
    "number": ({"type": "number"}, st.floats(-1e6, 1e6, allow_nan=False)),
    "boolean": ({"type": "boolean"}, st.booleans()),
    "enum": ({"enum": ["red", "Green", 3, None]}, st.sampled_from(["red", "Green", 3, None])),
    "either": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, st.none() | st.integers(-9, 9)),
}
NAMES = st.sampled_from(["a", "b_c", "dE", "user_id", "arguments", "x y"])


@st.composite
def typed(draw: st.DrawFn, level: int = 0) -> tuple[dict[str, Any], Any]:
    """A schema and a value it takes."""
    kinds = [*LEAVES, *(["object", "array"] if level < 2 else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "array":
        schema, value = draw(typed(level + 1))
        return {"type": "array", "items": schema}, [value] * draw(st.integers(0, 2))
    if kind == "object":
        return draw(objects(level + 1))
    schema, values = LEAVES[kind]
    return schema, draw(values)


@st.composite
def objects(draw: st.DrawFn, level: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    members = {name: draw(typed(level)) for name in draw(st.lists(NAMES, max_size=4, unique=True))}
    schema: dict[str, Any] = {"type": "object", "properties": {name: inner for name, (inner, _) in members.items()}}
    if draw(st.booleans()):
        schema["required"] = list(members)
    if draw(st.booleans()):
        schema["additionalProperties"] = draw(st.booleans())
    return schema, {name: value for name, (_, value) in members.items()}


def judged(schema: dict[str, Any], arguments: str) -> Verdict:
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    asked = Asked({"messages": [{"role": "user", "content": arguments}], "tools": tools})
    answer = Answer(calls=(Call("call_1", "f", arguments),), finish="tool_calls")
    options = Options("enforce", Policy(), budget=BudgetBody(max_rounds=0))
    return asyncio.run(Referee().judge_answer(asked, answer, options, None))


def check(schema: dict[str, Any], arguments: str) -> None:
    """The property, for any text as the arguments."""
    verdict = judged(schema, arguments)
    try:
        value = read_strictly(arguments)
        is_valid = isinstance(value, dict) and jsonschema.Draft202012Validator(closed(schema)).is_valid(value)
    except NotJson:
        is_valid = False
    if is_valid:
        assert verdict.word == "pass" and verdict.answer is not None
        assert verdict.answer.calls[0].arguments == arguments
    elif verdict.word == "repaired":
        assert verdict.answer is not None
        sent = json.loads(verdict.answer.calls[0].arguments)
        jsonschema.Draft202012Validator(schema).validate(sent)
        assert isinstance(sent, dict)
    else:
        assert verdict.word == "rejected" and verdict.answer is None and verdict.error().message


def closed(schema: Any) -> Any:
    """Objects that say nothing about further properties have none; every schema made here lists its own."""
    if isinstance(schema, dict) and "properties" in schema:
        inner = {name: closed(one) for name, one in schema["properties"].items()}
        return {"additionalProperties": False, **schema, "properties": inner}
    if isinstance(schema, dict) and "items" in schema:
        return {**schema, "items": closed(schema["items"])}
    return schema


@given(objects(), st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=50, deadline=None)
def test_a_valid_call_is_not_touched(made: tuple[dict[str, Any], dict[str, Any]], escaped: bool, indent: int | None):
    schema, value = made
    arguments = json.dumps(value, ensure_ascii=escaped, indent=indent)
    verdict = judged(schema, arguments)
    assert verdict.word == "pass" and verdict.answer is not None
    assert verdict.answer.calls[0] == Call("call_1", "f", arguments)


@given(objects(), st.data())
@settings(max_examples=50, deadline=None)
def test_a_damaged_call_is_repaired_to_its_schema_or_does_not_go_out(
    made: tuple[dict[str, Any], dict[str, Any]], data: st.DataObject
):
    schema, value = made
    text = json.dumps(value)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        until = data.draw(st.integers(at, min(len(text), at + 3)))
        piece = data.draw(
            st.sampled_from(["", "'", '"', ",", "}", "]", "{", "[", "True", "null", "1", "\n", "\\", ":", "NaN"])
        )
        text = text[:at] + piece + text[until:]
    check(schema, text)


@given(objects(), st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8,
))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_value_as_arguments(made: tuple[dict[str, Any], dict[str, Any]], value: Any):
    check(made[0], json.dumps(value))


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_as_arguments(text: str):
    check({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, text)


@given(st.dictionaries(st.text("ab", min_size=1), st.text(min_size=1, max_size=8), min_size=1), st.data())
@settings(max_examples=50, deadline=None)
def test_a_text_that_was_cut_off_is_never_finished_by_guessing(value: dict[str, str], data: st.DataObject):
    text = json.dumps(value)
    cut = data.draw(st.integers(1, len(text) - 1))
    try:
        found, _ = read_leniently(text[:cut])
    except NotJson:
        return
    assert all(value[key] == member for key, member in found.items())


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12,
))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_the_lenient_reader_reads_json_as_the_strict_one(value: Any):
    text = json.dumps(value)
    assume(text.count("[") + text.count("{") < 60)
    assert read_leniently(text) == (read_strictly(text), [])
    assert json.dumps(read_leniently(text)[0]) == text
