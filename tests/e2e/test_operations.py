"""A server run for others, as a process: it drains, ends at once when told twice, speaks TLS, and dies without loss."""

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from live_server import live
from mock_model import ScriptModel, byte_tokenizer

import rorqual
from rorqual.engine import Engine
from rorqual.ledger import Ledger, Limits
from rorqual.ledger import keys as stored
from rorqual.money import PICOS
from rorqual.server import create_app
from rorqual.server.accounts import Accounts, Tariff
from rorqual.server.operations import Operations

PRO = "deepseek-v4-pro"
CHAT = "/v1/chat/completions"
PROGRAM = """
import json, sys
from pathlib import Path
from mock_model import ScriptModel, byte_tokenizer
from rorqual.ledger import Ledger
from rorqual.server import run
from rorqual.server.accounts import Accounts, Tariff
from rorqual.server.operations import Operations
from rorqual.server.listen import Certificate
given = json.loads(sys.argv[1])
model = ScriptModel(lambda prompt: "done</think>" + "word " * given["words"])
model.step_s = 0.01
ledger = Ledger(Path(given["ledger"])) if "ledger" in given else None
run(
    model, byte_tokenizer(), port=0, drain_s=given.get("drain_s", 30),
    operations=Operations(Accounts(ledger, tariff=Tariff(like="deepseek-v4-pro"))),
    certificate=Certificate(Path(given["cert"]), Path(given["key"])) if "cert" in given else None,
    log_style="json", on_ready=lambda url: print(url, flush=True),
)
print("ended", flush=True)
"""


@contextmanager
def server(**given: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process; its answers have `words` words of five tokens, one token in 10 ms."""
    paths = [Path(rorqual.__file__).parents[1], Path(__file__).parents[1] / "support"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(given)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, process.communicate()[1]
        yield url, process
    finally:
        process.kill()
        process.wait()


def connect(url: str, context: ssl.SSLContext | None = None) -> http.client.HTTPConnection:
    place = urlsplit(url).netloc
    if context is not None:
        return http.client.HTTPSConnection(place, timeout=30, context=context)
    return http.client.HTTPConnection(place, timeout=30)


def ask(url: str, secret: str = "", **fields: Any) -> http.client.HTTPResponse:
    """The answer, of which only the head has been read."""
    body = {"model": "minke", "messages": [{"role": "user", "content": "Hi"}], "stream": True, **fields}
    headers = {"content-type": "application/json", "authorization": f"Bearer {secret}"}
    connection = connect(url)
    connection.request("POST", CHAT, json.dumps(body), headers)
    return connection.getresponse()


def get(url: str, path: str) -> tuple[int, Any]:
    connection = connect(url)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Chunks as they come, until the stream ends."""
    for raw in answer:
        line = raw.decode().strip()
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))
        elif line == "data: [DONE]":
            yield {"done": True}


def until_text(stream: Iterator[dict[str, Any]]) -> None:
    """Read on until the answer's text has begun."""
    for event in stream:
        if event["choices"][0]["delta"].get("content"):
            return


