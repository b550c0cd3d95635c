"""Tool loops of five turns over the Messages API: the `anthropic` SDK, and requests in the shape of Claude Code's, with
clients that keep thinking blocks and clients that drop them. The model must see everything it wrote.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import live
from messages_stream import check_stream, events_of
from mock_model import ScriptModel, byte_tokenizer
from tool_loop import ANSWER, PARAMETERS, QUESTION, TOOL, check_prompts, reply, weather

from rorqual.engine import Engine
from rorqual.server import Behaviour, create_app

anthropic = pytest.importorskip("anthropic", reason="needs the anthropic SDK (clients extra)")
httpx2 = pytest.importorskip("httpx2", reason="needs httpx2 (server extra)")

WEATHER: Any = {"name": "weather", "description": TOOL["function"]["description"], "input_schema": PARAMETERS}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with live(create_app(engine, "minke")) as url:
        yield url


@pytest.mark.parametrize(("streamed", "keeps"), [(False, "everything"), (True, "text and calls")])
def test_the_sdk(url: str, streamed: bool, keeps: str) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with anthropic.Anthropic(base_url=f"{url}/anthropic", api_key="none", max_retries=0) as client:
        for _ in range(5):
            fields: Any = {"model": "claude-sonnet-5", "max_tokens": 2000, "messages": messages}
            fields |= {"tools": [WEATHER], "thinking": {"type": "enabled", "budget_tokens": 1024}}
            if streamed:
                with client.messages.stream(**fields) as stream:
                    message = stream.get_final_message()
            else:
                message = client.messages.create(**fields)
            content = [block for block in message.content if keeps == "everything" or block.type != "thinking"]
            messages.append({"role": "assistant", "content": content})
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": weather(**block.input)}
                for block in message.content
                if block.type == "tool_use"
            ]
            if results:
                messages.append({"role": "user", "content": results})
    assert (message.stop_reason, message.content[-1].text) == ("end_turn", ANSWER)
    check_prompts()


HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "authorization": "Bearer none",
    "user-agent": "claude-cli/2.1.156 (external, cli)",
    "x-app": "cli",
    "x-stainless-helper-method": "stream",
    "x-stainless-retry-count": "0",
}
MARK = {"cache_control": {"type": "ephemeral"}}
PERSON = {"device_id": "0" * 64, "account_uuid": "", "session_id": "a1b2c3d4-0000-4000-8000-000000000000"}


def claude_code(client: Any, turn: int, messages: list[Any], tool: Any) -> Any:
    """One request as that program makes it: streamed, marks on the last block, a new account line each time."""
    last = [*messages[-1]["content"]]
    last[-1] = {**last[-1], **MARK}
    body = {
        "model": "claude-opus-4-5-20251101[1m]",
        "messages": [*messages[:-1], {**messages[-1], "content": last}],
        "system": [
            {
                "type": "text",
                "text": f"x-anthropic-billing-header: cc_version=2.1.156.0d9; cc_entrypoint=cli; cch=f{turn};",
            },
            {"type": "text", "text": "You are an agent for the command line.", **MARK},
            {"type": "text", "text": "Be brief.", **MARK},
        ],
        "tools": [tool],
        "metadata": {"user_id": json.dumps(PERSON)},
        "max_tokens": 32000,
        "temperature": 1,
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "stream": True,
    }
    counted = {name: body[name] for name in ("model", "messages", "system", "tools", "thinking")}
    tokens = client.post("/v1/messages/count_tokens?beta=true", json=counted).json()["input_tokens"]
    message = check_stream(events_of(client.post("/v1/messages?beta=true", json=body)))
    usage = message["usage"]
    if turn == 0:  # later counts lack what was put back for this very person
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == tokens
    return message


@pytest.mark.parametrize(("base", "strips"), [("", False), ("/anthropic", True)])
def test_requests_like_those_of_claude_code(url: str, base: str, strips: bool) -> None:
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **PARAMETERS, "additionalProperties": False}
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    with httpx2.Client(base_url=url + base, headers=HEADERS) as client:
        for turn in range(5):
            message = claude_code(client, turn, messages, {**WEATHER, "input_schema": schema})
            continuity = message["rorqual"]["continuity"]
            done = list(range(2, 2 * turn + 2, 2))
            assert continuity == {"restored": done if strips else [], "missing": [], "as_sampled": done}
            content = []
            for block in message["content"]:
                if block["type"] == "tool_use":
                    block["input"] = json.loads(block["input"])
                if block["type"] != "thinking" or not strips:
                    content.append(block)
            messages.append({"role": "assistant", "content": content})
            results = [
                {
                    "type": "tool_result",
                    "tool_use_id": block["id"],
                    "content": weather(**block["input"]),
                    "is_error": False,
                }
                for block in content
                if block["type"] == "tool_use"
            ]
            if results:
                messages.append({"role": "user", "content": results})
    assert content[-1] == {"type": "text", "text": ANSWER}
    shown = {"type": "function", "function": {**TOOL["function"], "parameters": schema}}
    check_prompts(system="You are an agent for the command line.\n\nBe brief.", tool=shown)


def test_without_continuity_a_dropped_thought_is_refused(engine: Engine) -> None:
    app = create_app(engine, "minke", behaviour=Behaviour(keep_reasoning=False))
    call = {"type": "tool_use", "id": "c0", "name": "weather", "input": {"city": "Lima", "days": 1}}
    messages: list[Any] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c0", "content": "warm"}]},
    ]
    fields: Any = {"model": "minke", "max_tokens": 500, "messages": messages, "tools": [WEATHER]}
    with live(app) as url, anthropic.Anthropic(base_url=f"{url}/anthropic", api_key="none", max_retries=0) as client:
        with pytest.raises(
            anthropic.BadRequestError, match=r"`content\[\].thinking` in the thinking mode must be passed"
        ):
            client.messages.create(**fields)
        messages[1]["content"] = [{"type": "thinking", "thinking": "", "signature": ""}, call]
        assert client.messages.create(**fields).content
