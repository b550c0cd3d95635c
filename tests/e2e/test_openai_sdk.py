"""The `openai` SDK, unmodified, against a live server, over a scripted model and over a real network."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import live
from mock_model import ScriptModel, byte_tokenizer
from scripted_api import CALL, TOOLS

from rorqual.engine import Engine
from rorqual.server import create_app

openai = pytest.importorskip("openai", reason="needs the openai SDK (test extra)")

ASK: Any = [{"role": "user", "content": "Capital of Peru?"}]


def reply(prompt: str) -> str:
    if "<｜fim▁end｜>" in prompt:
        return "    return a + b\n"
    if "forever" in prompt:
        return "more " * 3000
    answer = CALL if "What time" in prompt and "<tool_result>" not in prompt else "Lima 🐋."
    return f"Peru, so Lima.</think>{answer}" if prompt.endswith("<think>") else answer


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with live(create_app(engine, "minke")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_a_reply_is_streamed_with_its_reasoning(client: Any) -> None:
    stream = client.chat.completions.create(
        model="minke", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    reasoning, content, finish, usage = "", "", None, None
    for chunk in stream:
        [choice] = chunk.choices
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        content += choice.delta.content or ""
        finish, usage = choice.finish_reason or finish, chunk.usage or usage
    assert (reasoning, content, finish) == ("Peru, so Lima.", "Lima 🐋.", "stop")
    assert usage.completion_tokens_details.reasoning_tokens == len("Peru, so Lima.") + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_whole_reply_with_and_without_thinking(client: Any) -> None:
    whole = client.chat.completions.create(model="minke", messages=ASK, seed=1, temperature=0.5)
    assert whole.choices[0].message.content == "Lima 🐋."
    assert whole.choices[0].message.reasoning_content == "Peru, so Lima."
    off = client.chat.completions.create(
        model="minke", messages=ASK, extra_body={"thinking": {"type": "disabled"}}, logprobs=True
    )
    assert off.choices[0].message.content == "Lima 🐋."
    assert not hasattr(off.choices[0].message, "reasoning_content")
    assert off.choices[0].logprobs.content[0].token == "L"


def test_a_tool_is_called_and_its_result_answered(client: Any) -> None:
    messages: Any = [{"role": "user", "content": "What time is it?"}]
    first = client.chat.completions.create(model="minke", messages=messages, tools=TOOLS)
    assert first.choices[0].finish_reason == "tool_calls" and len(first._request_id) == 32
    message = first.choices[0].message
    assert message.tool_calls[0].function.arguments == '{"zone": "UTC"}'
    # The SDK's own message goes back as it is, with all its empty fields.
    messages += [
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12"},
    ]
    second = client.chat.completions.create(model="minke", messages=messages, tools=TOOLS)
    assert second.choices[0].message.content == "Lima 🐋."


def test_the_gap_is_filled(url: str) -> None:
    prompt, suffix = "def add(a, b):\n", "\nprint(add(1, 2))\n"
    with openai.OpenAI(base_url=f"{url}/beta", api_key="unused") as beta:
        whole = beta.completions.create(model="minke", prompt=prompt, suffix=suffix, max_tokens=64)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("    return a + b\n", "stop")
        stream = beta.completions.create(model="minke", prompt=prompt, suffix=suffix, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "    return a + b\n"


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["minke"]


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_arrive_as_bad_requests(client: Any, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="model name is minke, but you passed gpt-4") as caught:
        client.chat.completions.create(model="gpt-4", messages=ASK, stream=stream)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="Unknown field `logit_bias`") as caught:
        client.chat.completions.create(model="minke", messages=ASK, logit_bias={"1": 2}, stream=stream)
    assert caught.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 16384 tokens"):
        client.chat.completions.create(model="minke", messages=ASK, max_tokens=16384, stream=stream)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_work(client: Any, engine: Engine, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "forever"}]
    fields: Any = {"model": "minke", "messages": messages, "max_tokens": 12000}
    if stream:
        answer = client.chat.completions.create(**fields, stream=True)
        for _, _chunk in zip(range(5), answer, strict=False):
            pass
        assert engine.occupancy()[0] == 1
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**fields, timeout=0.3)
    deadline = time.monotonic() + 5
    while engine.occupancy() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.occupancy() == (0, 0)


def test_a_real_network_behind_the_same_api() -> None:
    import torch

    from rorqual.config import ModelConfig
    from rorqual.model import Transformer

    tokenizer = byte_tokenizer()
    cfg = ModelConfig.preset("minke").replace(vocab_size=tokenizer.vocab_size)
    with torch.device("cpu"):
        model = Transformer(cfg, seed=3)
    with (
        Engine(model, tokenizer) as engine,
        live(create_app(engine, "random")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        fields: Any = {"model": "random", "messages": ASK, "max_tokens": 24, "seed": 7, "logprobs": True}
        whole = client.chat.completions.create(**fields)
        pieces = ["", ""]
        for chunk in client.chat.completions.create(**fields, stream=True):
            pieces[0] += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            pieces[1] += chunk.choices[0].delta.content or ""
            last = chunk
        message = whole.choices[0].message
        assert pieces == [message.reasoning_content, message.content]
        assert last.usage.completion_tokens == whole.usage.completion_tokens <= 24
        assert whole.choices[0].finish_reason in ("length", "stop")
        # The figures are those of the model itself: one plain pass over prompt and answer gives the same.
        [again] = engine.generate(
            tokenizer.encode("<｜begin▁of▁sentence｜><｜User｜>Capital of Peru?<｜Assistant｜><think>"),
            _params(tokenizer, seed=7),
        )
        logits = model(torch.tensor([again.prompt_ids + again.ids]))[0]
        truth = torch.log_softmax(logits, dim=-1)[len(again.prompt_ids) - 1 : -1]
        expected = truth.gather(1, torch.tensor(again.ids)[:, None])[:, 0].tolist()
        assert list(again.logprobs or ()) == pytest.approx(expected, abs=1e-4)
        entries = whole.choices[0].logprobs.model_extra["reasoning_content"]
        assert [entry["logprob"] for entry in entries][:10] == pytest.approx(expected[:10], abs=1e-4)


def _params(tokenizer: Any, seed: int) -> Any:
    from rorqual.chat import suppressed_ids
    from rorqual.engine import SamplingParams

    hidden = suppressed_ids(tokenizer, thinking=True)
    return SamplingParams(seed=seed, max_tokens=24, logprobs=True, suppress_token_ids=hidden)
