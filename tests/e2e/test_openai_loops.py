"""Tool loops of five turns with the `openai` SDK, unmodified: chat and Responses, whole and streamed, with clients that
keep reasoning and clients that drop it. The model must see everything it wrote.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import live
from mock_model import ScriptModel, byte_tokenizer
from tool_loop import ANSWER, PARAMETERS, QUESTION, TOOL, check_prompts, reply, weather

from rorqual.engine import Engine
from rorqual.server import Behaviour, create_app

openai = pytest.importorskip("openai", reason="needs the openai SDK (clients extra)")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Any]:
    with live(create_app(engine, "minke")) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def run_tools(calls: list[Any]) -> list[Any]:
    return [
        {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
        for call in calls
    ]


@pytest.mark.parametrize("keeps", ["everything", "text and calls"])
def test_chat(client: Any, keeps: str) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for _ in range(5):
        completion = client.chat.completions.create(model="deepseek-v4-flash", messages=messages, tools=[TOOL])
        message = completion.choices[0].message
        restored = completion.model_extra["rorqual"]["continuity"]["restored"]
        assert len(restored) == (0 if keeps == "everything" else len(messages) // 2)
        if keeps == "everything":
            messages.append(message)
        else:  # what most clients send back: arguments parsed and printed again, no reasoning
            calls = [call.model_dump() for call in message.tool_calls or []]
            for call in calls:
                call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=2)
            messages.append({"role": "assistant", "content": message.content, "tool_calls": calls or None})
        messages += run_tools(message.tool_calls or [])
    assert (completion.choices[0].finish_reason, message.content) == ("stop", ANSWER)
    check_prompts()


def test_chat_streamed(client: Any) -> None:
    """With the SDK's own accumulator."""
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for _ in range(5):
        with client.chat.completions.stream(model="deepseek-v4-pro", messages=messages, tools=[TOOL]) as stream:
            for _event in stream:
                pass
            message = stream.get_final_completion().choices[0].message
        calls = [call.model_dump(exclude={"function": {"parsed_arguments"}}) for call in message.tool_calls or []]
        messages.append({"role": "assistant", "content": message.content, "tool_calls": calls or None})
        messages += run_tools(message.tool_calls or [])
    assert message.content == ANSWER
    check_prompts()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("keeps_reasoning", [True, False])
def test_responses(client: Any, streamed: bool, keeps_reasoning: bool) -> None:
    function = TOOL["function"]
    tool = {"type": "function", "strict": False, "name": "weather", "description": function["description"],
            "parameters": PARAMETERS}  # fmt: skip
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    for _ in range(5):
        if streamed:
            with client.responses.stream(model="minke", input=items, tools=[tool]) as stream:
                kinds = [event.type for event in stream]
                response = stream.get_final_response()
            assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        else:
            response = client.responses.create(model="minke", input=items, tools=[tool])
        items += [item for item in response.output if keeps_reasoning or item.type != "reasoning"]
        for item in response.output:
            if item.type == "function_call":
                output = weather(**json.loads(item.arguments))
                items.append({"type": "function_call_output", "call_id": item.call_id, "output": output})
    assert response.output_text == ANSWER
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    shown_tool = {**TOOL, "function": {**function, "strict": False}}
    check_prompts(tool=shown_tool)


def test_without_continuity_a_dropped_reasoning_is_refused(engine: Engine) -> None:
    app = create_app(engine, "minke", behaviour=Behaviour(keep_reasoning=False))
    call = {"id": "c0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima", "days": 1}'}}
    messages: list[Any] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c0", "content": "warm"},
    ]
    with live(app) as url, openai.OpenAI(base_url=f"{url}/beta", api_key="none", max_retries=0) as client:
        with pytest.raises(
            openai.BadRequestError, match="`reasoning_content` in the thinking mode must be passed back"
        ):
            client.chat.completions.create(model="minke", messages=messages, tools=[TOOL])
        messages[1]["reasoning_content"] = ""
        assert client.chat.completions.create(model="minke", messages=messages, tools=[TOOL]).choices
