"""The dashboard's numbers over HTTP: verdicts of the gateway's own journal, results of a folder, keys, refusals."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mock_model import ScriptModel, byte_tokenizer
from mock_upstream import USAGE, MockUpstream, says
from starlette.testclient import TestClient

from rorqual.engine import Engine
from rorqual.referee import Options, Policy
from rorqual.referee.audit import Audit
from rorqual.server import create_app, dashboard
from rorqual.server.accounts import Accounts
from rorqual.server.dashboard import Dashboard
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.gateway_wire import Upstream
from rorqual.server.operations import Operations

RESULT = {"suite": "facts", "model": {"id": "minke"}, "n": 24, "valid": True, "headline": {"HR": 0.25, "RET": None},
          "intervals": {"HR": [0.1, 0.4]}}  # fmt: skip
ARM = {"wrong": {"value": 0.5, "low": 0.2, "high": 0.8}, "latency_ms": {"p50": 12.0}, "cost": 0.25}
TRIAL = {"suite": "trial", "model": "m", "n": 10, "valid": False, "headline": {"HR": 0.0, "RET": 1.0, "OI": 3.0},
         "before": ARM, "after": {**ARM, "wrong": None}}  # fmt: skip


def gateway(folder: Path, answers: list[Any], mode: Any, **more: Any) -> Gateway:
    upstream = Upstream("http://mock", "sk-up", transport=httpx2.ASGITransport(app=MockUpstream(answers).app()))
    dashboard = Dashboard(evals=folder / "evals", verdicts=folder / "journal")
    return Gateway(upstream, Options(mode, Policy()), audit=Audit(folder / "journal"), dashboard=dashboard, **more)


@pytest.fixture
def evals(tmp_path: Path) -> Path:
    folder = tmp_path / "evals"
    for age, (name, text) in enumerate([
        ("newest", json.dumps(TRIAL)), ("deep/run", json.dumps(RESULT)), ("broken", "{"), ("odd", '{"suite": 1}'),
    ]):  # fmt: skip
        path = folder / name / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        os.utime(path, (1000 - age, 1000 - age))
    return folder


def ask(client: TestClient, headers: dict[str, str] | None = None) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Seventeen apples and three?"}]}
    assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200


@pytest.mark.parametrize("mode", ["observe", "enforce"])
def test_verdicts_of_the_gateways_own_journal(tmp_path: Path, mode: str) -> None:
    answers = [says("It is 20."), says("17 + 3 = 21"), says("17 + 3 = 20")]
    with TestClient(create_gateway(gateway(tmp_path, answers, mode))) as client:
        assert client.get("/v1/referee/stats").json()["total"]["judged"] == 0
        ask(client)
        ask(client)
        client.get("/health")  # what observe records comes behind its answer
        for _ in range(200):
            told = client.get("/v1/referee/stats?by=day&last=2").json()
            if told["total"]["judged"] == 2:
                break
        total, counted = told["total"], client.get("/stats").json()["verdicts"]
        assert total["verdicts"] == counted and total["reasons"] == {"arith_wrong": 1}
        calls = 2 if mode == "observe" else 3
        assert total["tokens"]["prompt"] == calls * USAGE["prompt_tokens"]  # type: ignore[operator]
        assert total["repair_rate"] == (0.0 if mode == "observe" else 1.0)
        assert len(told["buckets"]) == 2 and "apples" not in json.dumps(told)


def test_results_of_evals(tmp_path: Path, evals: Path) -> None:
    with TestClient(create_gateway(gateway(tmp_path, [says("x")], "observe"))) as client:
        told = client.get("/v1/evals").json()
    assert [run["name"] for run in told["runs"]] == ["newest", "deep/run"] and told["left_out"] == 0
    trial, facts = told["runs"]
    assert trial["trial"]["before"] == {"wrong": 0.5, "p50_ms": 12.0, "cost": 0.25}
    assert trial["trial"]["after"]["wrong"] is None and trial["model"] == "m" and not trial["valid"]
    assert facts["headline"] == {"HR": 0.25, "RET": None} and facts["intervals"] == {"HR": [0.1, 0.4]}
    assert [one["name"] for one in told["unreadable"]] == ["broken", "odd"]


def test_a_result_with_numbers_that_are_none_hides_no_other(tmp_path: Path, evals: Path) -> None:
    (evals / "nan").mkdir()
    odd = {**RESULT, "headline": {"HR": float("nan"), "RET": 1.0}, "intervals": {"HR": [float("nan"), 1.0]}}
    (evals / "nan" / "result.json").write_text(json.dumps(odd))
    with TestClient(create_gateway(gateway(tmp_path, [says("x")], "observe"))) as client:
        runs = {run["name"]: run for run in client.get("/v1/evals").json()["runs"]}
    assert runs["nan"]["headline"] == {"HR": None, "RET": 1.0} and runs["nan"]["intervals"] == {}
    assert runs["deep/run"]["headline"] == {"HR": 0.25, "RET": None}


def test_numbers_ask_for_a_key_and_the_page_does_not(tmp_path: Path, evals: Path) -> None:
    operations = Operations(accounts=Accounts(given_keys={"ann": "key-a"}))
    with TestClient(create_gateway(gateway(tmp_path, [says("x")], "observe", operations=operations))) as client:
        for path in ("/v1/referee/stats", "/v1/evals"):
            assert client.get(path).status_code == 401
            told = client.get(path, headers={"authorization": "Bearer key-a"})
            assert told.status_code == 200 and "ann" not in told.text
        page = client.get("/dashboard")
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert client.get("/static/js/dashboard.js").status_code == 200


@pytest.fixture(scope="module")
def serving() -> Iterator[TestClient]:
    with Engine(ScriptModel(lambda prompt: "hi"), byte_tokenizer()) as engine:
        yield TestClient(create_app(engine, "minke"))


def test_a_server_without_either_says_so(serving: TestClient) -> None:
    assert serving.get("/dashboard").status_code == 200
    for path, told in (("/v1/referee/stats", "--verdicts"), ("/v1/evals", "--evals")):
        answer = serving.get(path)
        assert answer.status_code == 404 and told in answer.json()["error"]["message"]


@pytest.mark.parametrize("query, told", [
    ("by=week", "hour or day"), ("last=0", "from 1 to"), ("last=x", "from 1 to"), ("last=401", "from 1 to"),
    ("mood=1", "mood is unknown"),
])  # fmt: skip
def test_a_span_that_is_none(serving: TestClient, query: str, told: str) -> None:
    answer = serving.get(f"/v1/referee/stats?{query}")
    assert answer.status_code == 400 and told in answer.json()["error"]["message"]


def test_a_damaged_journal_is_told(tmp_path: Path) -> None:
    with TestClient(create_gateway(gateway(tmp_path, [says("It is 20.")], "enforce"))) as client:
        for _ in range(3):
            ask(client)
    segment = next((tmp_path / "journal").glob("*.seg"))
    data = bytearray(segment.read_bytes())
    data[120] ^= 0xFF
    segment.write_bytes(data)
    app_dashboard = Dashboard(verdicts=tmp_path / "journal")
    with Engine(ScriptModel(lambda prompt: "hi"), byte_tokenizer()) as engine:
        answer = TestClient(create_app(engine, "minke", shown=app_dashboard)).get("/v1/referee/stats")
    assert answer.status_code == 500 and "cannot be read" in answer.json()["error"]["message"]


def test_results_that_go_while_the_folder_is_read(tmp_path: Path, evals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = dashboard._result_files(evals)
    assert listed
    monkeypatch.setattr(dashboard, "_result_files", lambda folder: [*listed, evals / "gone" / "result.json"])
    shown = dashboard.Dashboard(evals=evals).runs()
    assert len(shown["runs"]) + len(shown["unreadable"]) == len(listed)
