"""A server in front of another one: the same answers as in front of an engine, and what happens when that other fails.

The good upstream is a second server of ours on loopback. The bad ones are scripted; one of them speaks as vLLM does, as
far as its public protocol tells. vLLM and SGLang themselves are not run.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from live_server import live
from mock_model import ScriptModel, byte_tokenizer
from scripted_api import PROMPTS, TOOLS, ask, chunks_of, refused, reply
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.testclient import TestClient

from rorqual.engine import Engine
from rorqual.errors import ConfigError, RequestError
from rorqual.ledger import Ledger
from rorqual.ledger import keys as stored
from rorqual.money import PICOS, parse_amount
from rorqual.planner.prices import cost
from rorqual.server import create_app
from rorqual.server.accounts import Accounts, Tariff
from rorqual.server.operations import Operations
from rorqual.server.service import Behaviour
from rorqual.server.upstream import RemoteEngine
from rorqual.server.upstream_wire import Dialect, Link, connect
from rorqual.tokenizer.special import EOS


@contextmanager
def in_front_of(url: str, dialect: Dialect = "openai", patience_s: float = 20.0) -> Iterator[TestClient]:
    link = Link(url, "back", dialect, "secret", patience_s)
    config = ScriptModel(reply).cfg
    with (
        RemoteEngine(link, byte_tokenizer(), config, context_limit=4096) as engine,
        TestClient(create_app(engine, "minke"), raise_server_exceptions=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def front() -> Iterator[TestClient]:
    with (
        Engine(ScriptModel(reply), byte_tokenizer()) as engine,
        live(create_app(engine, "back")) as url,
        in_front_of(url) as client,
    ):
        yield client


# ---------------------------------------------------------------- the same as an engine

CASES: list[dict[str, Any]] = [
    {"text": "Hi"},
    {"text": "Hi", "thinking": {"type": "disabled"}},
    {"text": "Please call the clock", "tools": TOOLS},
    {"text": "Please call the clock", "tools": TOOLS, "thinking": {"type": "disabled"}},
    {"text": "Hi", "max_tokens": 7},
    {"text": "Hi", "stop": ["lo"], "thinking": {"type": "disabled"}},
    {"text": "say <｜User｜> and <think> as they are written"},
]


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_engine_itself(front: TestClient, client: TestClient, case: dict[str, Any]):
    answers, read = [], []
    for one in (client, front):
        PROMPTS.clear()
        answers.append(ask(one, **case).json())
        read.append(max(PROMPTS, key=len))
    here, there = answers
    assert read[0] == read[1]
    for body in (here, there):
        for call in body["choices"][0]["message"].get("tool_calls", []):
            call.pop("id")
    assert there["choices"] == here["choices"]
    usage = {key: here["usage"][key] for key in ("prompt_tokens", "completion_tokens", "completion_tokens_details")
             if key in here["usage"]}  # fmt: skip
    assert {key: there["usage"].get(key) for key in usage} == usage


def test_streams_of_all_dialects(front: TestClient, client: TestClient):
    def joined(one: TestClient) -> tuple[str, str, str]:
        chunks = chunks_of(ask(one, "Please call the clock", tools=TOOLS, stream=True))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        return (
            "".join(delta.get("reasoning_content") or "" for delta in deltas),
            "".join(c["function"]["arguments"] for delta in deltas for c in delta.get("tool_calls", [])),
            chunks[-1]["choices"][0]["finish_reason"],
        )

    assert joined(front) == joined(client) == ("Let me think.", '{"zone": "UTC"}', "tool_calls")
    messages = {"model": "minke", "max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]}
    spoken = front.post("/anthropic/v1/messages", json=messages).json()
    assert [part.get("thinking") or part["text"] for part in spoken["content"]] == ["Let me think.", "Hello 🐋!"]
    answered = front.post("/v1/responses", json={"model": "minke", "input": "Hi"}).json()
    assert answered["output"][-1]["content"][0]["text"] == "Hello 🐋!"
    filled = {"model": "minke", "prompt": "def add(a, b):\n", "suffix": "\n", "max_tokens": 32}
    assert front.post("/beta/completions", json=filled).json()["choices"][0]["text"] == "    return a + b"


def test_reasoning_that_a_client_drops_is_put_back(front: TestClient):
    question = {"role": "user", "content": "Please call the clock"}
    message = ask(front, question["content"], tools=TOOLS).json()["choices"][0]["message"]
    del message["reasoning_content"]
    call = message["tool_calls"][0]
    history = [question, message, {"role": "tool", "tool_call_id": call["id"], "content": "12:00"}]
    PROMPTS.clear()
    answer = front.post("/v1/chat/completions", json={"model": "minke", "messages": history, "tools": TOOLS}).json()
    assert answer["rorqual"]["continuity"] and "Let me think.</think>" in max(PROMPTS, key=len)


def test_what_an_upstream_cannot_do_is_refused_by_name(front: TestClient):
    PROMPTS.clear()
    assert refused(ask(front, logprobs=True))["param"] == "logprobs"
    told = refused(ask(front, "json", response_format={"type": "json_object"}))
    assert told["param"] == "response_format" and "runs on another server" in told["message"]
    forced = ask(front, tools=TOOLS, tool_choice="required", thinking={"type": "disabled"})
    assert refused(forced)["param"] == "tools"
    assert refused(ask(front, "x" * 5000))["code"] == "context_length_exceeded"
    assert not PROMPTS, "the upstream was asked"
    picks = front.get("/engine/picks", params={"request": ask(front).json()["rorqual"]["request"]})
    assert picks.status_code == 400
    view = front.get("/engine/view").json()["models"]["minke"]
    assert view["running"] == 0 and view["finished"]["stop"] >= 1 and view["steps"] == []
    assert "rorqual_sampled_tokens_total" in front.get("/metrics").text


def test_keys_aliases_and_costs_are_this_servers(tmp_path: Path):
    """What a request costs comes from the upstream's count, is in the answer and is taken from the key's budget."""
    upstream = Scripted()
    upstream.acts = [[text("Think</think>Hi"), text("!", "stop"), USAGE, DONE], JSONResponse({"error": "busy"}, 429)]
    ledger = Ledger(tmp_path / "ledger.sqlite")
    mine = stored.add(ledger.database, "ada", budget=PICOS)
    operations = Operations(accounts=Accounts(ledger, tariff=Tariff(like="deepseek-v4-pro")))
    with live(upstream.app) as url:
        link = Link(url, "back", "openai", "secret", 20.0)
        with (
            RemoteEngine(link, byte_tokenizer(), ScriptModel(reply).cfg, context_limit=4096) as engine,
            TestClient(
                create_app(engine, "minke", operations=operations, behaviour=Behaviour(aliases={"gpt-5": "minke"}))
            ) as client,
        ):
            assert ask(client).status_code == 401 and not upstream.bodies
            client.headers["authorization"] = f"Bearer {mine}"
            answer = ask(client, model="gpt-5").json()
            assert answer["model"] == "gpt-5" and upstream.bodies[0]["model"] == "back"
            (row,) = ledger.summary(["key", "model"])
            assert (row["key"], row["model"], row["completion_tokens"], row["hit_tokens"]) == ("ada", "minke", 5, 4)
            paid = cost(answer["usage"], "deepseek-v4-pro", datetime.now(UTC)).total
            assert row["cost"] == paid == parse_amount(answer["rorqual"]["cost"]["total"]) > 0
            assert refused(ask(client), 429)["type"] == "rate_limit_error"
            assert ledger.held("ada") == 0
            left = client.get("/user/balance").json()["balance_infos"][0]["total_balance"]
            assert parse_amount(left) == PICOS - paid
    operations.close()


# ---------------------------------------------------------------- upstreams that fail


class Scripted:
    """A completions server that does what `acts` says, one act a request; what it was sent is in `bodies`."""

    def __init__(self, owner: str = "someone") -> None:
        self.acts: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.gone = threading.Event()
        self.app = FastAPI()

        @self.app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": "back", "owned_by": owner, "max_model_len": 2048}]}

        @self.app.post("/v1/completions")
        async def completions(http: HttpRequest) -> Response:
            self.bodies.append(await http.json())
            assert http.headers["authorization"] == "Bearer secret"
            act = self.acts.pop(0)
            if isinstance(act, Response):
                return act
            return StreamingResponse(self._stream(act), media_type="text/event-stream")

    async def _stream(self, act: list[Any]) -> AsyncIterator[str]:
        try:
            for part in act:
                if part == "cut":
                    raise ConnectionError("the machine is gone")
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    yield part if isinstance(part, str) else f"data: {json.dumps(part)}\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise


def text(piece: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": piece, "finish_reason": finish, **more}]}


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
}
DONE = "data: [DONE]\n\n"


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, TestClient, str]]:
    upstream = Scripted()
    with live(upstream.app) as url, in_front_of(url, patience_s=0.5) as client:
        yield upstream, client, url


def test_a_connection_that_dies_in_the_middle(scripted: tuple[Scripted, TestClient, str]):
    upstream, client, url = scripted
    upstream.acts = [[text("Think</think>Hel"), text("lo"), "cut"]] * 2
    response = ask(client, stream=True)
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] != "[DONE]"
    parts = [json.loads(line) for line in lines]
    assert "".join(p["choices"][0]["delta"].get("content") or "" for p in parts[:-1]) == "Hello"
    error = parts[-1]["error"]
    assert error["type"] == "upstream_error" and url in error["message"] and "incomplete" in error["message"]
    assert url in refused(ask(client), 502)["message"]
    assert client.get("/health").json()["models"]["minke"]["running"] == 0


def test_other_ways_to_break_off(scripted: tuple[Scripted, TestClient, str]):
    upstream, client, url = scripted
    for act, words in (
        ([text("a"), DONE], "ended after 1 characters without saying why"),
        ([text("a"), {"error": {"message": "out of memory", "type": "x"}}], "out of memory"),
        ([text("a", "abort"), DONE], "it aborted the request"),
        (["data: {nonsense\n\n"], "no completion chunk"),
        ([{"choices": "?"}], "no completion chunk"),
        (
            [text("a"), {"choices": [], "usage": {"completion_tokens": "many"}}, DONE],
            "its usage counts are ('many', 0)",
        ),
        ([text("a"), {"choices": [], "usage": {"completion_tokens": -1}}, DONE], "its usage counts are (-1, 0)"),
        ([{"choices": [{"text": 7}]}, DONE], "its text is 7"),
    ):
        upstream.acts = [act]
        told = refused(ask(client), 502)
        assert words in told["message"] and url in told["message"] and told["type"] == "upstream_error"


def test_refusals_come_before_the_stream_and_keep_their_meaning(scripted: tuple[Scripted, TestClient, str]):
    upstream, client, url = scripted
    for status, expected, words in (
        (429, 429, "It is busy"),
        (400, 400, "too hot"),
        (401, 502, "RORQUAL_UPSTREAM_KEY"),
        (404, 502, "has no model 'back'"),
        (500, 502, "that server's log"),
        (503, 502, "that server's log"),
    ):
        headers = {"retry-after": "7"} if status == 429 else {}
        body = {"error": {"message": "too hot"}} if status != 500 else {"object": "error", "message": "too hot"}
        for stream in (False, True):
            upstream.acts = [JSONResponse(body, status, headers)]
            response = ask(client, stream=stream)
            told = refused(response, expected)
            assert words in told["message"] and "too hot" in told["message"] and url in told["message"]
            assert response.headers.get("retry-after") == ("7" if status == 429 else None)


def test_silence_is_given_up(scripted: tuple[Scripted, TestClient, str]):
    upstream, client, url = scripted
    upstream.acts = [[text("a"), 30.0]]
    began = time.monotonic()
    told = refused(ask(client), 504)
    assert "sent nothing for 0.5 s" in told["message"] and url in told["message"] and time.monotonic() - began < 10
    assert upstream.gone.wait(5), "the connection was kept open"


def test_a_deadline_ends_with_what_is_there(scripted: tuple[Scripted, TestClient, str]):
    upstream, client, _ = scripted
    upstream.acts = [[text("Ha</think>so far"), *[part for _ in range(50) for part in (0.1, text("."))]]]
    body = ask(client, rorqual={"timeout_s": 0.6}).json()
    assert body["choices"][0]["finish_reason"] == "length" and body["rorqual"]["ended"] == "timeout"
    assert body["choices"][0]["message"]["content"].startswith("so far")
    assert upstream.gone.wait(5)


def test_a_client_that_leaves_ends_it_upstream():
    upstream = Scripted()
    upstream.acts = [[text("Ha"), *[part for _ in range(100) for part in (0.1, text("."))]]]
    link_config = ScriptModel(reply).cfg
    with live(upstream.app) as url:
        link = Link(url, "back", "openai", "secret", 20.0)
        with RemoteEngine(link, byte_tokenizer(), link_config, context_limit=4096) as engine:
            request = engine.submit([1, 2, 3])
            events = iter(request)
            assert (
                next(events).text == "Ha" and engine.occupancy() == (1, 0) and engine.requests()[0].phase == "answering"
            )
            request.cancel()
            assert [event.finish_reason for event in events][-1] == "cancelled"
            assert upstream.gone.wait(5) and engine.occupancy() == (0, 0)


def test_closing_ends_what_runs_at_once():
    upstream = Scripted()
    upstream.acts = [[text("Ha"), 60.0]]
    with live(upstream.app) as url:
        engine = RemoteEngine(
            Link(url, "back", "openai", "secret", 120.0), byte_tokenizer(), ScriptModel(reply).cfg, context_limit=4096
        )
        request = engine.submit([1, 2, 3])
        events = iter(request)
        assert next(events).text == "Ha"
        began = time.monotonic()
        engine.close()
        engine.close()
        assert time.monotonic() - began < 5 and not engine.is_alive
        with pytest.raises(RequestError) as ended:
            next(events)
        assert ended.value.status == 503
        with pytest.raises(RequestError):
            engine.submit([1])


def test_an_upstream_that_is_not_there():
    upstream = Scripted()
    with live(upstream.app) as url:
        pass
    with in_front_of(url) as client:
        told = refused(ask(client), 502)
        assert "cannot be reached" in told["message"] and url in told["message"]
        health = client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
    with pytest.raises(ConfigError, match="no server answers at"):
        connect(url)
    with pytest.raises(ConfigError, match="is no address"):
        connect("http://[::1")


def test_what_is_said_to_each_kind_of_server(monkeypatch: pytest.MonkeyPatch):
    upstream = Scripted(owner="vllm")
    with live(upstream.app) as url:
        offer = connect(url, "secret")
        assert (offer.model, offer.dialect, offer.context) == ("back", "vllm", 2048)
        with pytest.raises(ConfigError, match="has no model 'other'; it serves back"):
            connect(url, model="other")
        with in_front_of(url, offer.dialect) as client:
            upstream.acts = [[text("Ha</think>Hi"), text(f"!{EOS}"), text("", "stop", stop_reason=None), USAGE, DONE]]
            body = ask(client, temperature=0.5, top_k=3, seed=11, user_id="me").json()
    assert body["choices"][0]["message"]["content"] == "Hi!" and body["usage"]["completion_tokens"] == 5
    assert body["usage"]["prompt_cache_hit_tokens"] == 4
    sent = upstream.bodies[0]
    assert byte_tokenizer().decode(sent["prompt"]) == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>"
    assert sent["skip_special_tokens"] is False and sent["spaces_between_special_tokens"] is False
    assert (sent["temperature"], sent["top_k"], sent["seed"], sent["model"]) == (0.5, 3, 11, "back")
    assert sent["cache_salt"] == sent["user"] and "me" not in sent["user"]


def test_token_ids_as_a_prompt(client: TestClient):
    ids = byte_tokenizer().encode("<｜User｜>Hi<｜Assistant｜></think>")
    PROMPTS.clear()
    body = client.post("/v1/completions", json={"model": "minke", "prompt": ids, "max_tokens": 30}).json()
    assert body["choices"][0]["text"] == "Hello 🐋!" and max(PROMPTS, key=len) == "<｜User｜>Hi<｜Assistant｜></think>"
    assert body["usage"]["prompt_tokens"] == len(ids)
    for wrong, param in (({"echo": True}, "prompt"), ({"suffix": "x"}, "prompt")):
        response = client.post("/v1/completions", json={"model": "minke", "prompt": ids, **wrong})
        assert refused(response)["param"] == param
    assert refused(client.post("/v1/completions", json={"model": "minke", "prompt": [10**6]}))["param"] == "prompt"
    assert refused(client.post("/v1/completions", json={"model": "minke", "prompt": []}))["param"] == "prompt"
