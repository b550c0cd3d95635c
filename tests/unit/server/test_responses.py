"""POST /responses: what the model is shown, what comes back, and the order of events for any reply and any cut."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_api import PROMPTS, refused
from starlette.testclient import TestClient

from rorqual import chat
from rorqual.server.pieces import Piece
from rorqual.server.responses.convert import to_chat
from rorqual.server.responses.items import Writer
from rorqual.server.responses.schema import ResponsesRequest

CLOCK: Any = {"type": "function", "name": "clock", "parameters": {"type": "object"}}
CALL: Any = {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": '{"zone": "UTC"}'}
OUTPUT: Any = {"type": "function_call_output", "call_id": "c1", "output": "noon"}


def ask(client: TestClient, input: Any = "Hi", **fields: Any) -> Any:
    return client.post("/v1/responses", json={"model": "minke", "input": input, **fields})


def events_of(response: Any) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n", 1)
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


def check_order(events: list[Any]) -> list[Any]:
    """The items that the events build; every part of each comes in its place and says the same as its deltas."""
    items: list[Any] = []
    text: str | None = None
    kinds = {"reasoning_text": "text", "output_text": "text", "function_call_arguments": "arguments"}
    kinds |= {"custom_tool_call_input": "input"}
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items) and (not items or items[-1][1])
            items.append([event["item"], False])
            assert event["item"]["status"] == "in_progress"
            text = ""
            continue
        [item, is_done] = items[-1]
        assert not is_done and event["output_index"] == len(items) - 1
        assert event.get("item_id", item["id"]) == item["id"]
        if kind.endswith(".delta"):
            assert event["delta"]
            text += event["delta"]
        elif (field := kinds.get(kind.removesuffix(".done"))) is not None:
            assert event[field] == text
        elif kind == "output_item.done":
            assert event["item"]["id"] == item["id"] and event["item"]["status"] != "in_progress"
            whole = event["item"]
            assert text == whole.get("arguments", whole.get("input", (whole.get("content") or [{}])[0].get("text")))
            items[-1] = [whole, True]
        else:
            assert kind in ("content_part.added", "content_part.done")
    assert all(done for _, done in items)
    return [item for item, _ in items]


def test_a_whole_answer(client: TestClient) -> None:
    body = ask(client, instructions="Be brief.", max_output_tokens=100).json()
    assert (
        PROMPTS[-1].startswith("<｜begin▁of▁sentence｜>")
        and "Be brief.<｜User｜>Hi<｜Assistant｜><think>" in PROMPTS[-1]
    )
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "minke")
    reasoning, message = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me think."}]
    assert message["content"][0]["text"] == "Hello 🐋!" and message["role"] == "assistant"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == len("Let me think.") + 1
    assert (body["instructions"], body["max_output_tokens"]) == ("Be brief.", 100)


def test_a_cut_answer_is_incomplete(client: TestClient) -> None:
    body = ask(client, reasoning={"effort": "none"}, max_output_tokens=3).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["content"][0]["text"] == "Hel"
    events = events_of(ask(client, reasoning={"effort": "none"}, max_output_tokens=3, stream=True))
    assert events[-1]["type"] == "response.incomplete" and events[-1]["response"]["status"] == "incomplete"


def test_a_stream_and_its_call(client: TestClient) -> None:
    events = events_of(ask(client, "call the clock", tools=[CLOCK], stream=True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    items = check_order(events[2:-1])
    assert items == events[-1]["response"]["output"]
    assert [item["type"] for item in items] == ["reasoning", "function_call"]
    assert json.loads(items[1]["arguments"]) == {"zone": "UTC"}


def test_a_history_is_shown_in_the_models_format(client: TestClient) -> None:
    reasoning = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Ask."}],
    }
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]}
    developer = {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]}
    items = [
        developer,
        {"role": "user", "content": "time?"},
        reasoning,
        said,
        CALL,
        OUTPUT,
        {"role": "user", "content": "Hi"},
    ]
    assert ask(client, items, tools=[CLOCK]).status_code == 200
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": CALL["arguments"]}}
    expected = chat.encode_messages(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "time?"},
            {
                "role": "assistant", "content": "Wait.", "reasoning_content": "Ask.",
                "tool_calls": [call],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
            {"role": "user", "content": "Hi"},
        ],
        [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}],
        "thinking", "high",
    )  # fmt: skip
    assert PROMPTS[-1] == expected


def test_a_custom_tool_takes_text(client: TestClient) -> None:
    tool = {"type": "custom", "name": "apply_patch", "description": "Patch files.", "format": {"type": "text"}}
    call = {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": 'a "b"\n'}
    output = {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"}
    body = ask(client, [{"role": "user", "content": "x"}, call, output], tools=[tool, {"type": "web_search"}]).json()
    assert '<｜DSML｜parameter name="input" string="true">a "b"\n</｜DSML｜parameter>' in PROMPTS[-1]
    assert body["rorqual"]["ignored"] == ["tools[1]: web_search"]
    assert body["rorqual"]["continuity"]["missing"] == [1]


@given(
    st.lists(st.sampled_from(["reason", "text", "call", "patch", "cut"]), max_size=6),
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.integers(1, 5),
    st.sampled_from(["stop", "length"]),
)
def test_events_are_in_order_for_any_reply(parts: list[str], text: str, size: int, reason: str) -> None:
    """Free text comes out as it went in, whatever the pieces of its arguments."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    events: list[chat.Event] = []
    num_calls, inputs = 0, []
    for part in parts:
        if part in ("reason", "text"):
            kind = chat.ReasoningDelta if part == "reason" else chat.ContentDelta
            events += [kind(piece) for piece in pieces]
            continue
        name = "clock" if part == "call" else "patch"
        events.append(chat.ToolCallStart(num_calls, f"c{num_calls}", name))
        escaped = [json.dumps(piece, ensure_ascii=False)[1:-1] for piece in pieces]
        arguments = ['{"input": "' + "".join(escaped[:1]), *escaped[1:-1], "".join(escaped[1:][-1:]) + '"}']
        events += [chat.ToolCallArguments(num_calls, piece) for piece in arguments if piece]
        events.append(chat.ToolCallEnd(num_calls, part != "cut"))
        if part == "patch":
            inputs.append(text)
        num_calls += 1
    events.append(chat.Finished({"role": "assistant", "content": ""}, reason))
    writer = Writer({"patch"})
    items = check_order([event for one in events for event in writer.read(Piece(one, None))])
    custom = [item["input"] for item in writer.output if item["type"] == "custom_tool_call"]
    assert custom == inputs
    assert writer.output == [
        item for item in items if item["type"] in ("message", "reasoning") or item["status"] == "completed"
    ]
    assert any(item["type"] != "reasoning" for item in writer.output)


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"input": None}, "input", "Send one of them"),
        ({"previous_response_id": "x"}, "previous_response_id", "stores nothing"),
        ({"background": True}, "background", "Leave it out"),
        ({"input": [CALL]}, "input", "No tool output found for tool call c1"),
        ({"input": [CALL, {"role": "user", "content": "x"}, OUTPUT]}, "input", "No tool output found for tool call c1"),
        ({"input": [OUTPUT]}, "input[0]", "No tool call found for tool output with call_id c1"),
        ({"input": [3]}, "input[0]", "not an item"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "unknown variant `tool`"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort", "much"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "Two tools are named 'clock'"),
        ({"tools": [CLOCK], "tool_choice": {"type": "web_search"}}, "tool_choice", "not supported"),
        ({"top_logprobs": 30}, "top_logprobs", "[0, 20]"),
        ({"colour": 1}, "colour", "Unknown field"),
    ],
)
def test_refusals_use_the_words_of_this_dialect(client: TestClient, fields: Any, param: str, text: str) -> None:
    body = {"model": "minke", "input": "Hi", **fields}
    error = refused(client.post("/responses", json=body))
    assert text in error["message"] and error["param"] == param


