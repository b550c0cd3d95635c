"""The stream parser, for any text and any cut of it.

Shows: events do not depend on the cut; what was streamed joins to the final message; a well-formed reply
gives the strict parser's message; control tokens never reach reasoning or content; no text makes it raise.
"""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rorqual.chat import (
    ContentDelta,
    Finished,
    ReasoningDelta,
    StreamParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    markers,
    parse_completion,
)
from rorqual.errors import RequestError

EOS = markers.EOS
FRAGMENTS = [
    *markers.FORBIDDEN_IN_REPLY,
    *(
        "\n",
        "\n\n",
        "<",
        "</",
        ">",
        '">',
        " ",
        "a",
        "think>",
        "tool_calls>",
        "invoke",
        ' name="',
        "｜",
        "1",
        '{"a": 1}',
    ),
    *(markers.CALLS_OPEN, markers.CALLS_CLOSE, markers.INVOKE_OPEN, markers.INVOKE_CLOSE),
    *(markers.PARAMETER_OPEN, markers.PARAMETER_CLOSE, "<｜｜DSML｜｜tool_calls>"),
    markers.INVOKE_OPEN + ' name="f">\n',
    markers.PARAMETER_OPEN + ' name="k" string="true">',
    markers.PARAMETER_OPEN + ' name="j" string="false">',
]
messy = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=20).map("".join)
modes = st.sampled_from(["chat", "thinking"])


def stream(pieces, mode, **options):
    """Feed the pieces; return the events with adjacent deltas joined, checked against the final message."""
    parser = StreamParser(mode, make_id=lambda index: f"id{index}", **options)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert parser.finish() == []
    *body, last = events
    assert last == parser.result and isinstance(last, Finished)
    joined = []
    for event in body:
        key, text = event, ""
        if isinstance(event, (ReasoningDelta, ContentDelta)):
            key, text = type(event), event.text
        elif isinstance(event, ToolCallArguments):
            key, text = event.index, event.piece
        if joined and joined[-1][0] == key:
            joined[-1][1] += text
        else:
            joined.append([key, text])
    message = last.message
    assert message["reasoning_content"] == "".join(t for k, t in joined if k is ReasoningDelta)
    assert message["content"] == "".join(t for k, t in joined if k is ContentDelta)
    complete = [e.index for e in body if isinstance(e, ToolCallEnd) and e.complete]
    starts = {e.index: e for e in body if isinstance(e, ToolCallStart)}
    assert len(message["tool_calls"]) == len(complete)
    for index, call in zip(complete, message["tool_calls"], strict=True):
        assert (call["id"], call["function"]["name"]) == (starts[index].id, starts[index].name)
        pieces_joined = "".join(e.piece for e in body if isinstance(e, ToolCallArguments) and e.index == index)
        assert json.loads(pieces_joined) == json.loads(call["function"]["arguments"])
    return joined, last


def cut(text, places):
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


@settings(max_examples=300, deadline=None)
@given(text=messy, mode=modes, places=st.lists(st.integers(0, 10**6), max_size=4), variants=st.booleans())
@example(text="<｜DSML｜parameter<</think>think>", mode="chat", places=[], variants=False)
@example(text="a\n\n</think>\n<｜DSML｜tool_", mode="thinking", places=[1], variants=False)
def test_any_cut_gives_the_same_events_and_no_markup_leaks(text, mode, places, variants):
    whole = stream([text], mode, accept_variants=variants)
    assert stream(list(text), mode, accept_variants=variants) == whole
    assert stream(cut(text, places), mode, accept_variants=variants) == whole
    for marker in markers.FORBIDDEN_IN_REPLY:
        assert marker not in whole[1].message["content"]
        assert marker not in whole[1].message["reasoning_content"]
    try:
        expected = parse_completion(text, mode)
        for call in expected["tool_calls"]:
            json.loads(call["function"]["arguments"])
    except (RequestError, ValueError):
        return
    assert without_ids(whole[1].message) == expected


@settings(max_examples=100, deadline=None)
@given(text=messy, mode=modes)
def test_calls_can_be_switched_off(text, mode):
    joined, last = stream([text], mode, allow_calls=False)
    assert last.message["tool_calls"] == []
    assert {key for key, _ in joined} <= {ReasoningDelta, ContentDelta}
    assert last.message["content"] == parse_completion(text, mode, strict=False)["content"]


