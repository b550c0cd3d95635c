"""The service around the two endpoints: models, paths, failures, streams that wait, hosts, addresses."""

import asyncio
import json
import re
import time
from typing import Any

import pytest
from mock_model import ScriptModel, byte_tokenizer
from scripted_api import ask, chunks_of, refused
from starlette.testclient import TestClient

from rorqual.engine import Engine
from rorqual.errors import ConfigError
from rorqual.server import ServedModel, create_app
from rorqual.server.guard import Guard
from rorqual.server.listen import bind


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
