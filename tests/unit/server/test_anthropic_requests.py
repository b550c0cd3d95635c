"""POST /anthropic/v1/messages: the prompt a request becomes, what is taken without effect, and what is refused."""

import json
from typing import Any

import pytest
from scripted_api import PROMPTS
from starlette.testclient import TestClient

from rorqual import chat
from rorqual.engine import Engine
from rorqual.server import Behaviour, create_app
from rorqual.server.anthropic.convert import to_chat
from rorqual.server.anthropic.schema import MessagesRequest

CLOCK: Any = {"name": "clock", "description": "Tells the time.", "input_schema": {"type": "object"}}
CALL: Any = {"type": "tool_use", "id": "c1", "name": "clock", "input": {"zone": "UTC", "n": 1}}
RESULT: Any = {"type": "tool_result", "tool_use_id": "c1", "content": "noon"}
MARK: Any = {"type": "ephemeral", "ttl": "1h"}
OFF: Any = {"thinking": {"type": "disabled"}}


def send(client: TestClient, messages: Any, **fields: Any) -> Any:
    body = {"model": "minke", "max_tokens": 20, "messages": messages, **fields}
    content = json.dumps({name: value for name, value in body.items() if value is not ...})
    return client.post("/anthropic/v1/messages", content=content, headers={"content-type": "application/json"})


def user(*content: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": list(content) if len(content) > 1 or isinstance(content[0], dict) else content[0],
    }


def assistant(*content: Any) -> dict[str, Any]:
    return {**user(*content), "role": "assistant"}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def thought(words: str, signature: str = "s") -> dict[str, Any]:
    return {"type": "thinking", "thinking": words, "signature": signature}


def test_blocks_become_the_models_own_messages(client: TestClient) -> None:
    history = [
        user(text("time?", cache_control=MARK)),
        assistant(thought("Ask."), text("Wait.", citations=None), CALL, {**CALL, "id": "c2", "caller": None}),
        user(
            {**RESULT, "is_error": True, "cache_control": MARK},
            {"type": "tool_result", "tool_use_id": "c2", "content": [text("a"), text("b")]},
            text("And?"),
        ),
        assistant(thought(""), text("Noon.")),
        user("Thanks"),
    ]
    tools = [{**CLOCK, "type": "custom", "cache_control": MARK, "eager_input_streaming": True, "defer_loading": True}]
    system = [text("Be kind.", cache_control=MARK), text("Be brief.")]
    assert send(client, history, tools=tools, system=system).status_code == 200
    calls = [
        {"id": i, "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC", "n": 1}'}}
        for i in ("c1", "c2")
    ]
    expected = chat.encode_messages(
        [
            {"role": "system", "content": "Be kind.\n\nBe brief."},
            {"role": "user", "content": "time?"},
            {"role": "assistant", "content": "Wait.", "reasoning_content": "Ask.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
            {"role": "tool", "tool_call_id": "c2", "content": "a\n\nb"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Noon.", "reasoning_content": ""},
            {"role": "user", "content": "Thanks"},
        ],
        [{"type": "function", "function": {"name": "clock", "description": "Tells the time.",
                                           "parameters": {"type": "object"}}}],
        "thinking", "high",
    )  # fmt: skip
    assert PROMPTS[-1] == expected


@pytest.mark.parametrize(
    ("messages", "system", "prompt"),
    [
        ([user("a")], None, "<｜User｜>a<｜Assistant｜></think>"),
        ([user(text("a"), text("b"))], "", "<｜User｜>a\n\nb<｜Assistant｜></think>"),
        ([user("a"), assistant("b"), user("c")], "S",
         "S<｜User｜>a<｜Assistant｜></think>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜></think>"),
        ([user("a"), {"role": "system", "content": [text("r"), text("s")]}], None,
         "<｜User｜>a\n\n<system-reminder>\nr\n\ns\n</system-reminder><｜Assistant｜></think>"),
        ([user("a"), assistant(thought("t"), text("b")), user("c")], None,
         "<｜User｜>a<｜Assistant｜></think>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜></think>"),
        ([user("a")], [text("x-anthropic-billing-header: cc_version=2.1.37.0d9; cch=fa690;"), text("S")],
         "S<｜User｜>a<｜Assistant｜></think>"),
        ([user("a")], "x-anthropic-billing-header: cch=1;\nS", "S<｜User｜>a<｜Assistant｜></think>"),
    ],
)  # fmt: skip
def test_prompts(client: TestClient, messages: Any, system: Any, prompt: str) -> None:
    response = send(client, messages, system=system, **OFF)
    assert response.status_code == 200, response.text
    assert PROMPTS[-1] == "<｜begin▁of▁sentence｜>" + prompt


def test_results_come_before_the_text_they_were_sent_with(client: TestClient) -> None:
    first, second = CALL, {**CALL, "id": "c2"}
    answers = [text("x"), {**RESULT, "tool_use_id": "c2", "content": "two"}, text("y"), {**RESULT, "content": "one"}]
    for content in ([user(*answers)], [user(answers[1]), user(answers[3], answers[0], answers[2])]):
        assert send(client, [user("q"), assistant(first, second), *content], tools=[CLOCK]).status_code == 200
        results = "<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>\n\nx\n\ny<｜Assistant｜>"
        assert results in PROMPTS[-1]
    found = {**RESULT, "content": [{"type": "tool_reference", "tool_name": "clock"}]}
    assert send(client, [user("q"), assistant(first), user(found)], tools=[CLOCK]).status_code == 200
    assert "<tool_result>clock</tool_result>" in PROMPTS[-1]
    empty = {"type": "tool_result", "tool_use_id": "c1"}
    assert send(client, [user("q"), assistant(first), user(empty)], tools=[CLOCK]).status_code == 200
    assert "<tool_result></tool_result>" in PROMPTS[-1]


def test_effort_and_thinking(client: TestClient) -> None:
    for fields, ending in {
        "<think>": [{}, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"thinking": {"type": "adaptive"}},
                    {"thinking": {"type": "enabled"}, "output_config": {"effort": "none"}}],
        "</think>": [OFF, {"output_config": {"effort": "none"}}, {"model": "deepseek-chat"},
                     {**OFF, "output_config": {"effort": "max"}}],
    }.items():  # fmt: skip
        for one in ending:
            assert send(client, [user("a")], **one).status_code == 200
            assert PROMPTS[-1].endswith(f"<｜Assistant｜>{fields}")
    send(client, [user("a")], output_config={"effort": "max"})
    assert PROMPTS[-1].startswith("<｜begin▁of▁sentence｜>Reasoning Effort: Absolute maximum")


def test_everything_that_clients_send_is_taken(client: TestClient) -> None:
    """As Claude Code and the SDKs send it; unknown nulls come from whole objects sent back."""
    person = '{"device_id":"0123456789abcdef","account_uuid":"","session_id":"a1b2c3d4-0000-4000-8000-000000000000"}'
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "additionalProperties": False}
    body = {
        "temperature": 1,
        "top_p": 0.9,
        "top_k": 40,
        "metadata": {"user_id": person, "session": "x"},
        "thinking": {"type": "enabled", "budget_tokens": 31999, "display": "summarized"},
        "output_config": {"effort": "high", "task_budget": None},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "tools": [
            {**CLOCK, "name": f"mcp__plugin_{'x' * 60}_{i}", "input_schema": schema, "strict": True} for i in range(3)
        ],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "cache_control": MARK,
        "service_tier": "auto",
        "container": None,
        "mcp_servers": [],
        "inference_geo": "eu",
        "speed": "standard",
        "diagnostics": {"previous_message_id": None},
        "betas": ["claude-code-20250219"],
        "anthropic_version": "bedrock-2023-05-31",
        "invented": None,
    }
    assert send(client, [user("a")], **body).status_code == 200
    assert '"$schema": "http://json-schema.org/draft-07/schema#"' in PROMPTS[-1]
    assert send(client, [user("a")], max_tokens=...).status_code == 200


