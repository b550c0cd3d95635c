"""Kinds of broken tool call: each is repaired to what it plainly meant, or refused in words; none goes out as it is."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest

from rorqual.referee import Answer, Asked, Call, Options, Policy, Referee
from rorqual.referee.policy import BudgetBody, Forbid
from rorqual.referee.reasons import BY_CODE

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "hourly": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "place": {"type": "object", "properties": {"user_id": {"type": "string"}, "lat": {"type": "number"}}},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "code": {"type": "string", "pattern": "^[A-Z]{3}$"},
    },
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "delete_file", "parameters": {"type": "object"}}},
]
REQUEST: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "The weather of Oslo for 3 days, please."}],
    "tools": TOOLS,
}
POLICY = Policy(forbid=(Forbid(tool="delete_*", because="nothing is deleted here"),), aliases={"wetter": "get_weather"})
OSLO = {"city": "Oslo"}


@dataclass(frozen=True)
class Kind:
    """means: the call it stands for, None where nobody can tell. code: the reason found."""

    name: str
    answer: Answer
    code: str
    means: dict[str, Any] | None = None
    tool: str = "get_weather"
    request: dict[str, Any] | None = None


def call(arguments: str, name: str | None = "get_weather", id: str | None = "call_1") -> Answer:
    return Answer(calls=(Call(id, name, arguments),), finish="tool_calls")


def text(content: str, finish: str = "stop") -> Answer:
    return Answer(content=content, finish=finish)


DSML = (
    'Let me look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
KINDS = [
    # text that is no JSON
    Kind("trailing comma", call('{"city": "Oslo",}'), "arguments_not_json", OSLO),
    Kind("missing bracket", call('{"city": "Oslo", "place": {"lat": 59.9'), "arguments_not_json",
         {"city": "Oslo", "place": {"lat": 59.9}}),
    Kind("surplus bracket", call('{"city": "Oslo"}}'), "arguments_not_json", OSLO),
    Kind("wrong bracket inside", call('{"city": "Oslo", "tags": ["a"}'), "arguments_not_json",
         {"city": "Oslo", "tags": ["a"]}),
    Kind("single quotes", call("{'city': 'Oslo'}"), "arguments_not_json", OSLO),
    Kind("Python literals", call('{"city": "Oslo", "hourly": True, "note": None}'), "arguments_not_json",
         {"city": "Oslo", "hourly": True, "note": None}),
    Kind("bare keys", call('{city: "Oslo"}'), "arguments_not_json", OSLO),
    Kind("code fence", call('```json\n{"city": "Oslo"}\n```'), "arguments_not_json", OSLO),
    Kind("comments", call('{"city": "Oslo" /* the capital */}'), "arguments_not_json", OSLO),
    Kind("raw line break", call('{"city": "Oslo", "note": "a\nb"}'), "arguments_not_json",
         {"city": "Oslo", "note": "a\nb"}),
    Kind("lone backslash", call('{"city": "Oslo", "note": "C:\\dir"}'), "arguments_not_json",
         {"city": "Oslo", "note": "C:\\dir"}),
    Kind("byte order mark", call('\ufeff{"city": "Oslo"}'), "arguments_not_json", OSLO),
    Kind("no text at all", call("", "now"), "arguments_not_json", {}, "now"),
    Kind("cut string", call('{"city": "Osl'), "arguments_not_json"),
    Kind("text around it", call('Here: {"city": "Oslo"} and so on'), "arguments_not_json"),
    Kind("two objects", call('{"city": "Oslo"}{"city": "Rome"}'), "arguments_not_json"),
    Kind("no number", call('{"city": "Oslo", "days": NaN}'), "arguments_not_json"),
    Kind("prose", call("the weather in Oslo"), "arguments_not_json"),
    Kind("a key twice", call('{"city": "Oslo", "city": "Rome"}'), "duplicate_key"),
    # JSON in another place or shape
    Kind("stringified", call(json.dumps(json.dumps(OSLO))), "arguments_stringified", OSLO),
    Kind("wrapped", call('{"arguments": {"city": "Oslo"}}'), "arguments_wrapped", OSLO),
    Kind("wrapped with its name", call('{"name": "get_weather", "parameters": {"city": "Oslo"}}'), "arguments_wrapped",
         OSLO),
    Kind("wrapped and stringified", call('{"input": "{\\"city\\": \\"Oslo\\"}"}'), "arguments_wrapped", OSLO),
    Kind("a list of one", call('[{"city": "Oslo"}]'), "arguments_wrapped", OSLO),
    Kind("a list", call('["Oslo"]'), "arguments_not_object"),
    Kind("stringified member", call('{"city": "Oslo", "place": "{\\"lat\\": 59.9}"}'), "type_wrong",
         {"city": "Oslo", "place": {"lat": 59.9}}),
    # values the schema does not take
    Kind("number as text", call('{"city": "Oslo", "days": "3"}'), "type_wrong", {"city": "Oslo", "days": 3}),
    Kind("boolean as text", call('{"city": "Oslo", "hourly": "True"}'), "type_wrong",
         {"city": "Oslo", "hourly": True}),
    Kind("text as number", call('{"city": 1234}'), "type_wrong", {"city": "1234"}),
    Kind("one for a list", call('{"city": "Oslo", "tags": "a"}'), "type_wrong", {"city": "Oslo", "tags": ["a"]}),
    Kind("null for nothing", call('{"city": "Oslo", "days": null}'), "type_wrong", OSLO),
    Kind("enum in capitals", call('{"city": "Oslo", "unit": "Celsius"}'), "enum_wrong",
         {"city": "Oslo", "unit": "celsius"}),
    Kind("key in another spelling", call('{"city": "Oslo", "place": {"userId": "u"}}'), "key_alias",
         {"city": "Oslo", "place": {"user_id": "u"}}),
    Kind("enum of another value", call('{"city": "Oslo", "unit": "kelvin"}'), "enum_wrong"),
    Kind("word for a number", call('{"city": "Oslo", "days": "three"}'), "type_wrong"),
    Kind("fraction for a whole number", call('{"city": "Oslo", "days": 2.5}'), "type_wrong"),
    Kind("out of range", call('{"city": "Oslo", "days": 99}'), "range_wrong"),
    Kind("text out of range", call('{"city": "Oslo", "days": "99"}'), "type_wrong"),
    Kind("required missing", call('{"days": 3}'), "required_missing"),
    Kind("invented key", call('{"city": "Oslo", "mood": "sunny"}'), "extra_key"),
    Kind("pattern", call('{"city": "Oslo", "code": "oslo"}'), "arguments_invalid"),
    # the call itself
    Kind("name in another spelling", call('{"city": "Oslo"}', "functions.getWeather"), "name_alias", OSLO),
    Kind("name by the policy", call('{"city": "Oslo"}', "wetter"), "name_alias", OSLO),
    Kind("unknown name", call('{"city": "Oslo"}', "get_forecast"), "tool_unknown"),
    Kind("no name", call('{"city": "Oslo"}', None), "call_malformed"),
    Kind("no id", call('{"city": "Oslo"}', id=None), "call_id_missing", OSLO),
    Kind("forbidden", call('{"path": "a"}', "delete_file"), "side_effect_forbidden"),
    Kind("finish reason stop", Answer(calls=call('{"city": "Oslo"}').calls, finish="stop"), "finish_inconsistent",
         OSLO),
    Kind("cut off", Answer(calls=call('{"city": "Oslo"').calls, finish="length"), "truncated_call"),
    Kind("cut off after it", Answer(calls=call('{"city": "Oslo"}').calls, finish="length"), "truncated_call"),
    Kind("no finish reason", Answer(calls=call('{"city": "Oslo"}').calls), "finish_missing"),
    # calls as text, or none
    Kind("DSML in the content", text(DSML), "calls_in_content", OSLO),
    Kind("Hermes tags in the content",
         text('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'), "calls_in_content",
         OSLO),
    Kind("unreadable tags", text("<tool_call>get_weather(Oslo)</tool_call>"), "calls_in_content"),
    Kind("a call announced only", text("", "tool_calls"), "finish_inconsistent"),
    Kind("a text where a call was asked for", text("It is sunny."), "call_missing",
         request={**REQUEST, "tool_choice": "required"}),
    Kind("a call where none was allowed", call('{"city": "Oslo"}'), "call_unwanted",
         request={**REQUEST, "tool_choice": "none"}),
    Kind("another call than asked for", call("{}", "now"), "call_unwanted",
         request={**REQUEST, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}),
    Kind("parallel where one is allowed",
         Answer(calls=(Call("a", "now", "{}"), Call("b", "get_weather", '{"city": "Oslo"}')), finish="tool_calls"),
         "calls_parallel", request={**REQUEST, "parallel_tool_calls": False}),
    Kind("a call without tools", call('{"city": "Oslo"}'), "call_unwanted",
         request={"model": "m", "messages": REQUEST["messages"]}),
]  # fmt: skip


def judged(kind: Kind, mode: str = "enforce") -> Any:
    options = Options(mode, POLICY, budget=BudgetBody(max_rounds=0))  # type: ignore[arg-type]
    return asyncio.run(Referee().judge_answer(Asked(kind.request or REQUEST), kind.answer, options, None))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kind_is_repaired_or_refused(kind: Kind):
    verdict = judged(kind)
    codes = {one.code for one in verdict.findings}
    assert kind.code in codes
    if kind.means is not None:
        assert verdict.word == "repaired", verdict.to_dict()
        (sent,) = verdict.answer.calls
        assert sent.name == kind.tool and json.loads(sent.arguments) == kind.means and sent.id
        assert verdict.answer.finish == "tool_calls"
        if kind.tool == "get_weather":
            jsonschema.validate(json.loads(sent.arguments), SCHEMA)
        assert any(one.status == "repaired" and one.code == kind.code for one in verdict.findings)
        return
    assert verdict.word in ("rejected", "blocked"), verdict.to_dict()
    assert verdict.answer is None or not verdict.answer.calls
    error = verdict.error()
    fault = next(one for one in verdict.findings if one.code == kind.code and one.rejects)
    assert fault.says in error.message or kind.code in [one.code for one in verdict.findings[:8]]
    assert len(fault.says) > 15 and BY_CODE[kind.code].hard
    if verdict.word == "blocked":
        assert fault.says in verdict.answer.content


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.means is None], ids=lambda kind: kind.name)
def test_in_annotate_what_cannot_be_repaired_goes_out_with_its_fault(kind: Kind):
    verdict = judged(kind, "annotate")
    assert verdict.word in ("flagged", "blocked")
    row = next(row for row in verdict.to_dict()["checks"] if row["reason_code"] == kind.code)
    assert row["status"] == "fail" and row["says"]


def test_there_are_well_over_twenty_kinds():
    repaired = {kind.name for kind in KINDS if kind.means is not None}
    refused = {kind.name for kind in KINDS if kind.means is None}
    assert len(repaired) >= 20 and len(refused) >= 20 and len(repaired | refused) == len(KINDS)


def test_ids_that_two_calls_share_are_told_apart():
    answer = Answer(calls=(Call("a", "now", "{}"), Call("a", "get_weather", '{"city": "Oslo"}')), finish="tool_calls")
    verdict = judged(Kind("", answer, ""))
    assert verdict.word == "repaired" and len({one.id for one in verdict.answer.calls}) == 2
    assert verdict.answer.calls[0] == answer.calls[0]


def test_half_a_repair_is_none():
    """A call with one fault that could be repaired and one that cannot is shown to the model as it wrote it."""
    verdict = judged(Kind("", call('{"city": "Oslo", "days": "3", "mood": 1}'), ""), "annotate")
    assert verdict.answer.calls[0].arguments == '{"city": "Oslo", "days": "3", "mood": 1}'
    assert {one.code for one in verdict.findings if one.rejects} == {"type_wrong", "extra_key"}
