"""Claims and code through the gateway: judged by the upstream itself, cured, told, and never on the wire before."""

import json
from typing import Any

import httpx2
import pytest
from mock_upstream import MockUpstream, says
from starlette.testclient import TestClient

from rorqual.referee import Options, Policy, Referee
from rorqual.referee.policy import PROFILES
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.gateway_wire import Upstream

EVIDENCE = [{"id": "doc-1", "text": "Ann Vale was born in Oslo. She worked as a baker."}]
FINE, WRONG = "Ann Vale was born in Oslo.", "Ann Vale worked as a pilot."
RIGHT = "Ann Vale worked as a baker."
REWORDED = "Ann Vale had a job as a baker."
AGAINST = says('1 contradicted "She worked as a baker"')
BODY = {"model": "m", "messages": [{"role": "user", "content": "Who was Ann Vale?"}]}


def ask(mock: MockUpstream, profile: str = "assistant", referee: Any = None, **more: Any) -> tuple[Any, TestClient]:
    upstream = Upstream("http://mock", transport=httpx2.ASGITransport(app=mock.app(), raise_app_exceptions=False))
    gateway = Gateway(upstream, Options("enforce", Policy(PROFILES[profile])), Referee())
    given = {"checks": ["claims"], "evidence": EVIDENCE} if referee is None else referee
    with TestClient(create_gateway(gateway), raise_server_exceptions=False) as client:
        return client.post("/v1/chat/completions", json={**BODY, "referee": given, **more}), client


@pytest.mark.parametrize("stream", [False, True])
def test_a_contradicted_sentence_is_asked_for_again_and_never_sent(stream: bool):
    mock = MockUpstream([says(f"{FINE} {WRONG}"), AGAINST, says(f"1. {RIGHT}"), says("1 supported")])
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer, _ = ask(mock, **more)
    assert answer.status_code == 200 and "pilot" not in answer.text.partition("event: referee")[0].split('"referee"')[0]
    assert all(bool(body.get("stream")) == stream for body in mock.bodies)
    assert all("stream_options" not in body or body["stream"] for body in mock.bodies)
    if stream:
        lines = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"].get("content") or "" for line in lines for choice in line["choices"]]
        told = next(line["referee"] for line in lines if "referee" in line)
        assert "".join(deltas) == f"{FINE} {RIGHT}"
        assert lines[-1]["usage"]["completion_tokens"] == 20 * len(mock.bodies)
    else:
        told = answer.json()["referee"]
        assert answer.json()["choices"][0]["message"]["content"] == f"{FINE} {RIGHT}"
    assert told["verdict"] == "repaired" and [one["rule"] for one in told["actions"]] == [7, 12]
    assert told["judging"]["calls"] == told["judging"]["claims"] == 2  # the wrong sentence, and the one in its place


def test_one_vote_alone_is_dropped_and_counted():
    mock = MockUpstream([says(f"{FINE} {REWORDED}"), says('1 not found "had a job"'), says("1 supported")])
    told = ask(mock)[0].json()
    assert told["choices"][0]["message"]["content"].endswith(REWORDED)
    assert told["referee"]["verdict"] == "pass" and told["referee"]["judging"]["dropped"] == 1


def test_an_upstream_that_cannot_judge_leaves_a_suspicion():
    told = ask(MockUpstream([says(f"{FINE} {WRONG}"), says("What a question!")]))[0].json()["referee"]
    assert told["verdict"] == "pass" and told["judging"]["unread"] >= 1
    assert [row["reason_code"] for row in told["checks"] if row["reason_code"]] == ["claim_suspected"]


def test_code_is_refused_where_the_server_runs_none():
    mock = MockUpstream([says("Hello.")])
    refused = ask(mock, referee={"checks": ["code"]})[0]
    assert refused.status_code == 400 and "--run-code" in refused.text and not mock.bodies
