"""POST /anthropic/v1/messages: shapes of answers, order of events, failures, counting, models."""

import json
import re
from typing import Any

import pytest
from messages_stream import check_stream, events_of
from mock_model import ScriptModel, byte_tokenizer
from scripted_api import PROMPTS
from starlette.testclient import TestClient

from rorqual.config import ModelConfig
from rorqual.engine import Engine
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.model import Transformer
from rorqual.server import ServedModel, create_app

CLOCK: Any = {"name": "clock", "input_schema": {"type": "object"}}
OFF: Any = {"thinking": {"type": "disabled"}}


def ask(client: TestClient, text: Any = "Hi", path: str = "/anthropic/v1/messages", **fields: Any) -> Any:
    body = {"model": "minke", "max_tokens": 200, "messages": [{"role": "user", "content": text}], **fields}
    return client.post(path, json=body)


def test_a_whole_answer(client: TestClient) -> None:
    body = ask(client, system="Be brief.").json()
    assert PROMPTS[-1].endswith("Be brief.<｜User｜>Hi<｜Assistant｜><think>")
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", body["id"])
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "minke")
    assert body["content"] == [
        {"type": "thinking", "thinking": "Let me think.", "signature": body["id"]},
        {"type": "text", "text": "Hello 🐋!"},
    ]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    reasoning, answer = len("Let me think.") + 1, len("Hello 🐋!".encode()) + 1
    assert body["usage"] == {
        "input_tokens": 4 + len("Be brief.") + len("Hi"),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": reasoning + answer,
        "output_tokens_details": {"thinking_tokens": reasoning},
        "service_tier": "standard",
    }
    assert body["exactness"]["level"] == "unknown" and body["rorqual"]["model"] == "minke"


@pytest.mark.parametrize("path", ["/anthropic/v1/messages", "/anthropic/messages", "/v1/messages?beta=true"])
def test_every_path_answers(client: TestClient, path: str) -> None:
    body = ask(client, path=path, **OFF).json()
    assert body["content"] == [{"type": "text", "text": "Hello 🐋!"}]
    assert "output_tokens_details" not in body["usage"]
    counted = client.post(path.replace("messages", "messages/count_tokens", 1), json={"model": "m", "messages": []})
    assert refused_here(counted)["code"] == "model_not_found"


@pytest.mark.parametrize("fields", [{}, OFF, {"tools": [CLOCK]}, {"max_tokens": 5}, {"stop_sequences": ["lo", "x"]}])
def test_a_stream_adds_up_to_the_whole_answer(client: TestClient, fields: Any) -> None:
    whole = ask(client, "call the clock", seed=3, **fields).json()
    streamed = check_stream(events_of(ask(client, "call the clock", seed=3, stream=True, **fields)))
    for block in streamed["content"]:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"])
    for message in (whole, streamed):
        message.pop("rorqual")
        for block in message["content"]:
            block.pop("id", None)
            block.pop("signature", None)
    assert {**streamed, "id": None} == {**whole, "id": None}


def test_a_call(client: TestClient) -> None:
    body = ask(client, "call the clock", tools=[CLOCK]).json()
    thinking, call = body["content"]
    assert (body["stop_reason"], thinking["type"]) == ("tool_use", "thinking")
    assert re.fullmatch(r"call_00_[A-Za-z0-9]{24}", call["id"])
    assert {**call, "id": None} == {"type": "tool_use", "id": None, "name": "clock", "input": {"zone": "UTC"}}


def test_a_call_can_be_forced(client: TestClient) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance (server extra)")
    tools, named = [{"name": "stop", "input_schema": {"type": "object"}}], {"type": "tool", "name": "stop"}
    for choice, fields in (({"type": "any"}, {}), ({"type": "any"}, OFF), (named, OFF)):
        response = ask(client, tools=tools, tool_choice=choice, temperature=0, max_tokens=150, stream=True, **fields)
        blocks = check_stream(events_of(response))["content"]  # a script that wants to greet fills the call for ever
        assert [block["type"] for block in blocks] == (["tool_use"] if fields else ["thinking", "tool_use"])
        assert blocks[-1]["name"] == "stop"
    error = refused_here(ask(client, tools=tools, tool_choice=named))
    assert error["message"].startswith("Thinking mode does not support this tool_choice")


