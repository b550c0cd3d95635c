"""Keys, budgets, limits, costs, logs and meters, asked for over HTTP as clients see them."""

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mock_model import ScriptModel, byte_tokenizer
from prometheus_client.parser import text_string_to_metric_families
from scripted_api import chunks_of, reply
from starlette.testclient import TestClient

from rorqual.engine import Engine
from rorqual.errors import ConfigError
from rorqual.ledger import Ledger, Limits
from rorqual.ledger import keys as stored
from rorqual.money import PICOS, parse_amount
from rorqual.planner.prices import PriceTable, cost
from rorqual.server import create_app, logs
from rorqual.server.accounts import Accounts, Tariff
from rorqual.server.auth import Gatekeeper, check_exposure, read_key_file, sent_key
from rorqual.server.operations import Operations

PRO = "deepseek-v4-pro"
PATHS = ["/v1/chat/completions", "/v1/responses", "/beta/completions", "/anthropic/v1/messages"]


def body_for(path: str, **more: Any) -> dict[str, Any]:
    text = {"/v1/responses": "input", "/beta/completions": "prompt"}.get(path)
    words: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if text is None else {text: "Hi"}
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    return {"model": "minke", **words, limit: 40, **more}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine:
        yield engine


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


Serve = Callable[..., Any]


@pytest.fixture
def serve(engine: Engine) -> Serve:
    @contextmanager
    def serve(name: str = "minke", app_settings: dict[str, Any] | None = None, **fields: Any) -> Iterator[TestClient]:
        operations = Operations(**fields)
        app = create_app(engine, name, operations=operations, **(app_settings or {}))
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client
        operations.close()

    return serve


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


# Keys


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "expected"),
    [
        ("Bearer one", "two", "one"),
        ("bearer  one ", None, "one"),
        ("Basic one", "two", "two"),
        ("Bearer ", "two", "two"),
        (None, "two", "two"),
        ("one", None, None),
        (None, None, None),
    ],
)
def test_which_key_was_sent(authorization: str | None, x_api_key: str | None, expected: str | None) -> None:
    assert sent_key(authorization, x_api_key) == expected