def ended(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Wait for a proper end; the request lines of its log."""
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("ended\n", 0), err
    lines = [json.loads(line) for line in err.splitlines()]
    assert not [line for line in lines if "error" in line], err
    return [line for line in lines if "endpoint" in line]


def test_a_drained_server_finishes_what_it_began(tmp_path: Path) -> None:
    with server(words=30, ledger=str(tmp_path / "ledger.sqlite")) as (url, process):
        answer = ask(url)
        stream = events(answer)
        until_text(stream)
        process.send_signal(signal.SIGTERM)
        wait_for_draining(url)
        refused = ask(url)
        assert (refused.status, refused.getheader("connection")) == (503, "close")
        assert json.loads(refused.read())["error"]["code"] == "draining"
        *_, last, done = stream
        assert last["choices"][0]["finish_reason"] == "stop" and done == {"done": True}
        lines = ended(process)
    finishes = [line.get("finish") for line in lines if line["endpoint"] == CHAT]
    assert finishes == [None, "stop"]  # the refusal ended first
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.summary(())[0]["completion_tokens"] == last["usage"]["completion_tokens"]
    ledger.close()


def pause(deadline: float) -> None:
    assert time.monotonic() < deadline
    time.sleep(0.01)


def wait_for_draining(url: str) -> None:
    deadline = time.monotonic() + 20
    while (health := get(url, "/health"))[0] == 200:
        pause(deadline)
    assert health == (503, health[1]) and health[1]["status"] == "draining"


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_what_outlasts_the_drain_ends_where_it_stands(tmp_path: Path, stream: bool) -> None:
    with server(words=3000, drain_s=0.5, ledger=str(tmp_path / "ledger.sqlite")) as (url, process):
        answers: list[Any] = []

        def read() -> None:
            answer = ask(url, stream=stream)
            answers.extend(events(answer) if stream else [json.loads(answer.read())])

        reader = threading.Thread(target=read)
        reader.start()
        deadline = time.monotonic() + 20
        while get(url, "/health")[1]["models"]["minke"]["running"] == 0:
            pause(deadline)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        reader.join(60)
        (line,) = [line for line in ended(process) if line["endpoint"] == CHAT]
        assert 0.4 < time.monotonic() - began < 60, "the whole answer, which takes 150 s, was waited for"
    if stream:
        assert answers.pop() == {"done": True}
    assert answers[-1]["choices"][0]["finish_reason"] == line["finish"] == "insufficient_system_resource"
    assert answers[-1]["usage"]["completion_tokens"] == line["completion_tokens"] > 3
    ledger = Ledger(tmp_path / "ledger.sqlite")
    (row,) = ledger.summary(["model"])
    assert row["completion_tokens"] == line["completion_tokens"] and row["cost"] > 0
    ledger.close()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/responses", "/beta/completions", "/anthropic/v1/messages"])
def test_every_dialect_says_that_it_was_cut(path: str) -> None:
    body: dict[str, Any] = {"model": "minke", "max_tokens": 400, "messages": [{"role": "user", "content": "Hi"}]}
    if path != "/anthropic/v1/messages":
        body = {"model": "minke", "input" if path == "/v1/responses" else "prompt": "<｜Assistant｜></think>"}
    with server(words=3000, drain_s=0.5) as (url, process):
        connection = connect(url)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        deadline = time.monotonic() + 20
        while get(url, "/health")[1]["models"]["minke"]["running"] == 0:
            pause(deadline)
        process.send_signal(signal.SIGTERM)
        answer = connection.getresponse()
        assert answer.status == 200
        reply = json.loads(answer.read())
        (line,) = [line for line in ended(process) if line["endpoint"] == path]
    assert line["finish"] == "insufficient_system_resource"
    said = reply.get("stop_reason") or reply.get("status") or reply["choices"][0]["finish_reason"]
    assert said in ("max_tokens", "incomplete", "insufficient_system_resource")


@pytest.mark.slow
def test_a_second_signal_ends_at_once() -> None:
    with server(words=3000, drain_s=600) as (url, process):
        stream = events(ask(url))
        until_text(stream)
        process.send_signal(signal.SIGTERM)
        wait_for_draining(url)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)  # and not the ten minutes it would have had
        with contextlib.suppress(http.client.HTTPException, OSError):
            assert {"done": True} not in list(stream)


@pytest.mark.slow
def test_a_killed_server_keeps_what_was_answered(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    secret = stored.add(ledger.database, "ada", budget=PICOS)
    with server(words=8, ledger=str(path)) as (url, process):
        told = []
        for _ in range(3):
            *_, last, done = events(ask(url, secret))
            assert done == {"done": True}
            told.append(last["usage"]["completion_tokens"])
        until_text(events(ask(url, secret)))
        assert ledger.held("ada") > 0
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert ledger.release_of_the_dead() == 1 and ledger.held("ada") == 0
    (row,) = ledger.summary(["key"])
    assert (row["requests"], row["failed"], row["completion_tokens"]) == (4, 1, sum(told))
    assert stored.named(ledger.database, "ada").balance == PICOS - row["cost"]
    ledger.close()


@pytest.mark.slow
def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    with server(words=3, cert=str(cert), key=str(key)) as (url, process):
        assert url.startswith("https://127.0.0.1:")
        connection = connect(url, ssl.create_default_context(cafile=str(cert)))
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(url, ssl.create_default_context()).request("GET", "/health")
        process.send_signal(signal.SIGTERM)
        connection.close()
        ended(process)


# In this process: races between clients, and clients that leave


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model = ScriptModel(lambda prompt: "done</think>" + "word " * 40)
    model.step_s = 0.002
    with Engine(model, byte_tokenizer()) as engine:
        yield engine


@pytest.mark.slow
def test_clients_that_race_never_overspend_together(engine: Engine, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    rich = stored.add(ledger.database, "rich")
    accounts = Accounts(ledger, is_open=False, tariff=Tariff(like=PRO))
    with live(create_app(engine, "minke", operations=Operations(accounts))) as url:
        *_, last, _ = events(ask(url, rich, max_tokens=300))
        one = ledger.summary(())[0]["cost"]
        budget = 5 * one
        secret = stored.add(ledger.database, "ada", budget=budget)
        statuses: list[int] = []

        def client() -> None:
            for _ in range(3):
                answer = ask(url, secret, max_tokens=300)
                statuses.append(answer.status)
                answer.read()

        clients = [threading.Thread(target=client) for _ in range(6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(60)
        left = stored.named(ledger.database, "ada").balance
        assert set(statuses) == {200, 402} and len(statuses) == 18
        assert left is not None and left == budget - statuses.count(200) * one >= 0
        assert last["rorqual"]["cost"]["price"]["model"] == "minke"
    accounts.close()


def test_a_client_that_leaves_pays_for_what_was_made(engine: Engine, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    secret = stored.add(ledger.database, "ada", budget=PICOS)
    accounts = Accounts(ledger, tariff=Tariff(like=PRO))
    with live(create_app(engine, "minke", operations=Operations(accounts))) as url:
        for stream in (True, False):
            before = ledger.summary(())
            place = urlsplit(url)
            connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=30)
            body = {"model": "minke", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
            headers = {"content-type": "application/json", "authorization": f"Bearer {secret}"}
            connection.request("POST", CHAT, json.dumps(body), headers)
            deadline = time.monotonic() + 20
            while engine.occupancy()[0] == 0 or ledger.held("ada") == 0:
                pause(deadline)
            time.sleep(0.05)
            connection.close()
            while ledger.held("ada"):
                pause(deadline)
            now = ledger.summary(())[0]
            assert now["requests"] == (before[0]["requests"] if before else 0) + 1
            with ledger.database.reading() as rows:
                row = rows.execute("SELECT * FROM usage ORDER BY id DESC LIMIT 1").fetchone()
            assert (row["finish"], row["status"]) == ("client_gone", 499)
            assert 0 < row["completion_tokens"] < 200 and row["cost"] > 0
    accounts.close()


def test_running_requests_of_a_key_and_of_a_user(engine: Engine, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    secret = stored.add(ledger.database, "ada", limits=Limits(running=2, running_per_user=1))
    accounts = Accounts(ledger)
    with live(create_app(engine, "minke", operations=Operations(accounts))) as url:
        first, same_user = ask(url, secret, user_id="u"), ask(url, secret, user_id="u")
        second, third = ask(url, secret, user_id="v"), ask(url, secret)
        assert [answer.status for answer in (first, second, same_user, third)] == [200, 200, 429, 429]
        assert int(third.headers["retry-after"]) >= 1
        assert "user 'u'" in same_user.read().decode() and "2 requests are running" in third.read().decode()
        first.read()  # to its last byte, and the place is free
        assert ask(url, secret, user_id="u").status == 200
    accounts.close()
