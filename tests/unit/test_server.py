"""The HTTP API over a scripted model: shapes, order of chunks, refusals."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from mock_model import HashModel, ScriptModel, byte_tokenizer
from starlette.testclient import TestClient
from torch import Tensor

from rorqual.engine import Engine
from rorqual.errors import ConfigError
from rorqual.server import ServedModel, create_app
from rorqual.server.guard import Guard
from rorqual.server.run import bind

CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="clock">\n'
    '<｜DSML｜parameter name="zone" string="true">UTC</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
PROMPTS: list[str] = []


def reply(prompt: str) -> str:
    PROMPTS.append(prompt)
    if "<｜fim▁end｜>" in prompt:
        return "    return a + b"
    answer = CALL if "call the clock" in prompt and "## Tools" in prompt else "Hello 🐋!"
    return f"Let me think.</think>{answer}" if prompt.endswith("<think>") else answer


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, "minke"), raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, text: str = "Hi", **fields: Any) -> Any:
    body = {"model": "minke", "messages": [{"role": "user", "content": text}], **fields}
    return client.post("/v1/chat/completions", json=body)


def chunks_of(response: Any) -> list[Any]:
    """The stream's events; checks that it is well-formed and closed."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_thinking_answer(client: TestClient) -> None:
    body = ask(client).json()
    assert set(body) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
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
    chunks = chunks_of(ask(client, stream=True, stream_options={"include_usage": True}))
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
    assert chunks[-1]["usage"] == ask(client).json()["usage"]


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


