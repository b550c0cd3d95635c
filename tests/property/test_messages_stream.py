"""Events of the Messages API, for any text a model may write and any cut of it.

Shows: the events are a valid sequence; what was streamed joins to the blocks of the whole answer, which say the same as
the chat message; the cut changes nothing but where deltas end; every block can be written as JSON.
"""

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from messages_stream import check_blocks

from rorqual import chat
from rorqual.chat import markers
from rorqual.server.anthropic.writer import Writer, parse_arguments

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
        "invoke",
        ' name="',
        "｜",
        "1",
        '{"a": 1}',
        "NaN",
        "1e999",
    ),
    *(markers.CALLS_OPEN, markers.CALLS_CLOSE, markers.INVOKE_OPEN, markers.INVOKE_CLOSE),
    *(markers.PARAMETER_OPEN, markers.PARAMETER_CLOSE),
    markers.INVOKE_OPEN + ' name="f">\n',
    markers.PARAMETER_OPEN + ' name="k" string="true">',
    markers.PARAMETER_OPEN + ' name="j" string="false">',
]
messy = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=25).map("".join)
CALL = f'{markers.CALLS_OPEN}\n{markers.INVOKE_OPEN} name="f">\n{markers.PARAMETER_OPEN} name="j" string="false">'
END = f"{markers.PARAMETER_CLOSE}\n{markers.INVOKE_CLOSE}\n{markers.CALLS_CLOSE}"


def stream(pieces: list[str], mode: str, shows: bool) -> tuple[list[Any], Writer, chat.Finished]:
    """The blocks that were streamed, calls that came to nothing among them; what the writer kept; the chat message."""
    parser = chat.StreamParser(mode, make_id=lambda index: f"id{index}")
    writer = Writer("signature", thinking=mode == "thinking", shows_thinking=shows)
    events = list(writer.begin())
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish():
        events += writer.read(event)
    return check_blocks(events), writer, parser.result


@settings(max_examples=200, deadline=None)
@given(
    text=messy,
    mode=st.sampled_from(["chat", "thinking"]),
    size=st.integers(1, 9),
    shows=st.booleans(),
)
@example(text=f"a</think>b\n\n{CALL}1e999{END}c", mode="thinking", size=1, shows=True)
@example(text=CALL + "9" * 5000 + END, mode="chat", size=900, shows=True)
@example(text=CALL + '{"a": NaN}' + END, mode="chat", size=2, shows=True)
@example(text=CALL[:-10], mode="thinking", size=3, shows=False)
def test_any_reply_is_a_valid_stream_of_the_same_blocks(text: str, mode: str, size: int, shows: bool) -> None:
    blocks, writer, finished = stream([text[i : i + size] for i in range(0, len(text), size)], mode, shows)
    whole = stream([text], mode, shows)
    assert (blocks, writer.content) == (whole[0], whole[1].content)

    message = finished.message
    complete = {call["id"]: call["function"] for call in message["tool_calls"]}
    kept = [block for block in blocks if block["type"] != "tool_use" or block["id"] in complete]
    assert [block["type"] for block in kept] == [block["type"] for block in writer.content]
    for streamed, block in zip(kept, writer.content, strict=True):
        if block["type"] == "tool_use":
            assert block["input"] == parse_arguments(streamed["input"])
            assert block["input"] == parse_arguments(complete[block["id"]]["arguments"])
            assert block["name"] == complete[block["id"]]["name"]
        else:
            assert streamed == block

    def joined(kind: str) -> str:
        return "".join(block[kind] for block in writer.content if block["type"] == kind)

    assert joined("text") == message["content"]
    assert joined("thinking") == (message["reasoning_content"] if shows else "")
    assert len(complete) == sum(block["type"] == "tool_use" for block in writer.content)
    if mode == "thinking":
        assert blocks[0]["type"] == "thinking"
    json.dumps(writer.content, allow_nan=False)
