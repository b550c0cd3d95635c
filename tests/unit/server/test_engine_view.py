"""The engine view: what it says of requests, memory and cache, and whom it tells what was picked."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from mock_model import ScriptModel, byte_tokenizer
from scripted_api import ask, chunks_of, refused
from small_models import build, config
from starlette.testclient import TestClient

from rorqual.engine import CacheSettings, Engine, EngineSettings, Request, SamplingParams
from rorqual.errors import RequestError
from rorqual.server import ServedModel, create_app
from rorqual.server.accounts import Accounts
from rorqual.server.engine_view import MOST_KEPT, MOST_KEPT_TOKENS, Recent, engine_picks
from rorqual.server.operations import Operations
from rorqual.server.service import Behaviour, make_service

TOKENIZER = byte_tokenizer()
TEXT = "The key of the boathouse is 7413, and the ferry runs twice a day. " * 3


@pytest.fixture(scope="module")
def real() -> Iterator[TestClient]:
    """A tiny network of random weights, with a cache."""
    model = build(config(vocab_size=TOKENIZER.vocab_size, compress_ratios=[0, 4, 8, 4], index_topk=4))
    with EngineSettings(cache=CacheSettings(memory_bytes=1 << 24), context_limit=4096).open(model, TOKENIZER) as engine:
        yield TestClient(create_app(engine, "minke"))


def answer(client: TestClient, text: str = TEXT, **more: Any) -> Any:
    return ask(client, text, max_tokens=24, temperature=1, seed=5, **more).json()


def test_picks_of_an_answer(real: TestClient) -> None:
    said = answer(real)
    assert said["id"] == said["rorqual"]["request"]
    found = real.get("/engine/picks", params={"request": said["id"]}).json()
    usage = said["usage"]
    assert (found["prompt_tokens"], found["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    text = "".join(block["text"] for block in found["blocks"])
    assert TEXT in text
    assert [layer["layer"] for layer in found["layers"]] == [1, 3]
    for layer in found["layers"]:
        assert layer["has_choice"]
        assert [len(row) for row in layer["share"]] == [len(found["blocks"])] * len(found["rows"])
        cells = [cell for row in layer["share"] for cell in row if cell is not None]
        assert 0 < sum(cells) < len(cells) and all(0 <= cell <= 1 for cell in cells)
        assert layer["share"][0][-1] is None  # the answer's end could not be seen at its beginning


def test_a_stream_names_its_answer_from_the_first_chunk(real: TestClient) -> None:
    chunks = chunks_of(ask(real, TEXT, max_tokens=8, stream=True))
    assert {chunk["id"] for chunk in chunks} == {chunks[-1]["rorqual"]["request"]}
    assert real.get("/engine/picks", params={"request": chunks[0]["id"]}).status_code == 200


def test_only_who_knows_the_id_is_told(real: TestClient) -> None:
    said = answer(real)
    assert "Nothing is known" in refused(real.get("/engine/picks", params={"request": "last"}), 404)["message"]
    assert refused(real.get("/engine/picks"))["param"] == "query.request"
    view = real.get("/engine/view").text
    assert said["id"] not in view and "boathouse" not in view
    for _ in range(MOST_KEPT):
        answer(real, "Hi")
    assert refused(real.get("/engine/picks", params={"request": said["id"]}), 404)["param"] == "request"


def test_the_view_counts_memory_cache_and_steps(real: TestClient) -> None:
    before = real.get("/engine/view").json()["models"]["minke"]
    answer(real, "Another text, long enough to fill a page of the cache. " * 4)
    answer(real, "Another text, long enough to fill a page of the cache. " * 4)
    view = real.get("/engine/view").json()["models"]["minke"]
    cache = view["cache"]
    assert cache["requests"] == before["cache"]["requests"] + 2
    assert cache["hits"] > before["cache"]["hits"] and cache["reasons"]["exact repeat"] >= 1
    assert cache["pages"] > before["cache"]["pages"]
    assert sum(cache["bytes"].values()) == cache["memory_bytes"]
    assert cache["bytes"].keys() == {"entries", "index_keys", "checkpoints"}
    assert [layer["kind"] for layer in view["layers"]] == ["sliding", "csa", "hca", "csa"]
    assert view["requests"] == [] and view["running"] == 0
    assert sum(step["prompt"] for step in view["steps"]) > 0 and view["steps"][-1]["ms"] > 0
    assert view["steps"][-1]["number"] == view["rounds"] - 1


def test_phases_of_requests() -> None:
    model = ScriptModel(lambda prompt: "on " * 50)
    with Engine(model, TOKENIZER, max_running=1) as engine:
        client = TestClient(create_app(engine, "minke"))
        model.gate.clear()
        first = engine.submit(TOKENIZER.encode("A question"))
        second = engine.submit(TOKENIZER.encode("Another"), priority=-1)
        while engine.occupancy() != (1, 1):
            time.sleep(0.001)
        found = client.get("/engine/view").json()["models"]["minke"]["requests"]
        assert [(one["phase"], one["prompt_tokens"], one["priority"]) for one in found] == [
            ("reading", 10, 0),
            ("waiting", 7, -1),
        ]
        assert found[0]["age_s"] >= found[1]["age_s"] >= 0
        model.step_s = 0.01
        model.gate.set()
        while not first.events:
            time.sleep(0.001)
        found = client.get("/engine/view").json()["models"]["minke"]["requests"]
        assert (found[0]["phase"], found[0]["read_tokens"]) == ("answering", 10)
        assert 0 < found[0]["output_tokens"] < found[0]["max_tokens"]
        second.cancel()
        first.cancel()


def test_a_running_answer_and_a_model_without_indexer_have_no_picks() -> None:
    model = ScriptModel(lambda prompt: "on " * 50)
    with Engine(model, TOKENIZER) as engine:
        served = ServedModel("minke", engine)
        service = make_service([served])
        assert service.recent is not None
        model.gate.clear()
        request = engine.submit(TOKENIZER.encode("A question"))
        service.recent.add(served, request)
        with pytest.raises(RequestError, match="still being written"):
            asyncio.run(engine_picks(service, request.id))
        model.gate.set()
        request.result(30)
        with pytest.raises(RequestError, match="no lightning indexer"):
            asyncio.run(engine_picks(service, request.id))


def test_long_prompts_push_others_out(engine: Engine) -> None:
    """What is kept is bounded in tokens too; the newest stays whatever its length."""
    recent, served = Recent(), ServedModel("minke", engine)
    params, prompt = SamplingParams(max_tokens=1), [65] * (MOST_KEPT_TOKENS // 2)
    kept = [Request(prompt, params, max_tokens=1, seed=0) for _ in range(3)]
    for request in kept:
        recent.add(served, request)
    assert recent.find(kept[1].id)[1] is kept[1] and recent.find(kept[2].id)[1] is kept[2]
    with pytest.raises(RequestError, match="Nothing is known"):
        recent.find(kept[0].id)


def test_keys_see_their_own() -> None:
    model = ScriptModel(lambda prompt: "on " * 50)
    accounts = Accounts(given_keys={"ann": "key-a", "bob": "key-b"})
    with Engine(model, TOKENIZER) as engine:
        client = TestClient(create_app(engine, "minke", operations=Operations(accounts=accounts)))
        ann, bob = ({"authorization": f"Bearer key-{letter}"} for letter in "ab")
        assert client.get("/engine/view").status_code == client.get("/engine/picks?request=x").status_code == 401
        body = {"model": "minke", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        id = client.post("/v1/chat/completions", json=body, headers=ann).json()["id"]
        path = f"/engine/picks?request={id}"
        assert "no lightning indexer" in refused(client.get(path, headers=ann))["message"]  # it was found
        assert "Nothing is known" in refused(client.get(path, headers=bob), 404)["message"]
        model.gate.clear()
        running = engine.submit(TOKENIZER.encode("A question"), cache_scope="ann/user")
        seen = [client.get("/engine/view", headers=who).json()["models"]["minke"] for who in (ann, bob)]
        assert [len(view["requests"]) for view in seen] == [1, 0]
        assert "ann" not in str(seen)
        model.gate.set()
        running.cancel()


def test_it_can_be_switched_off(engine: Engine) -> None:
    client = TestClient(create_app(engine, "minke", behaviour=Behaviour(engine_view=False)))
    said = answer(client)
    for path in ("/engine/view", f"/engine/picks?request={said['id']}"):
        assert "switched off" in refused(client.get(path), 404)["message"]
