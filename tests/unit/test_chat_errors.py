"""What the chat room refuses, with the words it uses: the field, the reason, and what to do."""

import pytest

from rorqual.chat import StreamParser, encode_messages, fim_prompt, parse_completion, resolve_effort
from rorqual.errors import RequestError

USER = {"role": "user", "content": "x"}


def call(arguments, **function):
    return {
        "role": "assistant",
        "tool_calls": [{"id": "1", "function": {"name": "f", **function, **arguments}}],
    }


MESSAGES = [
    ("hello", "messages", "is a string, but a conversation is a list of messages"),
    ([], "messages", "messages is empty, so there is nothing to answer"),
    (["x"], "messages[0]", 'Send an object with "role" and "content"'),
    ([USER, {"content": "x"}], "messages[1].role", "Use one of system, user, assistant, tool"),
    ([{"role": ["user"], "content": ""}], "messages[0].role", "has no place in the prompt format"),
    (
        [{"role": "user"}],
        "messages[0].content",
        'is null, but only text can be rendered. Send a string; "" means empty',
    ),
    ([{"role": "user", "content": 3}], "messages[0].content", "is a number"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "messages[0].content",
        "Join the text parts into one string, or use a checkpoint of revision 2026-07",
    ),
    ([USER, {"role": "tool"}], "messages[1].content", "the result of the call is unknown"),
    ([{"role": "tool", "content": ["x"]}], "messages[0].content[0]", "without a type"),
    ([{"role": "tool", "content": "x", "tool_call_id": 7}], "messages[0].tool_call_id", "matches no call"),
    ([{"role": "developer", "content": ""}], "messages[0].content", "is empty"),
    ([{"role": "latest_reminder", "content": None}], "messages[0].content", "is null"),
    (
        [{"role": "assistant", "content": "x", "reasoning_content": 1}],
        "messages[0].reasoning_content",
        "a number",
    ),
    (
        [{**USER, "task": "poem"}],
        "messages[0].task",
        "Use one of action, query, authority, domain, title, read_url",
    ),
    ([{**USER, "task": {}}], "messages[0].task", "has no token"),
    ([{"role": "system", "tools": {}}], "messages[0].tools", "is an object, not a list of tools"),
    ([{"role": "system", "tools": [{"name": "f"}]}], "messages[0].tools[0].function", "is missing"),
    (
        [{"role": "system", "tools": [{"function": {}}]}],
        "messages[0].tools[0].function.name",
        "Give it a name",
    ),
    (
        [{"role": "system", "response_format": {1j}}],
        "messages[0].response_format",
        "cannot be written as JSON",
    ),
    ([{"role": "assistant", "tool_calls": "f()"}], "messages[0].tool_calls", "not a list of calls"),
    ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function.name", "is missing"),
    ([call({})], "messages[0].tool_calls[0].function.arguments", 'Send "{}" for none'),
    (
        [call({"arguments": "[1, 2]"})],
        "messages[0].tool_calls[0].function.arguments",
        "is the JSON array [1, 2]",
    ),
    ([call({"arguments": "7"})], "messages[0].tool_calls[0].function.arguments", "is the JSON number 7"),
    (
        [call({"arguments": "null"})],
        "messages[0].tool_calls[0].function.arguments",
        "Send a JSON object as text",
    ),
    ([{"role": "user", "content": "half \ud83d"}], "messages", "lone surrogate U+D83D after"),
]


@pytest.mark.parametrize(("messages", "param", "words"), MESSAGES, ids=[case[1] + ": " + case[2] for case in MESSAGES])
def test_bad_messages_name_the_field(messages, param, words):
    with pytest.raises(RequestError) as refusal:
        encode_messages(messages)
    assert refusal.value.param == param
    assert str(refusal.value).startswith(param)
    assert words in str(refusal.value)
    assert refusal.value.status == 400


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"thinking_mode": "auto"}, "thinking_mode", 'Use "thinking" or "chat"'),
        ({"revision": "2025-12"}, "revision", "2026-04 or 2026-07"),
        (
            {"reasoning_effort": "low"},
            "reasoning_effort",
            "revision 2026-04 was trained with high, max and none",
        ),
        ({"reasoning_effort": ["max"]}, "reasoning_effort", "Use one of these, or leave it out"),
        ({"reasoning_effort": "xhigh", "revision": "2026-07"}, "reasoning_effort", "low, high, max and none"),
        ({"tools": "f"}, "tools", "is a string, not a list of tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "the model is shown nothing else of a tool"),
        ({"context": [{"role": "user", "content": None}]}, "context[0].content", "is null"),
    ],
)
def test_bad_options_name_themselves(options, param, words):
    with pytest.raises(RequestError) as refusal:
        encode_messages([USER], **options)
    assert refusal.value.param == param
    assert words in str(refusal.value)


def test_a_tool_schema_that_is_no_json_names_the_tool():
    tools = [{"function": {"name": "ok"}}, {"function": {"name": "f", "parameters": object()}}]
    with pytest.raises(RequestError, match="is not JSON serializable") as refusal:
        encode_messages([USER], tools=tools)
    assert refusal.value.param == "tools[1].function"


def test_indices_count_the_callers_messages_even_when_a_system_message_is_put_before_them():
    with pytest.raises(RequestError) as refusal:
        encode_messages([USER, {"role": "critic"}], tools=[{"function": {"name": "f"}}])
    assert refusal.value.param == "messages[1].role"


def test_the_image_placeholder_cannot_be_typed():
    message = {"role": "user", "content": "see <｜deepseek_image｜>"}
    assert "<｜deepseek_image｜>" in encode_messages([message])  # an ordinary text before images existed
    with pytest.raises(RequestError, match="would be taken for one. Remove it from the text, or send the image"):
        encode_messages([message], revision="2026-07")


def test_malformed_completion():
    with pytest.raises(RequestError) as refusal:
        parse_completion("never closed")
    assert refusal.value.code == "malformed_completion"
    assert refusal.value.param == "text"
    assert "reasoning is not closed by </think>" in str(refusal.value)
    assert "use strict=False to keep what can be kept" in str(refusal.value)


@pytest.mark.parametrize("make", [StreamParser, lambda mode: parse_completion("x", mode)])
def test_parsers_refuse_an_unknown_mode(make):
    with pytest.raises(RequestError, match="thinking_mode is 'fast'"):
        make("fast")


def test_fim_takes_text():
    assert fim_prompt("a", "b") == "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"
    assert fim_prompt("", "", add_default_bos_token=True).startswith("<｜begin▁of▁sentence｜><｜fim▁begin｜>")
    with pytest.raises(RequestError, match="suffix is NoneType, but only text can stand around the gap") as refusal:
        fim_prompt("a", None)
    assert refusal.value.param == "suffix"


def test_effort_words_of_the_api():
    assert resolve_effort("none") == ("chat", None)
    assert resolve_effort(None) == ("thinking", "high")
    assert resolve_effort("xhigh", "2026-04") == ("thinking", "max")
    assert resolve_effort("xhigh", "2026-07") == ("thinking", "high")
    assert resolve_effort("low", "2026-07") == ("thinking", "low")
    with pytest.raises(RequestError, match="Use one of none, minimal, low, medium, high, xhigh, max") as refusal:
        resolve_effort("extreme", "2026-07")
    assert refusal.value.param == "reasoning_effort"
    with pytest.raises(RequestError, match="Use the checkpoint's own: 2026-04 or 2026-07"):
        resolve_effort("low", "2027-01")