def test_a_schema_can_be_asked_for(client: TestClient) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance (server extra)")
    schema = {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"], "additionalProperties": False}
    body = ask(client, output_config={"format": {"type": "json_schema", "schema": schema}}, **OFF).json()
    assert json.loads(body["content"][0]["text"]) == {"a": 7}


def test_why_an_answer_ended(client: TestClient) -> None:
    body = ask(client, max_tokens=5).json()
    assert body["stop_reason"] == "max_tokens"
    assert body["content"] == [{"type": "thinking", "thinking": "Let m", "signature": body["id"]}]
    body = ask(client, stop_sequences=["!", "lo"], **OFF).json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "lo")
    assert body["content"] == [{"type": "text", "text": "Hel"}]
    body = ask(client, "call the clock", tools=[CLOCK], max_tokens=80).json()
    assert body["stop_reason"] == "max_tokens", "inside the call, which is no part of the answer"
    assert [block["type"] for block in body["content"]] == ["thinking"]


def test_thinking_can_be_left_out_of_the_answer(client: TestClient) -> None:
    fields = {"thinking": {"type": "adaptive", "display": "omitted"}}
    for message in (
        ask(client, **fields).json(),
        check_stream(events_of(ask(client, stream=True, **fields))),
    ):
        assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": message["id"]}
        assert message["usage"]["output_tokens_details"]["thinking_tokens"] == len("Let me think.") + 1


def test_edits_of_the_history_are_not_applied_and_the_answer_says_so(client: TestClient) -> None:
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    none = {"applied_edits": []}
    assert ask(client, context_management=edits).json()["context_management"] == none
    streamed = check_stream(events_of(ask(client, context_management=edits, stream=True)))
    assert streamed["context_management"] == none


def test_the_cache_is_told_of_from_the_first_event_on() -> None:
    tokenizer = byte_tokenizer()
    model = Transformer(ModelConfig.preset("minke").replace(vocab_size=tokenizer.vocab_size), seed=1)
    with Engine(model, tokenizer, prefix_cache=PrefixCache(model)) as engine:
        client = TestClient(create_app(engine, "minke"))
        question = "w" * 700
        first = ask(client, question, max_tokens=2, seed=1).json()["usage"]
        assert first["cache_read_input_tokens"] == 0
        message = check_stream(events_of(ask(client, question, max_tokens=2, seed=1, stream=True)))
    usage = message["usage"]
    assert usage["cache_read_input_tokens"] >= 512
    assert usage["cache_read_input_tokens"] + usage["input_tokens"] == first["input_tokens"]
    assert message["rorqual"]["cache"]["cached_tokens"] == usage["cache_read_input_tokens"]


def test_a_waiting_stream_is_kept_alive() -> None:
    model = ScriptModel(lambda prompt: "Hm</think>late" if prompt.endswith("<think>") else "late")
    model.step_s = 0.06
    with Engine(model, byte_tokenizer()) as engine:
        response = ask(TestClient(create_app(engine, keep_alive_s=0.02)), stream=True)
    assert response.text.startswith(": keep-alive\n\n"), "nothing is known of the message yet"
    events = events_of(response)
    assert {"type": "ping"} in events and events[0]["type"] == "message_start"
    assert check_stream(events)["content"][-1]["text"] == "late"


def test_failures_reach_the_client() -> None:
    def fail(prompt: str) -> str:
        raise ValueError("boom")

    with Engine(ScriptModel(fail), byte_tokenizer()) as engine:
        client = TestClient(create_app(engine, "minke"), raise_server_exceptions=False)
        whole = ask(client)
        assert whole.status_code == 500 and whole.json()["type"] == "error"
        assert "boom" in whole.json()["error"]["message"]
        [event] = events_of(ask(client, stream=True))
        assert event["type"] == "error" and "boom" in event["error"]["message"]