plain = st.text(st.characters(exclude_characters="<｜")) | st.sampled_from(
    ["a < b", "x\n", "<｜User｜>", "\n\n\n", "ü"]
)
keys = st.text(st.characters(exclude_characters='">｜', exclude_categories=["Cs"]), min_size=1, max_size=6)
json_texts = st.sampled_from(["1", "-2.50", "true", "null", "[1,  2]", '{"x":"</think>"}', '"s"', "[]", " 7 "])
parameters = st.dictionaries(keys, st.tuples(st.just(True), plain) | st.tuples(st.just(False), json_texts), max_size=3)


@st.composite
def well_formed(draw):
    mode = draw(modes)
    text = draw(plain) + markers.THINK_END if mode == "thinking" else ""
    text += draw(plain)
    calls = draw(st.lists(st.tuples(keys, parameters), max_size=3))
    if calls:
        text += "\n\n" + markers.CALLS_OPEN + "\n"
        for name, members in calls:
            text += f'{markers.INVOKE_OPEN} name="{name}">\n'
            for key, (is_string, value) in members.items():
                flag = "true" if is_string else "false"
                text += f'{markers.PARAMETER_OPEN} name="{key}" string="{flag}">'
                text += f"{value}{markers.PARAMETER_CLOSE}\n"
            text += markers.INVOKE_CLOSE + "\n"
        text += markers.CALLS_CLOSE
    return text + EOS, mode


@settings(max_examples=200, deadline=None)
@given(reply=well_formed(), places=st.lists(st.integers(0, 10**6), max_size=6))
def test_a_well_formed_reply_gives_the_strict_message(reply, places):
    text, mode = reply
    expected = parse_completion(text, mode)
    _, last = stream(cut(text, places), mode)
    assert without_ids(last.message) == expected
    assert last.finish_reason == ("tool_calls" if expected["tool_calls"] else "stop")
    assert last.notes == ()


@settings(max_examples=100, deadline=None)
@given(reply=well_formed(), place=st.integers(0, 10**6))
def test_a_reply_cut_off_anywhere_keeps_a_beginning_of_itself(reply, place):
    text, mode = reply
    whole = parse_completion(text, mode, strict=False)
    part = parse_completion(text[: place % len(text)], mode, strict=False)
    # A marker cut through the middle is not recognised: up to its length of it may stay as text.
    assert part["reasoning_content"][:-21] == whole["reasoning_content"][: len(part["reasoning_content"][:-21])]
    assert part["tool_calls"] == whole["tool_calls"][: len(part["tool_calls"])]
    assert part["finish_reason"] == ("tool_calls" if part["tool_calls"] else "length")


def without_ids(message):
    calls = [{"type": call["type"], "function": call["function"]} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


BLOCK = f'\n\n{markers.CALLS_OPEN}\n{markers.INVOKE_OPEN} name="run">\n'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "run",
            "parameters": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}, "u": {"type": ["null"]}}},
        },
    }
]


def parameter(key, value, flag=' string="true"'):
    return f'{markers.PARAMETER_OPEN} name="{key}"{flag}>{value}{markers.PARAMETER_CLOSE}\n'