def test_log_probabilities_ride_on_the_text(client: TestClient) -> None:
    fields: Any = {"reasoning": {"effort": "none"}, "top_logprobs": 2}
    whole = ask(client, **fields).json()["output"][0]["content"][0]
    assert "".join(entry["token"] for entry in whole["logprobs"][:5]) == "Hello"
    assert len(whole["logprobs"][0]["top_logprobs"]) == 2
    events = events_of(ask(client, **fields, stream=True))
    streamed = [entry for e in events if e["type"] == "response.output_text.delta" for entry in e["logprobs"]]
    assert len(streamed) >= len(b"Hello")


def test_what_the_chat_request_is() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    fields = {"model": "m", "input": "x", "user": "has spaces", "text": {"format": form}}
    body = ResponsesRequest.model_validate(fields)
    converted = to_chat(body).body
    assert (converted.user, converted.user_id) == ("has spaces", None)
    assert converted.response_format is not None and converted.response_format.json_schema is not None
    assert converted.response_format.json_schema.schema_ == {"type": "object"}


def test_tools_that_are_none_are_ignored(client: TestClient) -> None:
    body = {"model": "minke", "input": "Hi", "tools": [[], True, {"type": "web_search"}]}
    response = client.post("/v1/responses", json=body)
    assert response.status_code == 200 and response.json()["tools"] == body["tools"]
