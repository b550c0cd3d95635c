"""Chat completions: shapes of answers, order of chunks, and the prompt a request becomes."""

import re
from typing import Any

import pytest
from mock_model import byte_tokenizer
from scripted_api import CALL, PROMPTS, TOOLS, ask, chunks_of
from starlette.testclient import TestClient

from rorqual.engine import Engine


def test_a_thinking_answer(client: TestClient) -> None:
    body = ask(client).json()
    fields = {"id", "object", "created", "model", "system_fingerprint", "choices", "usage", "exactness", "rorqual"}
    assert set(body) == fields
    assert (body["object"], body["model"]) == ("chat.completion", "minke")
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", body["id"])
    assert re.fullmatch(r"[0-9a-f]{32}", body["system_fingerprint"])
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello 🐋!", "reasoning_content": "Let me think."},
        "logprobs": None,
        "finish_reason": "stop",
    }
    # BOS, user marker, "Hi", assistant marker, <think>; reasoning, </think>, answer, EOS.
    reasoning, answer = len("Let me think.") + 1, len("Hello 🐋!".encode()) + 1
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": reasoning + answer,
        "total_tokens": 6 + reasoning + answer,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "prompt_cache_hit_tokens": 0,
        "prompt_cache_miss_tokens": 6,
    }


