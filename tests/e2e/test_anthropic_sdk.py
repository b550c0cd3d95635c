"""The `anthropic` SDK, unmodified, against a live server over a scripted model: answers, streams, errors, retries."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from live_server import live
from mock_model import ScriptModel, byte_tokenizer
from scripted_api import CALL

from rorqual.engine import Engine
from rorqual.server import create_app
from rorqual.server.anthropic import schema

anthropic = pytest.importorskip("anthropic", reason="needs the anthropic SDK (clients extra)")

ASK: Any = [{"role": "user", "content": "Capital of Peru?"}]
CLOCK: Any = {"name": "clock", "description": "Tells the time.", "input_schema": {"type": "object"}}
OFF: Any = {"type": "disabled"}


def reply(prompt: str) -> str:
    if "forever" in prompt:
        return "more " * 3000
    if "fail now" in prompt:
        raise ValueError("boom")
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


@pytest.fixture(scope="module", params=["/anthropic", ""])
def client(url: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=url + request.param, api_key="unused", max_retries=0) as client:
        yield client


def ask(client: Any, **fields: Any) -> Any:
    return client.messages.create(**{"model": "minke", "max_tokens": 300, "messages": ASK, **fields})


def test_a_whole_reply_with_and_without_thinking(client: Any) -> None:
    message = ask(client, thinking={"type": "enabled", "budget_tokens": 1024}, system="Be brief.")
    thinking, text = message.content
    assert (thinking.thinking, thinking.signature, text.text) == ("Peru, so Lima.", message.id, "Lima 🐋.")
    assert (message.stop_reason, message.role, message.model) == ("end_turn", "assistant", "minke")
    assert message.usage.output_tokens_details.thinking_tokens == len("Peru, so Lima.") + 1
    assert message.model_extra["exactness"]["level"] == "unknown"
    assert len(message._request_id) == 32, "the id under which the server logs it"
    [text] = ask(
        client, thinking=OFF, stop_sequences=["a", "z"], extra_body={"seed": 3, "top_k": 5, "temperature": 1}
    ).content
    assert text.text == "Lim"


def test_a_streamed_reply_is_the_whole_one(client: Any) -> None:
    fields: Any = {"model": "minke", "max_tokens": 300, "messages": [{"role": "user", "content": "What time is it?"}]}
    fields |= {"tools": [CLOCK], "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}]}
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert {"thinking", "signature", "input_json"} <= set(kinds)
    assert [block.type for block in message.content] == ["thinking", "tool_use"]
    assert message.content[1].input == whole.content[1].input == {"zone": "UTC"}
    assert (message.stop_reason, message.usage) == (whole.stop_reason, whole.usage)
    with client.messages.stream(**{**fields, "messages": ASK}) as stream:
        assert "".join(stream.text_stream) == "Lima 🐋."
    raw = [event.type for event in client.messages.create(**fields, stream=True)]
    assert raw[-3:] == ["content_block_stop", "message_delta", "message_stop"]


HEADERS_OF_THE_SDK = {"user_profile_id", "workspace_id"}


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (schema.MessagesRequest, ["message_create_params.MessageCreateParamsBase"]),
        (schema.MessagesRequest, ["message_count_tokens_params.MessageCountTokensParams"]),
        (schema.ThinkingConfig, ["ThinkingConfigEnabledParam", "ThinkingConfigAdaptiveParam"]),
        (schema.OutputConfig, ["OutputConfigParam"]),
        (schema.Metadata, ["MetadataParam"]),
        (
            schema.ToolChoice,
            ["ToolChoiceAnyParam", "ToolChoiceToolParam", "ToolChoiceAutoParam", "ToolChoiceNoneParam"],
        ),
        (schema.Tool, ["ToolParam"]),
        (schema.TextBlock, ["TextBlockParam"]),
        (schema.ThinkingBlock, ["ThinkingBlockParam"]),
        (schema.ToolUseBlock, ["ToolUseBlockParam"]),
        (schema.ToolResultBlock, ["ToolResultBlockParam"]),
        (schema.ToolReferenceBlock, ["ToolReferenceBlockParam"]),
    ],
)
def test_every_field_that_the_sdk_can_send_is_declared(model: Any, params: list[str]) -> None:
    for path in params:
        for types, prefix in ((anthropic.types, ""), (anthropic.types.beta, "Beta")):
            module, _, name = path.rpartition(".")
            found = getattr(getattr(types, module), name) if module else getattr(types, prefix + name)
            assert set(found.__annotations__) - HEADERS_OF_THE_SDK <= set(model.model_fields), found


def test_the_async_client(url: str) -> None:
    async def run() -> tuple[Any, Any, int]:
        async with anthropic.AsyncAnthropic(base_url=f"{url}/anthropic", api_key="unused") as client:
            whole = await ask(client)
            async with client.messages.stream(model="minke", max_tokens=300, messages=ASK) as stream:
                text = "".join([piece async for piece in stream.text_stream])
            counted = await client.messages.count_tokens(model="minke", messages=ASK)
            return whole, text, counted.input_tokens

    whole, text, counted = asyncio.run(run())
    assert (whole.content[-1].text, text, counted) == ("Lima 🐋.", "Lima 🐋.", whole.usage.input_tokens)


def test_tokens_and_models(client: Any) -> None:
    fields: Any = {"model": "claude-sonnet-5", "messages": ASK, "tools": [CLOCK], "system": "S"}
    counted = client.messages.count_tokens(**fields, thinking={"type": "enabled", "budget_tokens": 1024})
    usage = client.messages.create(**fields, max_tokens=9).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    [model] = client.models.list(limit=1000)
    assert (model.id, model.type, model.max_input_tokens) == ("minke", "model", 16384)
    if client.base_url.path.startswith("/anthropic"):
        assert client.models.retrieve("minke").created_at.year == 1970


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_raise_the_right_errors_with_a_readable_message(client: Any, stream: bool) -> None:
    with pytest.raises(anthropic.BadRequestError, match="model name is minke, but you passed gpt-4") as caught:
        ask(client, model="gpt-4", stream=stream)
    assert (caught.value.type, caught.value.error_code) == ("invalid_request_error", "model_not_found")
    assert caught.value.body["error"]["param"] == "model"
    with pytest.raises(anthropic.BadRequestError, match="Unknown field `logit_bias`"):
        ask(client, extra_body={"logit_bias": {}}, stream=stream)
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match="This model does not support image"):
        ask(client, messages=[{"role": "user", "content": [image]}], stream=stream)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        ask(client, messages=[{"role": "user", "content": "x" * 17000}], stream=stream)


def test_models_that_are_not_there(url: str) -> None:
    with anthropic.Anthropic(base_url=f"{url}/anthropic", api_key="unused", max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError, match="but you passed nope"):
            client.models.retrieve("nope")
        with pytest.raises(anthropic.NotFoundError, match="There is nothing at /anthropic/v1/files"):
            client.get("/v1/files", cast_to=object)


def test_failures_of_the_model() -> None:
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine, live(create_app(engine, "minke")) as url:
        broken: Any = [{"role": "user", "content": "fail now"}]
        with anthropic.Anthropic(base_url=f"{url}/anthropic", api_key="unused", max_retries=0) as client:
            with pytest.raises(anthropic.APIStatusError, match="boom") as caught:
                for _ in ask(client, messages=broken, stream=True):
                    pass
            assert caught.value.type == "server_error"
            with pytest.raises(anthropic.InternalServerError):
                ask(client, messages=broken)


def test_a_full_server_is_asked_again() -> None:
    model = ScriptModel(reply)
    with ExitStack() as open_ones:
        engine = open_ones.enter_context(Engine(model, byte_tokenizer(), max_running=1, max_queued=1))
        url = open_ones.enter_context(live(create_app(engine, "minke")))
        client = open_ones.enter_context(anthropic.Anthropic(base_url=f"{url}/anthropic", api_key="x", max_retries=0))
        model.gate.clear()
        busy = [engine.submit([1, 2, 3]), engine.submit([1, 2, 3])]
        with pytest.raises(anthropic.RateLimitError, match="2 are waiting|1 are waiting") as caught:
            ask(client)
        assert int(caught.value.response.headers["retry-after"]) >= 1

        def free(*_: Any) -> None:
            model.gate.set()
            for request in busy:
                request.cancel()

        client = client.with_options(max_retries=2)
        seen: list[int] = []
        prepared = client._prepare_request

        def prepare(request: Any) -> None:
            seen.append(int(request.headers["x-stainless-retry-count"]))
            if seen[-1] == 1:
                free()
                for one in busy:
                    one.result(10)
            prepared(request)

        client._prepare_request = prepare
        assert ask(client).content[-1].text == "Lima 🐋."
        assert seen == [0, 1]


@pytest.mark.parametrize("how", ["close the stream", "time out", "cancel the task"])
def test_a_client_that_leaves_stops_the_work(url: str, engine: Engine, how: str) -> None:
    fields: Any = {"messages": [{"role": "user", "content": "forever"}], "max_tokens": 12000}

    async def read_and_be_cancelled() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async with anthropic.AsyncAnthropic(base_url=f"{url}/anthropic", api_key="unused") as client:
                async for _event in await ask(client, **fields, stream=True):
                    started.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(started.wait(), 20)
        assert engine.occupancy()[0] == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with anthropic.Anthropic(base_url=f"{url}/anthropic", api_key="unused", max_retries=0) as client:
        if how == "close the stream":
            answer = ask(client, **fields, stream=True)
            for _, _event in zip(range(5), answer, strict=False):
                pass
            assert engine.occupancy()[0] == 1
            answer.close()
        elif how == "time out":
            with pytest.raises(anthropic.APITimeoutError):
                ask(client, **fields, timeout=0.3)
        else:
            asyncio.run(read_and_be_cancelled())
    deadline = time.monotonic() + 5
    while engine.occupancy() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.occupancy() == (0, 0)


def test_the_tool_runner(url: str) -> None:
    """It asks for a conversation kept by the server first, and goes on without."""
    asked: list[str] = []

    @anthropic.beta_tool
    def clock(zone: str) -> str:
        """Tells the time.

        Args:
            zone: Where.
        """
        asked.append(zone)
        return json.dumps({"time": "12:00"})

    with anthropic.Anthropic(base_url=f"{url}/anthropic", api_key="unused") as client:
        question: Any = [{"role": "user", "content": "What time is it?"}]
        runner = client.beta.messages.tool_runner(model="minke", max_tokens=500, messages=question, tools=[clock])
        *_, last = runner
    assert asked == ["UTC"] and last.content[-1].text == "Lima 🐋."
