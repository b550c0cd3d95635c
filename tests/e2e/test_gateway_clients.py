"""Clients that lose or respell parts of the history, through the gateway, against an upstream that refuses both.

The OpenAI SDK, unmodified, over real connections.
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import openai
import pytest
from live_server import live
from mock_upstream import MockUpstream, calls, says

from rorqual.referee import Continuity, Options, Policy
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.gateway_threads import Missing, Threads
from rorqual.server.gateway_wire import Upstream

TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {
    "a": {"type": "number"}, "b": {"type": "number"}, "note": {"type": "string"}}}}}]  # fmt: skip
SPELLED = '{"b":2.0,  "a":1, "note": "Gr\\u00fc\\u00dfe"}'
ROUNDS = 4


def script() -> list[dict[str, Any]]:
    made = [
        says("Adding." if n % 2 else None, reasoning=f"Thought {n}.", calls=[calls("add", SPELLED, f"call_{n}")])
        for n in range(ROUNDS)
    ]
    return [*made, says("It is 3.", reasoning="Done.")]


class Stage:
    """One upstream and one gateway of each kind for all tests; each test brings its own mock and its own key."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._gateways = stack, dict[tuple[str, Missing], str]()
        self.mock = MockUpstream([says("")])

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self.mock.app()(scope, receive, send)

        self.upstream = stack.enter_context(live(app))  # type: ignore[arg-type]

    def gateway(self, mode: str, missing: Missing = "rethink") -> str:
        if (mode, missing) not in self._gateways:
            threads = Threads(Continuity(), missing)
            gateway = Gateway(Upstream(self.upstream), Options(mode, Policy()), threads=threads)  # type: ignore[arg-type]
            self._gateways[mode, missing] = self._stack.enter_context(live(create_gateway(gateway)))
        return self._gateways[mode, missing]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def sdk(url: str, key: str | None = None) -> openai.OpenAI:
    """A client with a key of its own."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key or f"sk-{uuid.uuid4().hex}", max_retries=0)


def as_it_came(message: dict[str, Any]) -> dict[str, Any]:
    return message


def dropped(message: dict[str, Any]) -> dict[str, Any]:
    """As a harness that knows the standard fields alone."""
    return {key: message[key] for key in ("role", "content", "tool_calls") if message.get(key) is not None}


def respelled(message: dict[str, Any]) -> dict[str, Any]:
    """As a harness that keeps arguments as objects: other key order, spaces, escapes and number spelling."""
    message = json.loads(json.dumps(message))
    for call in message["tool_calls"]:
        value = json.loads(call["function"]["arguments"])
        value = {key: int(one) if isinstance(one, float) else one for key, one in sorted(value.items())}
        call["function"]["arguments"] = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return message


def both(message: dict[str, Any]) -> dict[str, Any]:
    return respelled(dropped(message))


def message_of(stream: Any) -> dict[str, Any]:
    """A streamed answer put together, as harnesses do."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in stream:
        if not chunk.choices:
            continue
        delta = chunk.choices[0].delta
        message["content"] += delta.content or ""
        message["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
        for part in delta.tool_calls or ():
            if part.id:
                message["tool_calls"].append(
                    {"id": part.id, "type": "function", "function": {"name": part.function.name, "arguments": ""}}
                )
            message["tool_calls"][part.index]["function"]["arguments"] += part.function.arguments or ""
    if not message["tool_calls"]:
        del message["tool_calls"]
    return message


def run(url: str, change: Any, stream: bool) -> str:
    """A whole agent loop; `change` is what its harness does to an answer before it sends it back."""
    client = sdk(url)
    messages: list[Any] = [{"role": "user", "content": "Add 1 and 2."}]
    for _ in range(ROUNDS + 1):
        made: Any = client.chat.completions.create(model="m", messages=messages, tools=TOOLS, stream=stream)
        message = message_of(made) if stream else made.choices[0].message.model_dump(exclude_none=True)
        if not message.get("tool_calls"):
            return str(message["content"])
        messages.append(change(message))
        for call in message["tool_calls"]:
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "3"})
    raise AssertionError("the loop did not end")


@pytest.mark.parametrize("change", [dropped, respelled, both], ids=lambda one: one.__name__)
def test_the_strict_upstream_refuses_such_clients(stage: Stage, change: Any):
    stage.mock = MockUpstream(script(), strict=True)
    with pytest.raises(openai.BadRequestError):
        run(stage.upstream, change, False)