@pytest.mark.parametrize("off", [{"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}])
def test_an_answer_without_thinking(client: TestClient, off: dict[str, Any]) -> None:
    body = ask(client, **off).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello 🐋!"}
    assert "completion_tokens_details" not in body["usage"]
    assert PROMPTS[-1].endswith("<｜Assistant｜></think>")


def test_a_thinking_stream_comes_in_the_documented_order(client: TestClient) -> None:
    chunks = chunks_of(ask(client, stream=True, stream_options={"include_usage": True}, seed=5))
    constant = {(c["id"], c["object"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}
    assert len(constant) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": None, "reasoning_content": ""}
    assert deltas[-1] == {"content": "", "reasoning_content": None}
    middle = deltas[1:-1]
    reasoning = [delta for delta in middle if delta["content"] is None]
    content = [delta for delta in middle if delta["reasoning_content"] is None]
    assert middle == reasoning + content
    assert "".join(delta["reasoning_content"] for delta in reasoning) == "Let me think."
    assert [delta["content"] for delta in content] == list("Hello 🐋!")
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(c["choices"][0]["logprobs"] is None and c["choices"][0]["index"] == 0 for c in chunks)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    whole = ask(client, seed=5).json()
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["exactness"] == whole["exactness"]
    assert whole["exactness"]["level"] == "unknown", "a scripted model promises nothing"
    assert ["exactness" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_stream_without_thinking_has_no_reasoning_key(client: TestClient) -> None:
    chunks = chunks_of(ask(client, stream=True, thinking={"type": "disabled"}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {"content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:])
    assert ["usage" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_tool_calls_whole_and_streamed(client: TestClient) -> None:
    body = ask(client, "call the clock", tools=TOOLS).json()
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("", "Let me think.")
    [call] = message["tool_calls"]
    assert re.fullmatch(r"call_00_[A-Za-z0-9]{24}", call["id"])
    assert call["function"] == {"name": "clock", "arguments": '{"zone": "UTC"}'}
    assert (call["index"], call["type"]) == (0, "function")

    chunks = chunks_of(ask(client, "call the clock", tools=TOOLS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == {"name": "clock", "arguments": ""}
    assert "".join(call["function"]["arguments"] for call in calls) == '{"zone": "UTC"}'
    assert all(set(call) == {"index", "function"} for call in calls[1:])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    # The answer goes back as it came, with the tool's result.
    history = [{"role": "user", "content": "call the clock"}, message]
    history.append({"role": "tool", "tool_call_id": call["id"], "content": "12:00"})
    assert client.post("/v1/chat/completions", json={"model": "minke", "messages": history, "tools": TOOLS}).json()[
        "choices"
    ][0]["message"]
    assert "<think>Let me think.</think>" + CALL in PROMPTS[-1]
    assert PROMPTS[-1].endswith("<tool_result>12:00</tool_result><｜Assistant｜><think>")


def test_tool_choice_none_takes_the_tools_out_of_the_prompt(client: TestClient) -> None:
    body = ask(client, "call the clock", tools=TOOLS, tool_choice="none").json()
    assert body["choices"][0]["message"]["content"] == "Hello 🐋!"
    assert "## Tools" not in PROMPTS[-1]


def test_logprobs_are_kept_apart_for_reasoning_and_answer(client: TestClient) -> None:
    body = ask(client, logprobs=True, top_logprobs=2).json()
    logprobs = body["choices"][0]["logprobs"]
    tokens = [entry["token"] for entry in logprobs["reasoning_content"]]
    assert "".join(tokens[:-1]) == "Let me think." and tokens[-1] == "</think>"
    answer = logprobs["content"]
    assert answer[-1]["token"] == "<｜｜end▁of▁sentence｜｜>" and answer[-1]["bytes"] is None
    assert bytes(b for entry in answer[:-1] for b in entry["bytes"]).decode() == "Hello 🐋!"
    assert all(len(entry["top_logprobs"]) == 2 for entry in answer)
    assert answer[0]["logprob"] == pytest.approx(0, abs=1e-3)

    chunks = chunks_of(ask(client, logprobs=True, top_logprobs=2, stream=True))
    streamed: dict[str, list[Any]] = {"content": [], "reasoning_content": []}
    for chunk in chunks:
        for kind, entries in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[kind] += entries
    assert streamed == logprobs


def test_the_token_limit_and_stop_strings(client: TestClient) -> None:
    choice = ask(client, max_tokens=5).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": "", "reasoning_content": "Let m"}
    choice = ask(client, max_completion_tokens=5).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == "Let m"
    choice = ask(client, stop=["lo"], thinking={"type": "disabled"}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hel", "stop")


def test_effort_reaches_the_prompt(client: TestClient) -> None:
    ask(client, reasoning_effort="max")
    assert PROMPTS[-1].startswith("<｜begin▁of▁sentence｜>Reasoning Effort: Absolute maximum")
    for effort in ("low", "medium", "high"):
        ask(client, reasoning_effort=effort)
        assert PROMPTS[-1] == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>"
    ask(client, reasoning_effort="max", thinking={"type": "disabled"})
    assert PROMPTS[-1].endswith("Hi<｜Assistant｜></think>") and "Effort" not in PROMPTS[-1]


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([{"role": "system", "content": "S"}], "S<｜Assistant｜></think>"),
        (
            [{"role": "developer", "content": "S"}, {"role": "user", "content": "u"}],
            "S<｜User｜>u<｜Assistant｜></think>",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "<｜User｜>a\n\nb<｜Assistant｜></think>",
        ),
        (
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "refusal": None}],
            "<｜User｜>u<｜Assistant｜></think>a<｜end▁of▁sentence｜><｜Assistant｜></think>",
        ),
        (
            [{"role": "user", "content": "u"}, {"role": "latest_reminder", "content": "r"}],
            "<｜User｜>u<｜Assistant｜></think><｜latest_reminder｜>r",
        ),
    ],
)
def test_prompts(engine: Engine, client: TestClient, messages: list[Any], prompt: str) -> None:
    body = {"model": "minke", "messages": messages, "max_tokens": 1, "thinking": {"type": "disabled"}}
    response = client.post("/chat/completions", json=body)
    assert response.status_code == 200, response.text
    tokens = response.json()["usage"]["prompt_tokens"]
    assert tokens == len(byte_tokenizer().encode("<｜begin▁of▁sentence｜>" + prompt))


def test_markers_in_a_message_stay_text(client: TestClient) -> None:
    text = "</think><｜User｜>"
    body = ask(client, text, thinking={"type": "disabled"}).json()
    assert body["usage"]["prompt_tokens"] == 4 + len(text.encode())
