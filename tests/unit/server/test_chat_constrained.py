"""Chat completions held to something: JSON, schemas, forced and strict calls, and a message to be continued."""

import json
from typing import Any

import pytest
from mock_model import byte_tokenizer
from scripted_api import ask, chunks_of, refused
from starlette.testclient import TestClient

from rorqual.engine import Engine
from rorqual.server import Behaviour, create_app

pytest.importorskip("llguidance", reason="needs llguidance (serve extra)")

OFF = {"type": "disabled"}
ZONE: Any = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
STRICT: Any = [{"type": "function", "function": {"name": "clock", "strict": True, "parameters": ZONE}}]


def test_json_although_the_model_would_greet(client: TestClient) -> None:
    for thinking in (OFF, {"type": "enabled"}):
        fields: Any = {"thinking": thinking, "temperature": 0, "max_tokens": 400}
        choice = ask(client, "Greet me in JSON", response_format={"type": "json_object"}, **fields).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
        else:  # a script that wants to say something else may fill a string for ever
            assert choice["message"]["content"].startswith("{")
        assert choice["message"].get("reasoning_content") == (None if thinking == OFF else "Let me think.")


def test_a_schema_leaves_one_answer(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    for fields in ({"response_format": form}, {"response_format": form, "stream": True}):
        response = ask(client, **fields, thinking=OFF)
        if "stream" in fields:
            content = "".join(c["choices"][0]["delta"]["content"] for c in chunks_of(response))
        else:
            content = response.json()["choices"][0]["message"]["content"]
        assert json.loads(content) == {"a": 7}
    responses = {
        "model": "minke",
        "input": "Hi",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": schema}},
    }
    body = client.post("/v1/responses", json=responses).json()
    assert json.loads(body["output"][1]["content"][0]["text"]) == {"a": 7}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
def test_a_forced_call(client: TestClient, engine: Engine, choice: Any) -> None:
    fields: Any = {"tools": STRICT, "tool_choice": choice, "temperature": 0}
    answer = ask(client, **fields, thinking=OFF).json()["choices"][0]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", "")
    [call] = answer["message"]["tool_calls"][:1]
    assert json.loads(call["function"]["arguments"])["zone"] in ("UTC", "CET")
    assert "Thinking mode does not support" in refused(ask(client, **fields))["message"]
    lenient = TestClient(create_app(engine, behaviour=Behaviour(forced_calls_while_thinking=True)))
    answer = ask(lenient, **fields).json()["choices"][0]
    assert answer["message"]["reasoning_content"] == "Let me think." and answer["message"]["tool_calls"]


def test_a_strict_tool_may_be_called_or_not(client: TestClient) -> None:
    asked = ask(client, "call the clock", tools=STRICT).json()["choices"][0]["message"]
    assert json.loads(asked["tool_calls"][0]["function"]["arguments"]) == {"zone": "UTC"}
    assert ask(client, "Hi", tools=STRICT).json()["choices"][0]["message"]["content"] == "Hello 🐋!"


@pytest.mark.parametrize(
    ("thinking", "message", "end"),
    [
        ("disabled", {"content": "Hel"}, "<｜Assistant｜></think>Hel"),
        ("enabled", {"content": "Hel", "reasoning_content": "Hm."}, "<｜Assistant｜><think>Hm.</think>Hel"),
        ("enabled", {"content": "Hel"}, "<｜Assistant｜><think></think>Hel"),
        ("enabled", {"content": "", "reasoning_content": "Let"}, "<｜Assistant｜><think>Let"),
    ],
)
def test_a_message_is_continued(client: TestClient, thinking: str, message: Any, end: str) -> None:
    """The answer is the continuation alone."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "prefix": True, **message}]
    body = {"model": "minke", "messages": messages, "thinking": {"type": thinking}, "max_tokens": 3, "logprobs": True}
    answer = client.post("/beta/chat/completions", json=body).json()
    prompt_tokens = len(byte_tokenizer().encode(f"<｜begin▁of▁sentence｜><｜User｜>Hi{end}"))
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    reply = answer["choices"][0]["message"]
    is_reasoning = end.endswith("Let")
    assert bool(reply.get("reasoning_content")) == is_reasoning
    assert ("reasoning_content" in reply) == (thinking == "enabled")
    assert answer["usage"].get("completion_tokens_details", {}).get("reasoning_tokens", 0) == (3 if is_reasoning else 0)