def test_keys_are_asked_for_where_there_are_any(serve: Serve, ledger: Ledger) -> None:
    mine = stored.add(ledger.database, "ada")
    with serve(accounts=Accounts(ledger, given_keys={"given": "sk-given"})) as client:
        for path in ("/", "/health", "/static/js/main.js", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        for path in ("/v1/models", "/metrics", "/stats", "/user/balance", "/nowhere"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
            assert answer.headers["content-type"].startswith("text/plain") and len(answer.text) < 120
        for headers in (bearer("sk-wrong"), {"x-api-key": "sk-wrong"}, {**bearer("sk-wrong"), "x-api-key": mine}):
            answer = client.post(PATHS[0], json=body_for(PATHS[0]), headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"] == {
                "message": "Authentication Fails, Your api key: ****rong is invalid",
                "type": "authentication_error",
                "param": None,
                "code": "invalid_request_error",
            }
        for headers in (bearer(mine), {"x-api-key": mine}, bearer("sk-given"), {**bearer(mine), "x-api-key": "no"}):
            assert client.post(PATHS[0], json=body_for(PATHS[0]), headers=headers).status_code == 200
        stored.revoke(ledger.database, "ada")
        assert client.get("/v1/models", headers=bearer(mine)).status_code == 401
        assert client.get("/v1/models", headers=bearer("sk-given")).status_code == 200


def test_revoking_the_last_key_opens_nothing(serve: Serve, ledger: Ledger) -> None:
    mine = stored.add(ledger.database, "ada")
    with serve(accounts=Accounts(ledger)) as client:
        stored.revoke(ledger.database, "ada")
        assert client.get("/v1/models", headers=bearer(mine)).status_code == 401
        assert client.get("/v1/models").status_code == 401


def test_without_keys_everybody_is_welcome(serve: Serve) -> None:
    with serve() as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post(PATHS[0], json=body_for(PATHS[0]), headers=bearer("unused")).status_code == 200
        info = {"currency": "USD", "total_balance": "0.00", "granted_balance": "0.00", "topped_up_balance": "0.00"}
        assert client.get("/user/balance").json() == {"is_available": True, "balance_infos": [info]}


@pytest.mark.parametrize(("host", "refused"), [("127.0.0.1", False), ("::1", False), ("localhost", False)] + [
    (host, True) for host in ("0.0.0.0", "::", "", "192.168.1.4", "example.org")
])  # fmt: skip
def test_an_open_server_is_not_shown_to_others_by_accident(host: str, refused: bool) -> None:
    check_exposure(host, Gatekeeper({}, None, is_open=True))
    check_exposure(host, Gatekeeper({"a": "b"}, None))
    if refused:
        with pytest.raises(ConfigError, match="rorqual keys add NAME"):
            check_exposure(host, Gatekeeper({}, None))
    else:
        check_exposure(host, Gatekeeper({}, None))


def test_key_files(tmp_path: Path, ledger: Ledger) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# ours\nsk-1\nada sk-2  # hers\n\n")
    assert read_key_file(path) == {"key-2": "sk-1", "ada": "sk-2"}
    stored.add(ledger.database, "ada")
    with pytest.raises(ConfigError, match="'ada'.*key file"):
        Accounts(ledger, given_keys=read_key_file(path))
    for text in ("ada one two", "ada one\nada two", "# nobody"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"keys\.txt"):
            read_key_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key_file(tmp_path / "absent")


# Money


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_every_dialect_pays_what_its_usage_costs(serve: Serve, ledger: Ledger, path: str, stream: bool) -> None:
    mine = stored.add(ledger.database, "ada", budget=PICOS)
    with serve(accounts=Accounts(ledger, tariff=Tariff(like=PRO))) as client:
        answer = client.post(path, json=body_for(path, stream=stream), headers=bearer(mine))
        assert answer.status_code == 200, answer.text
        (row,) = ledger.summary(["key", "model", "endpoint"])
        assert (row["key"], row["model"], row["endpoint"], row["failed"]) == ("ada", "minke", path, 0)
        assert row["prompt_tokens"] == row["hit_tokens"] + row["miss_tokens"] > 0 < row["completion_tokens"]
        used = {"prompt_tokens": row["prompt_tokens"], "completion_tokens": row["completion_tokens"]}
        now = datetime.now(UTC)
        assert row["cost"] == cost({**used, "prompt_cache_hit_tokens": row["hit_tokens"]}, PRO, now).total > 0
        found = client.get("/user/balance", headers=bearer(mine)).json()["balance_infos"][0]
        assert parse_amount(found["total_balance"]) == PICOS - row["cost"] == parse_amount(found["granted_balance"])
        if not stream:
            about = answer.json()["rorqual"]["cost"]
            assert parse_amount(about["total"]) == row["cost"] and about["price"]["since"].startswith("2026-")
    assert ledger_is_closed(ledger)


def ledger_is_closed(ledger: Ledger) -> bool:
    try:
        ledger.held("ada")
    except Exception as error:
        return "closed" in str(error)
    return False


def test_the_stream_ends_after_the_ledger_has_it(serve: Serve, ledger: Ledger) -> None:
    mine = stored.add(ledger.database, "ada", budget=PICOS)
    with (
        serve(accounts=Accounts(ledger, tariff=Tariff(like=PRO))) as client,
        client.stream("POST", PATHS[0], json=body_for(PATHS[0], stream=True), headers=bearer(mine)) as answer,
    ):
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                assert ledger.summary(())[0]["requests"] == 1 and ledger.held("ada") == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_budget_refuses_before_it_is_overspent(serve: Serve, ledger: Ledger, engine: Engine, path: str) -> None:
    price = Tariff(like=PRO).price("minke", datetime.now(UTC))
    with serve(accounts=Accounts(ledger, is_open=False, tariff=Tariff(like=PRO))) as client:
        tokens = client_prompt_tokens(client, path, stored.add(ledger.database, "rich"))
        worst = price.worst_case(tokens, 40)
        enough = stored.add(ledger.database, "ada", budget=worst)
        short = stored.add(ledger.database, "bob", budget=worst - 1)
        steps = engine.stats().rounds
        answer = client.post(path, json=body_for(path), headers=bearer(short))
        assert answer.status_code == 402 and engine.stats().rounds == steps
        error = answer.json()["error"]
        assert (error["message"], error["type"]) == ("Insufficient Balance", "unknown_error")
        assert error["code"] == "invalid_request_error" and error["param"] is None
        assert client.post(path, json=body_for(path), headers=bearer(enough)).status_code == 200
        assert client.get("/user/balance", headers=bearer(enough)).json()["is_available"] is (
            stored.named(ledger.database, "ada").balance != 0
        )


def client_prompt_tokens(client: TestClient, path: str, secret: str) -> int:
    usage = client.post(path, json=body_for(path), headers=bearer(secret)).json()["usage"]
    return int(usage.get("prompt_tokens", usage.get("input_tokens")))


def test_failures_cost_nothing_and_hold_nothing(serve: Serve, ledger: Ledger) -> None:
    mine = stored.add(ledger.database, "ada", budget=PICOS)
    with serve(accounts=Accounts(ledger, tariff=Tariff(like=PRO))) as client:
        long = body_for(PATHS[0], messages=[{"role": "user", "content": "x" * 20_000}])
        assert client.post(PATHS[0], json=long, headers=bearer(mine)).status_code == 400
        assert client.post(PATHS[0], json=body_for(PATHS[0], temperature=9), headers=bearer(mine)).status_code == 400
        assert stored.named(ledger.database, "ada").balance == PICOS and ledger.held("ada") == 0
        assert all(row["cost"] == 0 for row in ledger.summary(["endpoint"]))


def test_prices_of_ones_own_and_of_nobody(serve: Serve) -> None:
    row = {"models": ["minke"], "from": datetime(2026, 1, 1, tzinfo=UTC), "currency": "EUR"}
    own = PriceTable.model_validate({"price": [{**row, "hit": 1, "miss": 2, "output": 3}]})
    for tariff, per_output in ((Tariff(), 0), (Tariff(own), 3)):
        with serve(accounts=Accounts(tariff=tariff)) as client:
            chunks = chunks_of(client.post(PATHS[0], json=body_for(PATHS[0], stream=True)))
            about, usage = chunks[-1]["rorqual"]["cost"], chunks[-1]["usage"]
            assert parse_amount(about["output"]) == usage["completion_tokens"] * per_output * 10**6
            assert about["currency"] == tariff.currency
    with pytest.raises(ConfigError, match="'minke' has no prices"):
        Tariff(like="minke")


def test_keys_and_their_users_are_owners_of_their_own(serve: Serve, ledger: Ledger, engine: Engine) -> None:
    secrets = [stored.add(ledger.database, name) for name in ("ada", "bob")]
    seen: list[str] = []
    submit = engine.submit

    def watched(*words: Any, **fields: Any) -> Any:
        seen.append(fields["cache_scope"])
        return submit(*words, **fields)

    with serve(accounts=Accounts(ledger)) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "submit", watched)
        for secret in secrets:
            for user in ({}, {"user_id": "u"}):
                body = body_for(PATHS[0], **user)
                assert client.post(PATHS[0], json=body, headers=bearer(secret)).status_code == 200
    assert len(set(seen)) == 4


# Limits


def test_limits_answer_429_and_say_when(serve: Serve, ledger: Ledger) -> None:
    mine = stored.add(ledger.database, "ada", limits=Limits(requests_per_minute=2))
    other = stored.add(ledger.database, "bob")
    with serve(accounts=Accounts(ledger)) as client:
        statuses = [client.post(p, json=body_for(p), headers=bearer(mine)).status_code for p in PATHS]
        assert statuses == [200, 200, 429, 429]
        refused = client.post(PATHS[0], json=body_for(PATHS[0]), headers=bearer(mine))
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.post(PATHS[0], json=body_for(PATHS[0]), headers=bearer(other)).status_code == 200


def test_a_server_without_keys_has_limits_too(serve: Serve) -> None:
    with serve(accounts=Accounts(limits=Limits(tokens_per_minute=45))) as client:
        assert client.post(PATHS[0], json=body_for(PATHS[0])).status_code == 200
        assert client.post(PATHS[0], json=body_for(PATHS[0], max_tokens=9)).status_code == 200
        assert "this server may use" in client.post(PATHS[0], json=body_for(PATHS[0])).text


# What it says about itself


def test_every_answer_has_its_trace_id(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(accounts=Accounts(given_keys={"a": "sk-a"}), max_body_bytes=5000) as client:
        seen = [
            client.get("/"),
            client.get("/nowhere", headers=bearer("sk-a")),
            client.get("/v1/models"),
            client.post(PATHS[0], json=body_for(PATHS[0]), headers=bearer("sk-a")),
            client.post(PATHS[0], json=body_for(PATHS[0], stream=True), headers=bearer("sk-a")),
            client.post(PATHS[0], content="{", headers=bearer("sk-a")),
            client.post(PATHS[0], content="x" * 6000, headers=bearer("sk-a")),
        ]
        monkeypatch.setattr("rorqual.server.app.statistics", lambda model: 1 / 0)
        seen.append(client.get("/stats", headers=bearer("sk-a")))
    assert [answer.status_code for answer in seen] == [200, 404, 401, 200, 200, 400, 413, 500]
    traces = [answer.headers["x-ds-trace-id"] for answer in seen]
    assert len(set(traces)) == len(traces) and all(len(trace) == 32 for trace in traces)


@pytest.fixture
def json_lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    stream = io.StringIO()
    logs.configure("json", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logs.configure("off")


def test_one_line_a_request_and_nothing_that_was_said(
    serve: Serve, json_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    with serve(accounts=Accounts(given_keys={"ada": "sk-ada"}, tariff=Tariff(like=PRO))) as client:
        body = body_for(PATHS[0], messages=[{"role": "user", "content": "SECRET-PROMPT"}])
        answers = [
            client.post(PATHS[0], json=body, headers=bearer("sk-ada")),
            client.post("/beta/chat/completions", json=body | {"stream": True}, headers=bearer("sk-ada")),
            client.post(PATHS[0], json=body, headers=bearer("SECRET-KEY")),
            client.get("/v1/models/none", headers=bearer("sk-ada")),
            client.get("/static/js/main.js"),
        ]
    lines = [line for line in json_lines() if "endpoint" in line]
    assert [line["trace"] for line in lines] == [answer.headers["x-ds-trace-id"] for answer in answers]
    assert [line["status"] for line in lines] == [200, 200, 401, 404, 200]
    assert [line["endpoint"] for line in lines[:3]] == [PATHS[0], "/beta/chat/completions", PATHS[0]]
    assert lines[3]["endpoint"] == "/v1/models/{name:path}" and lines[4]["endpoint"] == "other"
    assert [line["refused"] for line in lines] == [None, None, "invalid_request_error", "model_not_found", None]
    first, usage = lines[0], answers[0].json()["usage"]
    assert (first["key"], first["model"], first["finish"]) == ("ada", "minke", "stop")
    assert first["completion_tokens"] == usage["completion_tokens"] == lines[1]["completion_tokens"]
    assert 0 < first["first_token_s"] <= first["duration_s"] and first["client_gone"] is False
    assert parse_amount(first["cost"]) > 0
    assert "SECRET" not in json.dumps(json_lines())


def test_errors_are_logged_under_the_trace_of_their_answer(
    serve: Serve, json_lines: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any) -> None:
        logging.getLogger("rorqual.test").warning("about to fail")
        raise RuntimeError("as planned")

    monkeypatch.setattr("rorqual.server.app.statistics", fail)
    with serve() as client:
        trace = client.get("/stats").headers["x-ds-trace-id"]
    warning, line = json_lines()
    assert (warning["message"], warning["trace"], warning["level"]) == ("about to fail", trace, "warning")
    assert (line["status"], line["trace"]) == (500, trace)


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    logs.configure("text", stream)
    logs.write({"trace": "t", "key": 'a b="c"', "status": 200, "client_gone": False, "refused": None, "s": 0.5})
    logs.configure("off")
    logs.write({"trace": "unseen"})
    assert stream.getvalue().split(" ", 1)[1] == 'trace=t key="a b=\\"c\\"" status=200 s=0.5\n'
    assert capsys.readouterr() == ("", "")


def test_meters_count_what_was_answered(serve: Serve, ledger: Ledger) -> None:
    mine = stored.add(ledger.database, "ada", limits=Limits(requests_per_minute=2))
    with serve(accounts=Accounts(ledger, tariff=Tariff(like=PRO))) as client:
        for stream in (False, True, False):
            client.post(PATHS[0], json=body_for(PATHS[0], stream=stream), headers=bearer(mine))
        client.get("/v1/models")
        text = client.get("/metrics", headers=bearer(mine)).text
        row = ledger.summary(())[0]
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return samples[(f"rorqual_{name}", *sorted(labels.items()))]

    assert value("http_requests_total", endpoint=PATHS[0], status="200") == 2
    assert value("http_requests_total", endpoint=PATHS[0], status="429") == 1
    assert value("refused_requests_total", reason="rate_limit_error") == 1
    assert value("refused_requests_total", reason="authentication_error") == 1
    assert value("http_request_seconds_count", endpoint=PATHS[0]) == 3
    assert value("first_token_seconds_count", model="minke") == 2
    assert value("tokens_total", model="minke", kind="completion") == row["completion_tokens"]
    assert value("tokens_total", model="minke", kind="miss") == row["miss_tokens"]
    assert value("cost_total", model="minke", currency="USD") == pytest.approx(row["cost"] / PICOS)
    assert value("inter_token_seconds_count", model="minke") > 0
    assert value("http_running") == 1  # this very request
    assert value("sampled_tokens_total", model="minke") >= row["completion_tokens"]


# Browsers, bodies


def test_other_pages_may_ask_only_when_listed(serve: Serve) -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST",
           "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    with serve(allowed_origins=["https://app.example"], accounts=Accounts(given_keys={"a": "sk-a"})) as client:
        answer = client.options(PATHS[0], headers=ask)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        refused = client.get("/v1/models", headers={"origin": "https://app.example"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-ds-trace-id" in refused.headers["access-control-expose-headers"].lower()
        other = client.options(PATHS[0], headers={**ask, "origin": "https://evil.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    with serve() as client:
        answer = client.get("/v1/models", headers={"origin": "https://app.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert client.options(PATHS[0], headers=ask).status_code == 405


def test_a_draining_server_takes_nothing_new(serve: Serve) -> None:
    operations = Operations()
    with serve(drain=operations.drain) as client:
        assert client.get("/health").json()["status"] == "ok"
        operations.drain.begin()
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "draining")
        for path in PATHS:
            answer = client.post(path, json=body_for(path))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
            assert answer.headers["connection"] == "close" and int(answer.headers["retry-after"]) > 0
        assert client.get("/metrics").status_code == 200