@pytest.mark.parametrize("mode", ["observe", "annotate", "enforce"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("change", [dropped, respelled], ids=lambda one: one.__name__)
def test_through_the_gateway_they_work_and_every_reasoning_is_restored(
    stage: Stage, change: Any, stream: bool, mode: str
):
    stage.mock = mock = MockUpstream(script(), strict=True)
    assert run(stage.gateway(mode), change, stream) == "It is 3."
    history = [one for one in mock.bodies[-1]["messages"] if one["role"] == "assistant"]
    assert [one["reasoning_content"] for one in history] == [f"Thought {n}." for n in range(ROUNDS)]
    assert {call["function"]["arguments"] for one in history for call in one["tool_calls"]} == {SPELLED}
    assert len(mock.bodies) == ROUNDS + 1


def test_a_harness_that_does_both_and_one_that_does_neither(stage: Stage):
    for change in (as_it_came, both):
        stage.mock = MockUpstream(script(), strict=True)
        assert run(stage.gateway("enforce"), change, True) == "It is 3."


def begun(client: openai.OpenAI) -> list[Any]:
    """A conversation with a call and its result, as a harness keeps it that drops reasoning."""
    messages: list[Any] = [{"role": "user", "content": "Add 1 and 2."}]
    first = client.chat.completions.create(model="m", messages=messages, tools=TOOLS).choices[0].message
    return [*messages, dropped(first.model_dump(exclude_none=True)),
            {"role": "tool", "tool_call_id": "call_0", "content": "3"}]  # fmt: skip


@pytest.mark.parametrize("mode", ["observe", "annotate", "enforce"])
def test_reasoning_that_nobody_has_any_more_is_thought_again_and_told(stage: Stage, mode: str):
    stage.mock = mock = MockUpstream(script(), strict=True)
    messages = begun(sdk(stage.upstream))  # the gateway has never seen that answer
    for _ in range(2):
        answer = sdk(stage.gateway(mode)).chat.completions.create(model="m", messages=messages, tools=TOOLS)
        assert answer.choices[0].message.tool_calls
        if mode != "observe":
            checks = answer.model_extra["referee"]["checks"]  # type: ignore[index]
            assert "reasoning_missing" in [check["reason_code"] for check in checks]
    assert len([body for body in mock.bodies[1:] if body["messages"][1].get("reasoning_content") == ""]) == 2
    with pytest.raises(openai.BadRequestError, match="this gateway does not have it"):
        sdk(stage.gateway(mode, "error")).chat.completions.create(model="m", messages=messages, tools=TOOLS)


def test_other_keys_do_not_get_at_it(stage: Stage):
    stage.mock = MockUpstream(script(), strict=True)
    url = stage.gateway("annotate", "error")
    mine = sdk(url)
    messages = begun(mine)
    with pytest.raises(openai.BadRequestError):
        sdk(url).chat.completions.create(model="m", messages=messages, tools=TOOLS)
    assert mine.chat.completions.create(model="m", messages=messages, tools=TOOLS).choices


def test_refusals_reach_the_sdk_as_its_own_errors(stage: Stage):
    stage.mock = MockUpstream([says("", calls=[calls("sub", "{}")])])
    for stream in (False, True):
        with pytest.raises(openai.UnprocessableEntityError, match="there is no tool of that name"):
            sdk(stage.gateway("enforce")).chat.completions.create(
                model="m", messages=[{"role": "user", "content": "Hi"}], tools=TOOLS, stream=stream
            )


@pytest.mark.parametrize("way", ["holdback", "annotate_after"])
def test_a_connection_that_breaks_within_a_stream(stage: Stage, way: str):
    text = "One sentence after the other, about whales. " * 30
    stage.mock = MockUpstream([says(text)], breaks_after=300)
    mode = "annotate" if way == "annotate_after" else "enforce"
    got = ""
    with pytest.raises(openai.APIError, match="broke off|connection was lost"):
        for chunk in sdk(stage.gateway(mode)).chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            extra_body={"referee": {"stream": way}},
        ):
            got += chunk.choices[0].delta.content or ""
    assert got and text.startswith(got)


@pytest.mark.parametrize("mode, way", [("observe", None), ("annotate", "annotate_after"), ("enforce", "buffer")])
def test_a_client_that_goes_away_ends_the_upstreams_work(stage: Stage, mode: str, way: str | None):
    stage.mock = mock = MockUpstream([says("whales " * 2000)], pause_s=0.02)
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    body |= {"referee": {"stream": way}} if way else {}
    patience = 0.6 if way == "buffer" else 30.0  # a buffered answer has no first byte to wait for
    with (
        pytest.raises(httpx2.ReadTimeout if way == "buffer" else ZeroDivisionError),
        httpx2.stream("POST", f"{stage.gateway(mode)}/v1/chat/completions", json=body, timeout=patience) as response,
    ):
        assert next(response.iter_raw())
        raise ZeroDivisionError
    assert mock.ended.wait(30), "the upstream still writes for nobody"