def test_a_budget_beyond_the_context_is_lowered(engine: Engine, client: TestClient) -> None:
    assert ask(client, max_tokens=10**9, **OFF).json()["stop_reason"] == "end_turn"
    response = ask(client, "x" * engine.context_limit)
    assert refused_here(response)["message"].startswith("prompt is too long: This model's maximum context length is")
    assert refused_here(ask(client, max_tokens=0))["param"] == "max_tokens"


def refused_here(response: Any, status: int = 400) -> Any:
    """Errors are those of the other dialects, with the mark of this one."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"} and body["type"] == "error"
    error = body["error"]
    assert set(error) - {"details"} == {"message", "type", "param", "code"}
    assert ("details" in error) == (error["code"] != error["type"])
    assert error.get("details", {"error_code": error["code"]}) == {"error_code": error["code"]}
    return error


def test_tokens_are_counted_as_the_answer_counts_them(client: TestClient) -> None:
    history: list[Any] = [{"role": "user", "content": "call the clock"}]
    answered = ask(client, "call the clock", tools=[CLOCK]).json()
    call = answered["content"][1]
    history += [
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": "noon"}]},
    ]
    body = {"model": "minke", "messages": history, "tools": [CLOCK], "system": [{"type": "text", "text": "Hm."}]}
    counted = client.post("/v1/messages/count_tokens", json=body).json()
    usage = client.post("/v1/messages", json={**body, "max_tokens": 10}).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert "Let me think.</think>" in PROMPTS[-1], "reasoning that was put back is counted"
    refused_here(client.post("/v1/messages/count_tokens", json={**body, "colour": 1}))


def test_models_have_anthropics_shape_for_anthropics_clients(engine: Engine) -> None:
    others = [ServedModel(name, engine) for name in ("b", "c", "d/e")]
    client = TestClient(create_app(engine, "a", others=others))
    page = client.get("/anthropic/v1/models").json()
    assert [model["id"] for model in page["data"]] == ["a", "b", "c", "d/e"]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "a", "d/e")
    assert page["data"][0]["type"] == "model" and page["data"][0]["max_input_tokens"] == engine.context_limit
    assert client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json() == page
    assert client.get("/v1/models").json()["object"] == "list"

    def ids(**query: Any) -> tuple[list[str], bool]:
        page = client.get("/anthropic/v1/models", params=query).json()
        return [model["id"] for model in page["data"]], page["has_more"]

    assert ids(limit=2) == (["a", "b"], True)
    assert ids(limit=2, after_id="b") == (["c", "d/e"], False)
    assert ids(limit=2, before_id="d/e") == (["b", "c"], True)
    assert ids(limit=2, before_id="c") == (["a", "b"], False)
    assert ids(after_id="d/e") == ([], False)
    assert client.get("/anthropic/v1/models/d/e").json() == page["data"][3]
    assert refused_here(client.get("/anthropic/v1/models/x"), 404)["code"] == "model_not_found"
    for query in ({"limit": 0}, {"limit": "many"}, {"after_id": "x"}, {"before_id": "x"}):
        assert refused_here(client.get("/anthropic/v1/models", params=query))["param"] in query


def test_names_of_claude_stand_for_the_models_served(engine: Engine) -> None:
    others = [ServedModel("deepseek-v4-pro", engine)]
    client = TestClient(create_app(engine, "deepseek-v4-flash", others=others))
    for name, served in {
        "claude-opus-4-5-20251101": "deepseek-v4-pro",
        "claude-sonnet-4-5-20250929[1m]": "deepseek-v4-flash",
        "claude-haiku-4-5": "deepseek-v4-flash",
        "deepseek-v4-pro": "deepseek-v4-pro",
    }.items():
        body = ask(client, model=name, **OFF).json()
        assert (body["model"], body["rorqual"]["model"]) == (name, served)
    assert refused_here(ask(client, model="gpt-4"))["param"] == "model"


def test_probes_find_something(client: TestClient) -> None:
    assert client.head("/anthropic").status_code == 200
    assert client.get("/anthropic").json()["messages"] == "/anthropic/v1/messages"