def refused(response: Any, status: int = 400) -> Any:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


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
                ]
            },
            "messages[1].prefix",
            "not supported yet",
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
        ({"response_format": {"type": "json_object"}}, "response_format.type", "constrained decoding"),
        ({"reasoning_effort": "ultra"}, "reasoning_effort", "ultra"),
        ({"user_id": "no spaces"}, "user_id", "user_id"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", "constrained decoding"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "expected one of `none`, `auto`"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "other kinds"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]},
            "tools[0].function.strict",
            "strict",
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


def test_calls_need_their_results_and_their_reasoning(client: TestClient) -> None:
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


def test_fill_in_the_middle(client: TestClient) -> None:
    body = {"model": "minke", "prompt": "def add(a, b):\n", "suffix": "\nprint(add(1, 2))\n"}
    answer = client.post("/beta/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "    return a + b", "finish_reason": "stop", "logprobs": None}]
    assert PROMPTS[-1] == (
        "<｜begin▁of▁sentence｜><｜fim▁begin｜>def add(a, b):\n<｜fim▁hole｜>\nprint(add(1, 2))\n<｜fim▁end｜>"
    )
    assert answer["usage"]["prompt_tokens"] == len(byte_tokenizer().encode(PROMPTS[-1]))

    chunks = chunks_of(client.post("/beta/completions", json={**body, "stream": True, "echo": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == body["prompt"] + "    return a + b"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"] == answer["usage"]
    stopped = client.post("/v1/completions", json={**body, "stop": " + "}).json()
    assert stopped["choices"][0]["text"] == "    return a"


def test_half_a_surrogate_pair_is_refused_by_the_field_it_is_in(client: TestClient) -> None:
    for prompt, suffix, param in (("\ud800", "", "prompt"), ("", "\ud800", "suffix")):
        content = json.dumps({"model": "minke", "prompt": prompt, "suffix": suffix})
        response = client.post("/beta/completions", content=content, headers={"content-type": "application/json"})
        assert refused(response)["param"] == param


MARKERS = sorted(set(map(byte_tokenizer().decode, ([i] for i in byte_tokenizer().control_token_ids))))


class EagerModel(HashModel):
    """Wants nothing so much as control tokens; the end token least."""

    def logits_after(self, ids: list[int]) -> Tensor:
        logits = super().logits_after(ids)
        logits[sorted(byte_tokenizer().control_token_ids)] += 5.0
        logits[byte_tokenizer().eos_token_id] = -100.0
        return logits


def test_control_tokens_never_reach_an_answer() -> None:
    sampling = {"model": "minke", "max_tokens": 200, "seed": 1}
    with Engine(EagerModel(), byte_tokenizer()) as engine:
        client = TestClient(create_app(engine))
        for more in ({}, {"thinking": {"type": "disabled"}}):
            message = ask(client, **sampling, **more).json()["choices"][0]["message"]
            said = message["content"] + message.get("reasoning_content", "")
            assert len(said) > 50 and not [marker for marker in MARKERS if marker in said]
            assert bool(message["content"]) is True  # `</think>` may end the reasoning, nothing else
        for fields in ({"suffix": "b"}, {}, {"prompt": "<｜User｜>Hi<｜Assistant｜></think>"}):
            text = client.post("/beta/completions", json={"prompt": "a", **sampling, **fields}).json()["choices"][0][
                "text"
            ]
            assert len(text) > 50 and not [marker for marker in MARKERS if marker in text]
        raw = {"prompt": "<｜User｜>Hi<｜Assistant｜><think>", **sampling}
        text = client.post("/beta/completions", json=raw).json()["choices"][0]["text"]
        assert [marker for marker in MARKERS if marker in text] == ["</think>"]


def test_pieces_of_characters_keep_their_own_log_probability(client: TestClient) -> None:
    body = {"model": "minke", "prompt": "<｜Assistant｜></think>Hello ", "logprobs": 20, "max_tokens": 2}
    [choice] = client.post("/beta/completions", json=body).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["bytes:\\xf0", "bytes:\\x9f"]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [20, 20]


def test_echo_of_a_prompt_that_brings_its_own_begin_token(client: TestClient) -> None:
    begin = "<｜begin▁of▁sentence｜>"
    body = {"model": "minke", "prompt": f"{begin}ab", "echo": True, "logprobs": 1, "max_tokens": 1}
    logprobs = client.post("/beta/completions", json=body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][1:3] == ["a", "b"]
    assert logprobs["text_offset"] == [0, len(begin), len(begin) + 1, len(begin) + 2]


def test_a_client_that_leaves_gets_no_trace_in_the_log() -> None:
    model = ScriptModel(lambda prompt: "late")
    model.step_s = 0.05
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": json.dumps({"model": "minke", "prompt": "a"}).encode()}]

    async def receive() -> dict[str, Any]:
        return incoming.pop() if incoming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(b"content-type", b"application/json")], "scheme": "http", "server": ("127.0.0.1", 80)}
    with Engine(model, byte_tokenizer()) as engine:
        asyncio.run(create_app(engine)(scope, receive, send))
        assert sent[0]["status"] == 499
        deadline = time.monotonic() + 5
        while engine.occupancy() != (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.occupancy() == (0, 0)


def test_markers_around_the_gap_stay_text(client: TestClient) -> None:
    body = {"model": "minke", "prompt": "<｜fim▁hole｜>", "suffix": "", "max_tokens": 1}
    answer = client.post("/beta/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == 4 + len("<｜fim▁hole｜>".encode())


def test_completion_logprobs_with_echo_line_up(client: TestClient) -> None:
    prompt = "ab<｜Assistant｜></think>"
    body = {"model": "minke", "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 3}
    [choice] = client.post("/beta/completions", json=body).json()["choices"]
    assert choice["text"] == prompt + "Hel"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "<｜｜Assistant｜｜>", "</think>", "H", "e", "l"]
    assert logprobs["text_offset"] == [prompt.index("ab"), 1, 2, 15, 23, 24, 25]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 7
    assert logprobs["token_logprobs"][4] == pytest.approx(0, abs=1e-3)
    streamed: list[str] = []
    for chunk in chunks_of(client.post("/beta/completions", json={**body, "stream": True})):
        streamed += chunk["choices"][0]["logprobs"]["tokens"]
    assert streamed == logprobs["tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "x"}, "model"),
        ({"prompt": ["a"]}, "prompt"),
        ({"max_tokens": 4097}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x", "echo": True, "logprobs": 1}, "echo"),
        ({"n": 3}, "n"),
        ({"prompt": "a" * 17000}, "prompt"),
    ],
)
def test_completion_refusals(client: TestClient, fields: dict[str, Any], param: str) -> None:
    response = client.post("/beta/completions", json={"model": "minke", "prompt": "a", **fields})
    assert refused(response)["param"] == param


def test_models_health_page_and_paths(client: TestClient) -> None:
    listed = {"object": "list", "data": [{"id": "minke", "object": "model", "owned_by": "rorqual"}]}
    assert client.get("/v1/models").json() == listed == client.get("/models").json()
    health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r'(src|href)="(https?:)?//', page.text)
    for name in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
        assert client.get(name).status_code == 200
    assert "There is nothing at /nope" in refused(client.get("/nope"), 404)["message"]
    assert "does not take GET" in refused(client.get("/v1/chat/completions"), 405)["message"]
    assert refused(client.get("/static/../app.py"), 404)
    assert client.get("/openapi.json").status_code == 200
    for path in ("/", "/health"):
        assert client.head(path).status_code == 200
    assert client.get("/v1/models/minke").json() == listed["data"][0]
    assert refused(client.get("/v1/models/nope"), 404)["code"] == "model_not_found"


def test_two_models_are_told_apart(engine: Engine) -> None:
    with Engine(ScriptModel(lambda prompt: "other"), byte_tokenizer()) as second:
        others = [ServedModel("bryde", second)]
        client = TestClient(create_app(engine, "minke", others=others))
        off = {"thinking": {"type": "disabled"}}
        assert ask(client, model="bryde", **off).json()["choices"][0]["message"]["content"] == "other"
        error = refused(ask(client, model="x"))
        assert error["message"] == "The supported API model names are minke or bryde, but you passed x."
    with pytest.raises(ConfigError, match="own name"):
        create_app(engine, "minke", others=[ServedModel("minke", engine)])


def test_failures_of_the_model_reach_the_client() -> None:
    def fail(prompt: str) -> str:
        raise ValueError("boom")

    with Engine(ScriptModel(fail), byte_tokenizer()) as engine:
        client = TestClient(create_app(engine))
        error = refused(ask(client), 500)
        assert "ValueError: boom" in error["message"] and error["type"] == "server_error"
        response = ask(client, stream=True)
        assert "[DONE]" not in response.text
        last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert "boom" in last["error"]["message"]
    assert client.get("/health").status_code == 503
    assert refused(ask(client), 503)["message"].startswith("The engine is closed")


def test_waiting_streams_are_kept_alive() -> None:
    model = ScriptModel(lambda prompt: "late")
    model.step_s = 0.06
    with Engine(model, byte_tokenizer()) as engine:
        response = ask(TestClient(create_app(engine, keep_alive_s=0.02)), stream=True)
    assert ": keep-alive\n\n" in response.text
    assert chunks_of(response)[-1]["choices"][0]["finish_reason"]


def test_foreign_hosts_and_large_bodies_are_refused(engine: Engine) -> None:
    client = TestClient(create_app(engine, allowed_hosts=["127.0.0.1", "[::1]"]))
    for host in ("127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert refused(client.get("/health", headers={"host": host}), 403)
    small = TestClient(Guard(create_app(engine), max_body_bytes=1000))
    assert "larger than 1000 bytes" in refused(ask(small, "x" * 2000), 413)["message"]
    response = small.post(
        "/v1/completions", content=iter([b" " * 600] * 3), headers={"content-type": "application/json"}
    )
    assert "larger than 1000 bytes" in refused(response, 413)["message"]


def test_an_address_in_use_is_explained() -> None:
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    try:
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*another program.*--port"):
            bind("127.0.0.1", port)
    finally:
        taken.close()
    with pytest.raises(ConfigError, match="no address belongs to that name") as unknown:
        bind("nosuch.invalid", 8000)
    assert "port" not in str(unknown.value)
    with pytest.raises(ConfigError, match="ports go from 0"):
        bind("127.0.0.1", 99999)