def test_what_the_chat_request_is() -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string"}}}

    def converted(**fields: Any) -> Any:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
        return to_chat(MessagesRequest.model_validate(body), True)

    form = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": form}}, {"output_format": form}):
        assert converted(**fields).response_format.json_schema.schema_ == schema
    assert converted(metadata={"user_id": "user_1-a"}).user_id == "user_1-a"
    assert converted(metadata={"user_id": "with spaces"}).user == "with spaces"
    choice: Any = {"tools": [CLOCK], "tool_choice": {"type": "any"}}
    assert converted(**choice).tool_choice == "required"
    choice["tool_choice"] = {"type": "tool", "name": "clock"}
    assert converted(**choice).tool_choice == {"type": "function", "function": {"name": "clock"}}
    choice["tool_choice"] = {"type": "none"}
    assert converted(**choice).tool_choice == "none"
    assert len(converted(tools=[{**CLOCK, "name": f"f{i}"} for i in range(200)]).tools) == 200
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 4, "max_tokens": 9}
    body = converted(**sampling, stop_sequences=["a"], stream=True, rorqual={"priority": 2})
    assert body.model_dump(include=set(sampling)) == sampling
    assert (body.stop, body.stream, body.rorqual.priority) == (["a"], True, 2)


def test_dropped_thinking_is_put_back_or_asked_for(engine: Engine) -> None:
    history: Any = [user("call the clock"), assistant(CALL), user(RESULT)]
    strict = TestClient(create_app(engine, "minke", behaviour=Behaviour(keep_reasoning=False)))
    response = send(strict, history, tools=[CLOCK])
    assert response.status_code == 400
    said = "The `content[].thinking` in the thinking mode must be passed back to the API."
    assert response.json()["error"]["message"].startswith(said)
    history[1] = assistant(thought(""), CALL)
    assert send(strict, history, tools=[CLOCK]).status_code == 200
    assert send(strict, [history[0], assistant(CALL), history[2]], tools=[CLOCK], **OFF).status_code == 200

    client = TestClient(create_app(engine, "minke"))
    for thinking in ({"type": "enabled"}, {"type": "adaptive", "display": "omitted"}):
        content = send(client, [user("call the clock")], tools=[CLOCK], thinking=thinking, max_tokens=500).json()[
            "content"
        ]
        shown = content if thinking.get("display") else content[1:]
        result = {**RESULT, "tool_use_id": content[-1]["id"]}
        answer = send(
            client, [user("call the clock"), assistant(*shown), user(result)], tools=[CLOCK], thinking=thinking
        )
        assert answer.json()["rorqual"]["continuity"] == {"restored": [1], "missing": [], "as_sampled": [1]}
        assert "<｜Assistant｜><think>Let me think.</think>\n\n<｜DSML｜tool_calls>" in PROMPTS[-1]