CALL = BLOCK + parameter("cmd", "ls") + markers.INVOKE_CLOSE
LS = ['{"cmd": "ls"}']
REPAIRS = [
    # what, text, mode, reasoning, content, arguments, finish reason
    ("no end", "plan</think>so f", "thinking", "plan", "so f", [], "length"),
    ("reasoning only", "hm" + EOS, "thinking", "hm", "", [], "stop"),
    ("second think end", "r</think></think>a</think>b" + EOS, "thinking", "r", "ab", [], "stop"),
    ("call in reasoning", "r" + CALL + markers.CALLS_CLOSE + EOS, "thinking", "r", "", LS, "tool_calls"),
    ("one newline", "ok" + CALL[1:] + markers.CALLS_CLOSE + EOS, "chat", "", "ok", LS, "tool_calls"),
    ("no newline", "ok" + CALL[2:] + markers.CALLS_CLOSE + EOS, "chat", "", "ok", LS, "tool_calls"),
    ("unclosed block", CALL, "chat", "", "", LS, "tool_calls"),
    ("cut in a call", "ok" + BLOCK, "chat", "", "ok", [], "length"),
    ("cut in a value", BLOCK + parameter("a", "1") + markers.PARAMETER_OPEN, "chat", "", "", [], "length"),
    ("cut in the second", CALL + BLOCK[len(f"\n\n{markers.CALLS_OPEN}") :], "chat", "", "", LS, "tool_calls"),
    ("cut in the tag", "ok\n\n<｜DSML｜tool_", "chat", "", "ok", [], "length"),
    ("empty block", f"a\n\n{markers.CALLS_OPEN}\n{markers.CALLS_CLOSE}b" + EOS, "chat", "", "ab", [], "stop"),
    ("lone closers", f"a{markers.INVOKE_CLOSE}b{markers.CALLS_CLOSE}" + EOS, "chat", "", "ab", [], "stop"),
    ("text after", CALL + markers.CALLS_CLOSE + "\nbye" + EOS, "chat", "", "\nbye", LS, "tool_calls"),
    ("blank after", CALL + markers.CALLS_CLOSE + " \n" + EOS, "chat", "", "", LS, "tool_calls"),
    (
        "not a block",
        f"Tags like {markers.CALLS_OPEN} open it." + EOS,
        "chat",
        "",
        "Tags like  open it.",
        [],
        "stop",
    ),
    ("text for an unclosed block", CALL + "\nDone." + EOS, "chat", "", "\nDone.", LS, "tool_calls"),
    ("not a parameter", BLOCK + '{"cmd": "ls"}' + markers.INVOKE_CLOSE + EOS, "chat", "", "", [], "stop"),
    ("no block", CALL.replace(markers.CALLS_OPEN, "") + EOS, "chat", "", "\n", LS, "tool_calls"),
    (
        "untyped",
        BLOCK + parameter("n", "7", "") + markers.INVOKE_CLOSE,
        "chat",
        "",
        "",
        ['{"n": 7}'],
        "tool_calls",
    ),
    (
        "untyped text",
        BLOCK + parameter("s", "7", "") + markers.INVOKE_CLOSE,
        "chat",
        "",
        "",
        ['{"s": "7"}'],
        "tool_calls",
    ),
    (
        "untyped unknown",
        BLOCK + parameter("z", "7", "") + markers.INVOKE_CLOSE,
        "chat",
        "",
        "",
        ['{"z": "7"}'],
        "tool_calls",
    ),
    (
        "typed",
        BLOCK + parameter("n", "7") + markers.INVOKE_CLOSE,
        "chat",
        "",
        "",
        ['{"n": "7"}'],
        "tool_calls",
    ),
    (
        "not JSON",
        BLOCK + parameter("n", "so on", ' string="false"') + markers.INVOKE_CLOSE,
        "chat",
        "",
        "",
        ['{"n": "so on"}'],
        "tool_calls",
    ),
    (
        "twice",
        BLOCK + parameter("s", "1") + parameter("n", "2") + parameter("s", "3") + markers.INVOKE_CLOSE,
        "chat",
        "",
        "",
        ['{"s": "3", "n": "2"}'],
        "tool_calls",
    ),
]


@pytest.mark.parametrize(
    ("text", "mode", "reasoning", "content", "arguments", "reason"),
    [c[1:] for c in REPAIRS],
    ids=[c[0] for c in REPAIRS],
)
def test_repairs(text, mode, reasoning, content, arguments, reason):
    message = parse_completion(text, mode, strict=False, tools=TOOLS)
    assert message["reasoning_content"] == reasoning
    assert message["content"] == content
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == arguments
    assert message["finish_reason"] == reason


def test_engine_reason_and_variant_spellings():
    assert parse_completion("done", "chat", strict=False, finish_reason="stop")["finish_reason"] == "stop"
    doubled = CALL.replace("｜DSML｜", "｜｜DSML｜｜")
    assert stream([doubled], "chat")[1].message["tool_calls"] == []
    assert len(stream([doubled], "chat", accept_variants=True)[1].message["tool_calls"]) == 1


def test_a_call_is_announced_as_soon_as_its_name_is_known_and_text_flows():
    parser = StreamParser("chat", make_id=lambda index: f"call_{index}")
    assert parser.feed("Hello.\n\n") == [ContentDelta("Hello.")]
    assert parser.feed('<｜DSML｜tool_calls>\n<｜DSML｜invoke name="run') == []
    assert parser.feed('">\n') == [ToolCallStart(0, "call_0", "run")]
    assert parser.feed('<｜DSML｜parameter name="cmd" string="true">say "') == [
        ToolCallArguments(0, '{"cmd": "say \\"')
    ]
    assert parser.feed("hi\n</") == [ToolCallArguments(0, "hi\\n")]
    assert parser.feed("b></｜DSML｜parameter>") == [ToolCallArguments(0, '</b>"')]
    assert parser.feed("\n</｜DSML｜invoke>") == [ToolCallArguments(0, "}"), ToolCallEnd(0, True)]


def test_default_ids_carry_the_index():
    calls = StreamParser("chat")
    starts = [e for e in calls.feed(CALL + CALL[len("\n\n<｜DSML｜tool_calls>") :]) if isinstance(e, ToolCallStart)]
    assert [start.id[:8] for start in starts] == ["call_00_", "call_01_"]
    assert all(len(start.id) == 32 and start.id[8:].isalnum() for start in starts)
