"""Our encoder against DeepSeek's own (`deepseek-recipe`, V4 encoding), on random conversations.

Shows: the same prompt, and the same ranges of it taken for control tokens, for everything both can express.
Left out, because the two differ on purpose: the recipe takes system text to the front, opens an assistant
turn after any last message, reads an absent effort as "high", leaves `strict` out of tools, shows given
reasoning in chat mode too, and leaves the reasoning of an open turn unfinished when it has no content yet.
Empty user texts, and calls without arguments (the April encoder leaves an empty line in them), are known
differences. The recipe knows neither developer messages nor tasks nor the April revision.
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rorqual.chat import render_messages

recipe = pytest.importorskip("deepseek_recipe", reason="deepseek-recipe is not installed (a test-only oracle)")

NUM_QUICK, NUM_CONVERSATIONS = 300, 2000

PIECES = [
    "<think>",
    "</think>",
    "<｜User｜>",
    "<｜end▁of▁sentence｜>",
    "｜DSML｜",
    "<tool_result>",
    "你好",
    "ok.",
]
PIECES += ["\n\n", "e\u0301", *'\n\x00\u2028 "\\{aé😀<｜']
texts = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
names = st.sampled_from(["run", "read_file", "a", "é", "x-y"])
scalars = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | texts | st.sampled_from([0.5, 2.0, -1.25, 1e-3])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=3,
)
arguments = st.dictionaries(names, values, min_size=1, max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)
PARAMETERS = {"type": "object", "properties": {"é": {"type": "string"}}}
tools = st.lists(
    st.builds(lambda name, text: {"name": name, "description": text, "parameters": PARAMETERS}, names, texts),
    max_size=2,
)


@st.composite
def conversations(draw):
    """Messages as both sides write them: maybe a system text, then user turns with replies and calls."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for turn in range(draw(st.integers(1, 3))):
        if turn:
            messages.append({"role": "assistant", "content": draw(texts), "reasoning_content": draw(texts)})
        if draw(st.integers(0, 4)) == 0:
            messages.append({"role": "latest_reminder", "content": draw(texts)})
        messages.append({"role": "user", "content": draw(texts.filter(bool))})
        for step in range(draw(st.integers(0, 2))):
            ids = [f"c{turn}{step}{i}" for i in range(draw(st.integers(1, 3)))]
            calls = [
                {"id": i, "type": "function", "function": {"name": draw(names), "arguments": draw(arguments)}}
                for i in ids
            ]
            messages.append(
                {
                    "role": "assistant",
                    "content": draw(texts),
                    "reasoning_content": draw(texts),
                    "tool_calls": calls,
                }
            )
            for i in draw(st.permutations(ids)):
                messages.append({"role": "tool", "tool_call_id": i, "content": draw(texts)})
            if draw(st.booleans()):
                messages.append({"role": "user", "content": draw(texts.filter(bool))})
    if draw(st.booleans()):
        reply = {
            "role": "assistant",
            "content": draw(texts.filter(bool)),
            "reasoning_content": draw(texts),
            "wo_eos": True,
        }
        messages.append(reply)
    return messages


def theirs(message, is_thinking):
    role, content = message["role"], message["content"]
    if role == "assistant":
        calls = [
            recipe.ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", [])
        ]
        reasoning = message["reasoning_content"] if is_thinking else None
        return recipe.AssistantMessage(content, reasoning, calls or None, prefix=message.get("wo_eos", False))
    if role == "tool":
        return recipe.ToolMessage(content, message["tool_call_id"])
    kinds = {
        "system": recipe.SystemMessage,
        "user": recipe.UserMessage,
        "latest_reminder": recipe.LatestReminderMessage,
    }
    return kinds[role](content)


@pytest.mark.parametrize("count", [NUM_QUICK, pytest.param(NUM_CONVERSATIONS, marks=pytest.mark.slow)])
def test_prompts_and_markers_are_equal(count):
    @settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        messages=conversations(),
        functions=tools,
        is_thinking=st.booleans(),
        effort=st.sampled_from(["low", "high", "max"]),
        schema=st.none() | st.just({"type": "object", "title": "ü"}),
    )
    def compare(**drawn):
        check_equal(**drawn)

    compare()


def check_equal(messages, functions, is_thinking, effort, schema):
    definitions = [recipe.ToolDefinition(f["name"], f["description"], f["parameters"]) for f in functions]
    conversation = recipe.Conversation(
        [theirs(message, is_thinking) for message in messages],
        tools=definitions,
        thinking_mode=is_thinking,
        reasoning_effort=effort,
        response_schema=schema,
    )
    expected = recipe.DeepseekV4Encoding().render_conversation(conversation)

    if schema is not None:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        messages = [{**messages[0], "response_format": schema}, *messages[1:]]
    prompt = render_messages(
        messages,
        tools=[{"type": "function", "function": function} for function in functions],
        thinking_mode="thinking" if is_thinking else "chat",
        reasoning_effort=effort,
        revision="2026-07",
    )
    assert prompt.text == expected.prompt
    assert list(prompt.marker_spans) == expected.special_ranges