WEB = {"type": "web_search_20250305", "name": "web_search"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "Send at least one message"),
        ({"messages": ...}, "messages", "missing field `messages`"),
        ({"model": ...}, "model", "missing field `model`"),
        ({"model": "gpt-4"}, "model", "but you passed gpt-4"),
        ({"max_token": 5}, "max_token", "Unknown field `max_token`"),
        ({"thread": {"type": "create"}}, "thread", "stores none"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role",
         "unknown variant `tool`, expected one of `user`, `assistant`, `system`"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "must have non-empty content"),
        ({"messages": [user("a"), assistant("b"), {"role": "user", "content": "c", "name": "x"}]},
         "messages[2].name", "Unknown field"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text", "missing field"),
        ({"messages": [user({"type": "text", "text": "a", "colour": 1})]}, "messages[0].content[0].colour", "Unknown"),
        ({"messages": [user({"text": "a"})]}, "messages[0].content[0].type", "missing field"),
        ({"messages": [user("a", 3)]}, "messages[0].content[0]", "is no block"),
        ({"messages": [user({"type": "txt", "text": "a"})]}, "messages[0].content[0].type",
         "unknown variant `txt`, expected one of `text`, `tool_result`"),
        ({"messages": [user(IMAGE)]}, "messages[0].content[0]", "This model does not support image"),
        ({"messages": [user("q"), assistant(CALL), user({**RESULT, "content": [text("a"), IMAGE]})]},
         "messages[2].content[0].content[1]", "This model does not support image"),
        ({"messages": [user({"type": "document", "source": {}})]}, "messages[0].content[0]", "reads text only"),
        ({"messages": [user("q"), assistant({"type": "redacted_thinking", "data": "x"})]}, "messages[1].content[0]",
         "only the service which wrote it"),
        ({"messages": [user("q"), assistant({"type": "server_tool_use", "id": "1", "name": "w", "input": {}})]},
         "messages[1].content[0]", "runs no tools of its own"),
        ({"messages": [user("q"), assistant({"type": "web_search_tool_result", "tool_use_id": "1", "content": []})]},
         "messages[1].content[0]", "runs no tools of its own"),
        ({"messages": [user("q"), assistant({**CALL, "input": "x"}), user(RESULT)]}, "messages[1].content[0].input",
         "dictionary"),
        ({"messages": [user(CALL)]}, "messages[0].content[0].type", "unknown variant `tool_use`"),
        ({"messages": [user("q"), assistant(CALL), user("x")]}, "messages[1]",
         "`tool_use` ids were found without `tool_result` blocks immediately after: c1"),
        ({"messages": [user("q"), assistant(CALL)]}, "messages[1]", "without `tool_result` blocks"),
        ({"messages": [user("q"), user(RESULT)]}, "messages[1].content[0].tool_use_id",
         "unexpected `tool_use_id` found in `tool_result` blocks: c1"),
        ({"system": [IMAGE]}, "system[0]", "This model does not support image"),
        ({"system": [{"type": "text", "text": 3}]}, "system[0].text", "string"),
        ({"thinking": {"type": "auto"}}, "thinking.type", "unknown variant `auto`"),
        ({"thinking": "on"}, "thinking", ""),
        ({"output_config": {"effort": "much"}}, "output_config.effort", "'much'"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type", "unknown variant"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences", "Stop string array too long: 17"),
        ({"stop_sequences": [""]}, "stop_sequences", "an empty"),
        ({"temperature": 3}, "temperature", "[0, 2]"),
        ({"top_k": 0}, "top_k", ""),
        ({"tools": [WEB]}, "tools[0].type", "`web_search_20250305`, which is not supported"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "missing field"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name", "pattern"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "Two tools are named 'clock'"),
        ({"tools": [{**CLOCK, "parameters": {}}]}, "tools[0].parameters", "Unknown field"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool"}}, "tool_choice.name", "missing field"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "x"}, **OFF}, "tool_choice", "'x'"),
        ({"tools": [CLOCK], "tool_choice": {"type": "required"}}, "tool_choice.type", "unknown variant `required`"),
        ({"tool_choice": "auto"}, "tool_choice", ""),
        ({"metadata": {"user_id": 5}}, "metadata.user_id", "string"),
        ({"messages": [user("half \ud800 a pair")]}, "messages", "surrogate"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_wrong(client: TestClient, fields: Any, param: str, words: str) -> None:
    for stream in (False, True):
        body = {"messages": [user("a")], "stream": stream, **fields}
        response = send(client, body.pop("messages"), **body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert words in error["message"] and error["param"] == param, error
