"""The prefix cache through the HTTP API with the bundled model: conversations hit, and the figures are true."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import live
from scripted_api import TOOLS

import rorqual
from rorqual.engine import CacheSettings, Engine, EngineSettings
from rorqual.server import create_app

openai = pytest.importorskip("openai", reason="needs the openai SDK (test extra)")

LONG = "You are Minke, a small whale. " + "Answer in few words and be kind to everybody who asks. " * 12


@pytest.fixture(scope="module")
def model() -> Any:
    return rorqual.load("minke")


@pytest.fixture(scope="module")
def engine(model: Any) -> Iterator[Engine]:
    settings = EngineSettings(context_limit=8192, cache=CacheSettings(memory_bytes=64 << 20))
    with settings.open(*model) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Any]:
    with (
        live(create_app(engine, "minke")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


def explanation(reply: Any) -> dict[str, Any]:
    cache: dict[str, Any] = reply.model_extra["rorqual"]["cache"]
    return cache


def check_usage(reply: Any) -> int:
    """The cached tokens of an answer, after checking that usage and explanation agree."""
    usage, cache = reply.usage, explanation(reply)
    hit: int = usage.model_extra["prompt_cache_hit_tokens"]
    assert hit == cache["cached_tokens"] == usage.prompt_tokens_details.cached_tokens
    assert hit + usage.model_extra["prompt_cache_miss_tokens"] == usage.prompt_tokens == cache["prompt_tokens"]
    assert cache["memory_tokens"] + cache["disk_tokens"] + cache["computed_tokens"] == usage.prompt_tokens
    return hit


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_the_next_turn_continues_where_the_last_ended(client: Any, engine: Engine, thinking: str) -> None:
    fields: Any = {
        "model": "minke",
        "max_tokens": 200,
        "temperature": 1.0,
        "extra_body": {"thinking": {"type": thinking}},
    }
    messages: Any = [{"role": "system", "content": f"{LONG} ({thinking})"}, {"role": "user", "content": "Hello!"}]
    first = client.chat.completions.create(messages=messages, seed=11, **fields)
    check_usage(first)
    # The client sends back what it was given, as text; sampled at temperature 1, so hardly as the tokenizer cuts it.
    messages += [first.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "And then?"}]
    before = engine.stats().prompt_tokens
    second = client.chat.completions.create(messages=messages, seed=12, **fields)
    hit, cache = check_usage(second), explanation(second)
    assert engine.stats().prompt_tokens - before == second.usage.prompt_tokens - hit, "what was read is what was missed"
    if thinking == "disabled":
        # Everything up to the end of the first answer was there, to the last full page, and the window behind it.
        assert cache["restored_at"] >= first.usage.total_tokens - 1 - 128 and cache["checkpoint"] == "memory"
    else:  # the reasoning of earlier turns is left out of the prompt, which so leaves the first at its last token
        assert hit >= first.usage.prompt_tokens - 1 - 128 and cache["replayed_tokens"] == 0
    again = client.chat.completions.create(messages=messages, seed=12, **fields)
    assert again.choices[0].message.content == second.choices[0].message.content
    assert explanation(again)["reason"] == "exact repeat" and check_usage(again) == again.usage.prompt_tokens


def test_a_turn_with_a_tool_call_and_its_reasoning_hits(client: Any) -> None:
    messages: Any = [{"role": "system", "content": LONG}, {"role": "user", "content": "What time is it in UTC?"}]
    fields: Any = {"model": "minke", "tools": TOOLS, "max_tokens": 400}
    for seed in range(40):
        first = client.chat.completions.create(messages=messages, seed=seed, **fields)
        check_usage(first)
        if first.choices[0].finish_reason == "tool_calls":
            break
    message = first.choices[0].message
    assert message.tool_calls, "in 40 tries the model did not call the clock"
    messages += [message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "12:30"} for call in message.tool_calls]
    second = client.chat.completions.create(messages=messages, seed=1, **fields)
    check_usage(second)
    # Reasoning stays in the prompt while a tool is answered, so the whole first turn is found again, call and all.
    assert explanation(second)["restored_at"] >= first.usage.total_tokens - 1, explanation(second)["text"]


def test_a_stream_explains_itself_at_its_end(client: Any) -> None:
    messages: Any = [{"role": "user", "content": "Say something about the sea, please. " * 20}]
    fields: Any = {"model": "minke", "messages": messages, "max_tokens": 8, "stream": True, "seed": 1}
    for reason in ("never stored", "exact repeat"):
        *_, last = client.chat.completions.create(**fields, stream_options={"include_usage": True})
        check_usage(last)
        assert explanation(last)["reason"] in (reason, "first token", "different token")
    assert last.usage.model_extra["prompt_cache_hit_tokens"] == last.usage.prompt_tokens


def test_a_restarted_server_finds_it_on_disk(model: Any, tmp_path: Path) -> None:
    settings = EngineSettings(context_limit=4096, cache=CacheSettings(memory_bytes=32 << 20, folder=tmp_path))
    messages: Any = [{"role": "user", "content": "Tell me about whales. " * 40}]
    replies = []
    for _ in range(2):
        with (
            settings.open(*model) as engine,
            live(create_app(engine, "minke")) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
        ):
            fields: Any = {"model": "minke", "messages": messages, "max_tokens": 12, "seed": 3}
            replies.append(client.chat.completions.create(**fields))
            check_usage(replies[-1])
    first, second = replies
    assert second.choices[0].message == first.choices[0].message
    assert explanation(second)["disk_tokens"] > 0 and explanation(second)["checkpoint"] == "disk"
