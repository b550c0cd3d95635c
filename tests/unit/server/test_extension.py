"""The `rorqual` object of requests and answers, a full queue, and the counters."""

import threading
import time
from typing import Any

import pytest
from mock_model import ScriptModel, byte_tokenizer
from prometheus_client.parser import text_string_to_metric_families
from scripted_api import ask, chunks_of, refused
from starlette.testclient import TestClient

from rorqual.engine import Engine
from rorqual.server import create_app


def test_an_answer_says_how_it_ran(client: TestClient) -> None:
    whole = ask(client, seed=5).json()["rorqual"]
    assert (whole["seed"], whole["ended"], whole["cache"]) == (5, "stop", None)
    assert set(whole["timing"]) == {"queue_s", "first_token_s", "decode_s"}
    assert sum(whole["timing"].values()) > 0
    *between, last = chunks_of(ask(client, seed=6, stream=True))
    assert last["rorqual"]["seed"] == 6 and not any("rorqual" in chunk for chunk in between)
    completion = client.post("/v1/completions", json={"model": "minke", "prompt": "a", "seed": 7}).json()
    assert completion["rorqual"]["seed"] == 7


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"priority": 101}, "rorqual.priority"),
        ({"priority": "high"}, "rorqual.priority"),
        ({"timeout_s": 0}, "rorqual.timeout_s"),
        ({"deadline": 3}, "rorqual.deadline"),
        ({"guard": "luck"}, "rorqual.guard"),
        ({"guard": "default"}, "rorqual.guard"),  # the client's model has no indexer
    ],
)
def test_what_is_asked_beyond_the_api_is_checked(client: TestClient, given: dict[str, Any], param: str) -> None:
    assert refused(ask(client, rorqual=given))["param"] == param


def test_an_answer_ends_at_its_deadline() -> None:
    model = ScriptModel(lambda prompt: "more " * 3000)
    model.step_s = 0.01
    with Engine(model, byte_tokenizer()) as engine:
        client = TestClient(create_app(engine))
        body = ask(client, rorqual={"timeout_s": 0.6}, thinking={"type": "disabled"}).json()
        assert body["choices"][0]["finish_reason"] == "length" and body["rorqual"]["ended"] == "timeout"
        assert body["choices"][0]["message"]["content"].startswith("mo")
        fields = {"model": "minke", "prompt": "a", "rorqual": {"timeout_s": 0.3}, "stream": True}
        last = chunks_of(client.post("/v1/completions", json=fields))[-1]
        assert (last["choices"][0]["finish_reason"], last["rorqual"]["ended"]) == ("length", "timeout")


def test_a_full_queue_says_when_to_come_again_and_priority_goes_first() -> None:
    model = ScriptModel(lambda prompt: "x")
    with Engine(model, byte_tokenizer(), max_running=1, max_queued=2) as engine:
        client = TestClient(create_app(engine))
        ask(client)  # so that the engine knows how long an answer takes
        model.gate.clear()
        waited: dict[str, float] = {}

        def send(name: str, priority: int) -> None:
            waited[name] = ask(client, rorqual={"priority": priority}).json()["rorqual"]["timing"]["queue_s"]

        threads = []
        for name, priority in (("running", 1), ("first", 0), ("urgent", 1)):
            threads.append(threading.Thread(target=send, args=(name, priority)))
            threads[-1].start()
            deadline = time.monotonic() + 10
            while sum(engine.occupancy()) < len(threads) and time.monotonic() < deadline:
                time.sleep(0.005)
        response = ask(client)
        assert "which is all this server takes" in refused(response, 429)["message"]
        assert int(response.headers["retry-after"]) >= 1
        model.gate.set()
        for thread in threads:
            thread.join(20)
    assert waited["urgent"] < waited["first"], "it came later and began earlier"


def test_counters_for_people_and_for_prometheus(engine: Engine, client: TestClient) -> None:
    before = client.get("/stats").json()["minke"]
    ask(client)
    after = client.get("/stats").json()["minke"]
    assert after["finished"]["stop"] == before["finished"].get("stop", 0) + 1
    assert after["sampled_tokens"] > before["sampled_tokens"] and after["running"] == 0
    text = client.get("/metrics").text
    assert f'rorqual_sampled_tokens_total{{model="minke"}} {engine.stats().sampled_tokens}\n' in text
    assert f'rorqual_finished_total{{model="minke",reason="stop"}} {after["finished"]["stop"]}\n' in text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(name.startswith("rorqual_") for name in families)
    (tokens,) = [sample for sample in families["rorqual_sampled_tokens"].samples if sample.name.endswith("_total")]
    assert tokens.labels == {"model": "minke"} and tokens.value == after["sampled_tokens"]
