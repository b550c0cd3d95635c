"""Completions: filling gaps, log-probabilities, refusals, and no control token in any answer."""

import json
from typing import Any

import pytest
from mock_model import HashModel, byte_tokenizer
from scripted_api import PROMPTS, ask, chunks_of, refused
from starlette.testclient import TestClient
from torch import Tensor

from rorqual.engine import Engine
from rorqual.server import create_app


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
