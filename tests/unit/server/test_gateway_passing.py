"""What the gateway passes on: charged, unchanged where nobody reads it, judged as far as it can be, ended in time."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mock_upstream import MockUpstream, calls, says
from starlette.testclient import TestClient

from rorqual.ledger import Ledger
from rorqual.ledger import keys as stored
from rorqual.money import PICOS
from rorqual.referee import Answer, Asked, Options, Policy
from rorqual.referee import check as checking
from rorqual.server.accounts import Accounts, Tariff
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.gateway_usage import usage_of
from rorqual.server.gateway_wire import SseReader, Upstream
from rorqual.server.operations import Operations

FUNCTION: dict[str, Any] = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}},
                                                          "additionalProperties": False}}  # fmt: skip
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def client_of(answer: Any, mode: str = "enforce", **more: Any) -> TestClient:
    upstream = Upstream("http://mock", "sk-operators", transport=httpx2.MockTransport(answer))
    return TestClient(create_gateway(Gateway(upstream, Options(mode, Policy()), **more)))  # type: ignore[arg-type]


def completion(message: dict[str, Any], finish: str = "stop") -> Any:
    body = {"id": "u", "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}]}
    return lambda request: httpx2.Response(200, json=body)


def streamed(*deltas: dict[str, Any], finish: str = "stop", **more: Any) -> Any:
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None, **more}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    text = "".join(f"data: {json.dumps({'id': 'u', **chunk})}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return lambda request: httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})


def deltas(response: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [chunk["choices"][0]["delta"] for chunk in map(json.loads, lines) if chunk["choices"]]


# ---------------------------------------------------------------- charged


@pytest.mark.parametrize(
    ("path", "body", "told", "used"),
    [
        ("completions", {"prompt": "x" * 400}, {"usage": {"prompt_tokens": 70, "completion_tokens": 9}}, (70, 9)),
        ("completions", {"prompt": "x" * 400}, {"choices": [{"text": "y" * 400}]}, (100, 100)),
        ("embeddings", {"input": "x" * 400}, {"usage": {"prompt_tokens": 60, "total_tokens": 60}}, (60, 0)),
        ("embeddings", {"input": "x" * 400}, {"data": [{"embedding": [0.25] * 500}]}, (100, 0)),
    ],
)
def test_what_passes_through_spends_the_budget_and_ends_with_it(
    path: str, body: dict[str, Any], told: dict[str, Any], used: tuple[int, int], tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    secret = stored.add(ledger.database, "alice", budget=PICOS)
    operations = Operations(Accounts(ledger, tariff=Tariff(like="deepseek-v4-flash")))
    seen: list[Any] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json=told)

    with client_of(answer, operations=operations) as client:
        headers = {"authorization": f"Bearer {secret}"}
        sent = {"model": "m", "max_tokens": 200, **body}
        assert client.post(f"/v1/{path}", json=sent, headers=headers).json() == told
        (row,) = ledger.summary(["key"])
        near = pytest.approx(used, rel=0.35) if "usage" not in told else used
        assert (row["prompt_tokens"], row["completion_tokens"]) == near and row["cost"] > 0
        assert client.get("/v1/models", headers=headers).status_code == 200
        much = client.post(f"/v1/{path}", json={**sent, "max_tokens": 10**9}, headers=headers)
        assert much.status_code == 402 and len(seen) == 2


def test_a_stream_without_usage_is_charged_by_its_events(tmp_path: Path) -> None:
    for mode, path in (("observe", "/v1/chat/completions"), ("observe", "/v1/completions")):
        ledger = Ledger(tmp_path / f"{path.count('chat')}.sqlite")
        operations = Operations(Accounts(ledger, tariff=Tariff(like="deepseek-v4-flash")))
        answer = streamed(*({"content": "word "} for _ in range(20)))
        with client_of(answer, mode, operations=operations) as client:
            assert client.post(path, json={**ASK, "prompt": "x", "stream": True}).status_code == 200
        operations.accounts._writer.shutdown()  # type: ignore[union-attr]
        (row,) = ledger.summary(["model"])
        assert 20 <= row["completion_tokens"] <= 23 and row["cost"] > 0
        ledger.close()


def test_usage_in_each_apis_words() -> None:
    chat = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert usage_of({"usage": chat}) == chat
    responses = {"input_tokens": 9, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 4}}
    expected = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_cache_hit_tokens": 4}
    assert usage_of({"type": "response.completed", "response": {"usage": responses}}) == expected
    claude = {"input_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 1, "output_tokens": 3}
    assert usage_of({"message": {"usage": claude}}) == {**expected, "prompt_cache_hit_tokens": 3}
    assert usage_of({"usage": None}) is None and usage_of([1]) is None


# ---------------------------------------------------------------- judged as far as it can be


@pytest.mark.parametrize("stream", [False, True])
def test_the_older_functions_are_judged_and_answered_in_their_shape(stream: bool) -> None:
    call = {"name": "add", "arguments": '{"a": 1'}
    message = {"content": None, "function_call": call}
    answer = streamed(message, finish="function_call") if stream else completion(message, "function_call")
    asked = {**ASK, "functions": [FUNCTION], "function_call": "auto", "stream": stream}
    with client_of(answer) as client:
        response = client.post("/v1/chat/completions", json=asked)
        assert response.headers["x-referee-verdict"] == "repaired", response.text
        if stream:
            (made,) = [one["function_call"] for one in deltas(response) if "function_call" in one]
            assert not [one for one in deltas(response) if "tool_calls" in one]
        else:
            choice = response.json()["choices"][0]
            assert choice["finish_reason"] == "function_call" and "tool_calls" not in choice["message"]
            made = choice["message"]["function_call"]
        assert made == {"name": "add", "arguments": '{"a": 1}'}
    wrong = {"content": None, "function_call": {"name": "subtract", "arguments": "{}"}}
    with client_of(completion(wrong, "function_call")) as client:
        assert client.post("/v1/chat/completions", json={**asked, "stream": False}).status_code == 422


@pytest.mark.parametrize("stream", [False, True])
def test_a_custom_tools_text_passes_and_its_name_is_judged(stream: bool) -> None:
    call = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "*** {no JSON"}}
    message = {"content": None, "tool_calls": [{**call, "index": 0} if stream else call]}
    answer = streamed(message, finish="tool_calls") if stream else completion(message, "tool_calls")
    tools = [{"type": "custom", "custom": {"name": "patch"}}, {"type": "function", "function": FUNCTION}]
    with client_of(answer) as client:
        response = client.post("/v1/chat/completions", json={**ASK, "tools": tools, "stream": stream})
        assert response.status_code == 200 and '"not_judged"' in response.text
        made = deltas(response) if stream else [response.json()["choices"][0]["message"]]
        (got,) = [one["tool_calls"][0] for one in made if one.get("tool_calls")]
        assert {name: got[name] for name in call} == call
        assert client.post("/v1/chat/completions", json={**ASK, "tools": tools[1:]}).status_code >= 400


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_in_sound_passes_and_says_that_nobody_listened(stream: bool) -> None:
    audio = {"id": "a1", "data": "UklGRg==", "transcript": "Hello."}
    answer = streamed({"audio": audio}, {"audio": {"data": "AAAA"}}) if stream else completion({"audio": audio})
    with client_of(answer) as client:
        response = client.post("/v1/chat/completions", json={**ASK, "stream": stream, "modalities": ["audio"]})
        assert response.headers["x-referee-verdict"] == "pass" and "was not looked at" in response.text
        if stream:
            assert [one["audio"] for one in deltas(response) if "audio" in one] == [audio, {"data": "AAAA"}]
        else:
            assert response.json()["choices"][0]["message"]["audio"] == audio


@pytest.mark.parametrize("mode", ["annotate", "enforce"])
def test_deltas_nobody_reads_and_log_probabilities_travel_on(mode: str) -> None:
    details = [{"reasoning_details": [{"type": "x", "data": n}], "reasoning": f"R{n}."} for n in range(2)]
    entry = {"content": [{"token": "Hello", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
    answer = streamed(*details, {"content": "Hello", "annotations": [1]}, logprobs=entry)
    with client_of(answer, mode) as client:
        response = client.post("/v1/chat/completions", json={**ASK, "stream": True, "logprobs": True})
    got = deltas(response)
    assert [one["reasoning_details"] for one in got if "reasoning_details" in one] == [
        one["reasoning_details"] for one in details
    ]
    assert [one["annotations"] for one in got if "annotations" in one] == [[1]]
    assert "".join(one.get("reasoning") or "" for one in got) == "R0.R1." and "reasoning_content" not in response.text
    assert response.text.count('"token":"Hello"') >= 1


# ---------------------------------------------------------------- ended, and out of others' way


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/completions"])
@pytest.mark.parametrize("mode", ["observe", "annotate", "enforce"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_leaves_no_task_and_no_work_upstream(path: str, mode: str, stream: bool) -> None:
    async def play() -> None:
        asked, ended, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def lines() -> AsyncIterator[bytes]:
            try:
                asked.set()
                await asyncio.Event().wait()
                yield b""
            finally:
                ended.set()

        async def answer(request: httpx2.Request) -> httpx2.Response:
            kind = "text/event-stream" if stream else "application/json"
            return httpx2.Response(200, content=lines(), headers={"content-type": kind})

        gateway = Gateway(Upstream("http://mock", transport=httpx2.MockTransport(answer)), Options(mode, Policy()))  # type: ignore[arg-type]
        app = create_gateway(gateway)
        body = json.dumps({**ASK, "prompt": "x", "stream": stream} if path == "/v1/completions" else
                          {**ASK, "stream": stream}).encode()  # fmt: skip
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None: ...

        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
            "server": ("gateway", 80), "client": ("client", 1), "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        serving = asyncio.ensure_future(app(scope, receive, send))
        await asyncio.wait_for(asked.wait(), 60)
        gone.set()
        await asyncio.wait({serving}, timeout=60)
        assert serving.done() and ended.is_set()
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await gateway.close()

    asyncio.run(play())


def test_big_checks_run_in_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    real = checking.check_answer

    def noted(*given: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return real(*given)

    monkeypatch.setattr(checking, "check_answer", noted)
    for text in ("short", "long " * checking.BIG):
        asked = Asked({"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]})
        asyncio.run(checking.check_beside(asked, Answer("Hi", finish="stop"), Options("enforce", Policy())))
    assert threads == [True, False]


def test_a_long_event_in_small_pieces() -> None:
    line = b"data: " + b"x" * 400_000 + b"\r\n\r\ndata: y\n\n"
    reader = SseReader()
    found = [data for at in range(len(line)) for data in reader.feed(line[at : at + 1])]
    assert [len(data) for data in found] == [400_000, 1]


def test_an_upstream_without_the_path_is_asked_in_chat_completions() -> None:
    mock = MockUpstream([says("Hello.", reasoning="Be kind."), says("", calls=[calls("add", '{"a": 1}')])])
    app = httpx2.ASGITransport(app=mock.app(), raise_app_exceptions=False)
    gateway = Gateway(Upstream("http://mock", transport=app), Options("observe", Policy()))
    with TestClient(create_gateway(gateway)) as client:
        body = {**ASK, "max_tokens": 10}
        first = client.post("/v1/messages", json=body)
        assert [block["type"] for block in first.json()["content"]] == ["thinking", "text"]
        assert "referee" not in first.json() and "x-referee-verdict" not in first.headers
        assert client.post("/v1/responses", json={"model": "m", "input": "Hi"}).json()["status"] == "completed"
        assert gateway.verdicts.total() == 2
        assert client.post("/v1/messages", json={**body, "nonsense": 1}).status_code == 400


def test_an_upstream_with_the_path_is_passed_on_to_as_it_is() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        assert request.url.path in ("/v1/messages", "/v1/messages/count_tokens") and b"referee" not in request.content
        return httpx2.Response(200, json={"type": "message", "own": request.url.path})

    with client_of(answer, "observe") as client:
        body = {**ASK, "anything": 1, "referee": {"mode": "off"}}
        assert client.post("/v1/messages", json=body).json() == {"type": "message", "own": "/v1/messages"}
        assert client.post("/v1/messages/count_tokens", json=ASK).json()["own"] == "/v1/messages/count_tokens"
