"""Chat completions: what is refused, and by which name, and what is accepted although it does nothing."""

import json
from typing import Any

import pytest
from scripted_api import TOOLS, ask, refused
from starlette.testclient import TestClient

from rorqual.engine import Engine
from rorqual.server import Behaviour, create_app


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"model": "gpt-5"}, "model", "The supported API model name is minke, but you passed gpt-5."),
        ({"logit_bias": {"1": 2}}, "logit_bias", "Unknown field `logit_bias`"),
        (
            {"thinking": {"type": "enabled", "budget": 1}},
            "thinking.budget",
            "Unknown field `thinking.budget`",
        ),
        (
            {"thinking": {"type": "auto"}},
            "thinking.type",
            "unknown variant `auto`, expected one of `enabled`",
        ),
        ({"thinking": "disabled"}, "thinking", "thinking"),
        ({"messages": []}, "messages", "Empty input messages"),
        ({"messages": None}, "messages", "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "unknown variant `robot`"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing field `content`"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "expected a string"),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x", "Unknown field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "This model does not support image",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_call_id": "1"}]},
            "messages[0].tool_call_id",
            "no meaning",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "one of the two"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
            "messages[1].tool_call_id",
            "missing field `tool_call_id`",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "tool", "tool_call_id": "1", "content": "b"},
                ]
            },
            "messages[1]",
            "must be a response to a preceding message with 'tool_calls'",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "prefix": True},
                    {"role": "user", "content": "c"},
                ]
            },
            "messages[1].prefix",
            "only the last message",
        ),
        ({"temperature": 3}, "temperature", "the valid range of temperature is [0, 2]"),
        ({"temperature": "1"}, "temperature", "temperature"),
        ({"top_p": 0}, "top_p", "(0, 1.0]"),
        ({"max_tokens": 0}, "max_tokens", "the valid range of max_tokens is [1, 16384]"),
        ({"max_tokens": 16384}, "max_tokens", "maximum context length is 16384 tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens", "two names of one field"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "range of max_completion_tokens is [1, 16384]"),
        ({"max_completion_tokens": 16384}, "max_completion_tokens", "maximum context length is 16384 tokens"),
        ({"\ud800": 1}, "?", "half of a surrogate pair"),
        ({"presence_penalty": 3}, "presence_penalty", "[-2, 2]"),
        ({"n": 2}, "n", "one choice"),
        ({"stop": ["x"] * 17}, "stop", "Stop string array too long: 17"),
        ({"stop": 5}, "stop", "Invalid stop value"),
        ({"seed": -1}, "seed", "seed"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "[0, 20]"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs must be set to true"),
        ({"response_format": {"type": "json_object"}}, "response_format", "Prompt must contain the word 'json'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "unknown variant `xml`"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"reasoning_effort": "ultra"}, "reasoning_effort", "ultra"),
        ({"user_id": "no spaces"}, "user_id", "user_id"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", "Thinking mode does not support this tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "watch"}}},
            "tool_choice",
            "the request's tools are clock",
        ),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "expected one of `none`, `auto`"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "other kinds"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "a", "strict": True, "parameters": {"type": "array"}}}
                ]
            },
            "tools[0].function.parameters",
            "object schema",
        ),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "Leave it out"),
        ({"model": "\ud800"}, "model", "but you passed ?"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_name_the_field(
    client: TestClient, fields: dict[str, Any], param: str, text: str, stream: bool
) -> None:
    body = {"model": "minke", "messages": [{"role": "user", "content": "Hi"}], "stream": stream, **fields}
    content = json.dumps({key: value for key, value in body.items() if key != "messages" or value is not None})
    response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    error = refused(response)
    assert text in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_stream_options_need_a_stream(client: TestClient) -> None:
    error = refused(ask(client, stream_options={"include_usage": True}))
    assert (error["param"], "Set stream to true" in error["message"]) == ("stream_options", True)


def calls_history(**assistant: Any) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call], **assistant},
    ]


def test_calls_need_their_results_and_their_reasoning(engine: Engine) -> None:
    client = TestClient(create_app(engine, "minke", behaviour=Behaviour(keep_reasoning=False)))
    result = {"role": "tool", "tool_call_id": "c1", "content": "noon"}

    def post(messages: list[Any], **more: Any) -> Any:
        return client.post("/chat/completions", json={"model": "minke", "messages": messages, "tools": TOOLS, **more})

    error = refused(post(calls_history()))
    assert "did not have response messages: c1" in error["message"]
    error = refused(post([*calls_history(), {"role": "user", "content": "y"}, result]))
    assert "did not have response messages: c1" in error["message"]
    error = refused(post([*calls_history(), result]))
    assert error["message"].startswith("The `reasoning_content` in the thinking mode must be passed back to the API.")
    assert post([*calls_history(reasoning_content=""), result]).status_code == 200
    assert post([*calls_history(), result], thinking={"type": "disabled"}).status_code == 200
    assert post(calls_history(reasoning_content="r") + [result, {"role": "user", "content": "z"}]).status_code == 200
    strict = TestClient(create_app(engine, behaviour=Behaviour(keep_reasoning=False, documented_reasoning_check=True)))
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    body = {"model": "minke", "messages": messages}
    assert strict.post("/chat/completions", json=body).status_code == 200, "no tools"
    assert "must be passed back" in refused(strict.post("/chat/completions", json={**body, "tools": TOOLS}))["message"]


def test_nulls_and_documented_no_ops_are_accepted(client: TestClient) -> None:
    nulls = dict.fromkeys(
        ["thinking", "reasoning_effort", "max_tokens", "temperature", "top_p", "stop", "stream", "tools"]
        + ["tool_choice", "logprobs", "top_logprobs", "user_id", "response_format", "n", "logit_bias"]
    )
    assert ask(client, **nulls).status_code == 200
    extra = {"frequency_penalty": 0.5, "presence_penalty": -1, "user": "u", "user_id": "u-1", "n": 1}
    assert ask(client, **extra, response_format={"type": "text"}, tool_choice="required").status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "text"),
    [
        ("{", "application/json", "Failed to parse the request body as JSON"),
        ("[]", "application/json", "not a JSON object"),
        ("", "application/json", "not a JSON object"),
        ('{"model": "minke"}', "text/plain", "Content-Type: application/json"),
        ("{}", "application/json", "missing field `model`"),
        ("[" * 100_000, "application/json", "nested too deeply"),
        ('{"seed": ' + "1" * 5000 + "}", "application/json", "integer of too many digits"),
    ],
)
def test_bodies_that_are_no_request(client: TestClient, content: str, kind: str, text: str) -> None:
    response = client.post("/v1/chat/completions", content=content, headers={"content-type": kind})
    assert text in refused(response)["message"]
