"""Tool loops of five turns with LangChain's ChatOpenAI and ChatDeepSeek and with LiteLLM, unmodified.

ChatOpenAI and LiteLLM's openai provider drop `reasoning_content`; the model must see its reasoning all the same.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import live
from mock_model import ScriptModel, byte_tokenizer
from tool_loop import ANSWER, QUESTION, TOOL, check_prompts, reply, weather

from rorqual.engine import Engine
from rorqual.server import create_app

pytestmark = [
    pytest.mark.slow,  # importing these clients takes longer than talking to them
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of their own models
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine, live(create_app(engine, "minke")) as url:
        yield url


def langchain_client(kind: str, url: str) -> Any:
    options: dict[str, Any] = {"model": "deepseek-v4-flash", "api_key": "none", "max_retries": 0}
    if kind == "ChatOpenAI":
        return pytest.importorskip("langchain_openai").ChatOpenAI(base_url=f"{url}/v1", **options)
    return pytest.importorskip("langchain_deepseek").ChatDeepSeek(api_base=f"{url}/v1", **options)


@pytest.mark.parametrize("kind", ["ChatOpenAI", "ChatDeepSeek"])
@pytest.mark.parametrize("streamed", [False, True])
def test_langchain(url: str, kind: str, streamed: bool) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    model = langchain_client(kind, url).bind_tools([TOOL])
    messages: list[Any] = [HumanMessage(QUESTION)]
    for _ in range(5):
        if streamed:
            pieces = list(model.stream(messages))
            message = pieces[0]
            for piece in pieces[1:]:
                message = message + piece
        else:
            message = model.invoke(messages)
        messages.append(message)
        messages += [ToolMessage(weather(**call["args"]), tool_call_id=call["id"]) for call in message.tool_calls]
    assert message.content == ANSWER
    check_prompts()


@pytest.mark.parametrize("provider", ["openai", "deepseek"])
@pytest.mark.parametrize("streamed", [False, True])
def test_litellm(url: str, provider: str, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a price list
    litellm = pytest.importorskip("litellm")
    options = {"model": f"{provider}/deepseek-v4-pro", "api_base": f"{url}/v1", "api_key": "none", "tools": [TOOL]}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for _ in range(5):
        if streamed:
            chunks = list(litellm.completion(messages=messages, stream=True, **options))
            message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
        else:
            message = litellm.completion(messages=messages, **options).choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            result = weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert message.content == ANSWER
    check_prompts()
