"""OpenAI's and Anthropic's SDKs, unmodified, through `rorqual referee` before an upstream of chat completions alone.

The upstream is strict: a tool turn without its reasoning, or with calls spelled otherwise, is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import live
from mock_upstream import MockUpstream, calls, says
from referee_process import referee_process

anthropic = pytest.importorskip("anthropic", reason="needs the anthropic SDK (clients extra)")
openai = pytest.importorskip("openai", reason="needs the openai SDK (clients extra)")

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                          "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
SPELLED = '{"b":2.0,  "a":1}'


class Stage:
    """The upstream plays another script in each test."""

    mock: MockUpstream
    url: str
    upstream: str

    def play(self, *answers: Any) -> MockUpstream:
        self.mock = MockUpstream(list(answers), strict=True)
        return self.mock


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage()
    stage.play(says(""))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await stage.mock.app()(scope, receive, send)

    with live(app) as stage.upstream:  # type: ignore[arg-type]
        home = tmp_path_factory.mktemp("home")
        with referee_process(stage.upstream, home, "--mode", "enforce") as (stage.url, _):
            yield stage


def loop() -> list[dict[str, Any]]:
    return [
        says(None, reasoning="Add them.", calls=[calls("add", SPELLED)]),
        says("It is 3.", reasoning="Told me."),
    ]


def messages_client(url: str) -> Any:
    return anthropic.Anthropic(base_url=url, api_key="sk-of-one-client", max_retries=0)


def messages_turn(client: Any, messages: list[Any], stream: bool) -> Any:
    fields: dict[str, Any] = {"model": "m", "max_tokens": 500, "messages": messages,
        "tools": [{"name": "add", "input_schema": SCHEMA}]}  # fmt: skip
    if not stream:
        return client.messages.create(**fields)
    with client.messages.stream(**fields) as made:
        return made.get_final_message()


@pytest.mark.parametrize("keeps_thinking", [True, False])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_anthropics_sdk_through_a_tool_turn(stage: Stage, stream: bool, keeps_thinking: bool) -> None:
    mock = stage.play(*loop())
    client = messages_client(stage.url)
    history: list[Any] = [{"role": "user", "content": f"Add 1 and 2. {stream} {keeps_thinking}"}]
    first = messages_turn(client, history, stream)
    assert [block.type for block in first.content] == ["thinking", "tool_use"] and first.stop_reason == "tool_use"
    assert (first.content[0].thinking, first.content[1].input) == ("Add them.", {"a": 1, "b": 2.0})
    assert first.usage.input_tokens == 90 and first.usage.cache_read_input_tokens == 10
    if not stream:  # the SDK puts a streamed message together without fields it does not know
        assert first.model_extra["referee"]["verdict"] == "pass"
    kept = [
        block.model_dump(exclude_none=True) for block in first.content if keeps_thinking or block.type != "thinking"
    ]
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "3"}
    history += [{"role": "assistant", "content": kept}, {"role": "user", "content": [result]}]
    second = messages_turn(client, history, stream)
    assert second.content[-1].text == "It is 3." and second.stop_reason == "end_turn"
    sent = mock.bodies[-1]["messages"][1]
    assert sent["reasoning_content"] == "Add them." and sent["tool_calls"][0]["function"]["arguments"] == SPELLED


def responses_turn(client: Any, items: list[Any], stream: bool, **more: Any) -> Any:
    tool = {"type": "function", "name": "add", "parameters": SCHEMA, "strict": False}
    fields: dict[str, Any] = {"model": "m", "input": items, "tools": [tool], **more}
    if not stream:
        return client.responses.create(**fields)
    with client.responses.stream(**fields) as made:
        return made.get_final_response()


@pytest.mark.parametrize("keeps_reasoning", [True, False])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_openais_sdk_through_a_tool_turn_of_responses(stage: Stage, stream: bool, keeps_reasoning: bool) -> None:
    mock = stage.play(*loop())
    client = openai.OpenAI(base_url=f"{stage.url}/v1", api_key="sk-of-one-client", max_retries=0)
    items: list[Any] = [{"role": "user", "content": f"Add 1 and 2. {stream} {keeps_reasoning}"}]
    first = responses_turn(client, items, stream)
    assert [item.type for item in first.output] == ["reasoning", "function_call"] and first.status == "completed"
    assert first.output[1].arguments == SPELLED and first.model_extra["referee"]["verdict"] == "pass"
    assert (first.usage.input_tokens, first.usage.input_tokens_details.cached_tokens) == (100, 10)
    for item in first.output:
        if keeps_reasoning or item.type != "reasoning":
            items.append(item.model_dump(exclude_none=True, exclude={"parsed_arguments"}))
    items.append({"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "3"})
    second = responses_turn(client, items, stream)
    assert second.output_text == "It is 3."
    assert mock.bodies[-1]["messages"][1]["reasoning_content"] == "Add them."


def test_both_are_judged_and_refused_in_their_own_words(stage: Stage) -> None:
    bad = says("", calls=[calls("subtract", "{}")])
    client: Any = messages_client(stage.url)
    for stream in (False, True):
        stage.play(bad)
        with pytest.raises(anthropic.UnprocessableEntityError, match="no tool of that name") as refused:
            messages_turn(client, [{"role": "user", "content": "Hi"}], stream)
        assert refused.value.body["type"] == "error" and refused.value.body["referee"]["verdict"] == "rejected"
        stage.play(bad)
        other = openai.OpenAI(base_url=f"{stage.url}/v1", api_key="k", max_retries=0)
        with pytest.raises(openai.UnprocessableEntityError, match="no tool of that name"):
            responses_turn(other, [{"role": "user", "content": "Hi"}], stream)
    stage.play((401, {"error": {"message": "No such key", "type": "authentication_error", "code": None}}))
    with pytest.raises(anthropic.AuthenticationError, match="No such key"):
        messages_turn(client, [{"role": "user", "content": "Hi"}], False)


def test_a_repaired_call_and_a_free_text_tool(stage: Stage) -> None:
    stage.play(says("", calls=[calls("add", '{"a": "1", "b": 2')]))
    repaired = messages_turn(messages_client(stage.url), [{"role": "user", "content": "Hi"}], True)
    assert repaired.content[0].input == {"a": 1, "b": 2}
    stage.play(says("", calls=[calls("patch", '{"input":"*** Begin\\n+ \\u00fc"}')]))
    client = openai.OpenAI(base_url=f"{stage.url}/v1", api_key="k", max_retries=0)
    tools: Any = [{"type": "custom", "name": "patch", "description": "Applies a patch."}]
    answer = client.responses.create(model="m", input="Patch it", tools=tools)
    assert (answer.output[0].type, answer.output[0].input) == ("custom_tool_call", "*** Begin\n+ ü")


@pytest.mark.slow
def test_reasoning_outlives_a_gateway_that_was_killed(stage: Stage, tmp_path: Path) -> None:
    mock = stage.play(*loop())
    history: list[Any] = [{"role": "user", "content": "Add 1 and 2, slowly."}]
    options = ("--mode", "annotate", "--missing-reasoning", "error")
    with referee_process(stage.upstream, tmp_path, *options) as (url, process):
        first = messages_turn(messages_client(url), history, True)
        process.kill()  # nothing is written after this
        process.wait(30)
    kept = [block.model_dump(exclude_none=True) for block in first.content if block.type != "thinking"]
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "3"}
    history += [{"role": "assistant", "content": kept}, {"role": "user", "content": [result]}]
    stored = b"".join(path.read_bytes() for path in (tmp_path / "continuity").iterdir())
    assert b"Add them" not in stored and json.dumps(SPELLED).encode()[2:8] not in stored
    with referee_process(stage.upstream, tmp_path, *options) as (url, _):
        stranger = anthropic.Anthropic(base_url=url, api_key="sk-of-another", max_retries=0)
        with pytest.raises(anthropic.BadRequestError, match="this gateway does not have it"):
            messages_turn(stranger, history, False)
        second = messages_turn(messages_client(url), history, True)
    assert second.content[-1].text == "It is 3."
    assert mock.bodies[-1]["messages"][1]["reasoning_content"] == "Add them."
