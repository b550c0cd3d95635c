"""A state machine for the streams of the Messages API: which event may come when, and what the blocks add up to."""

import json
from typing import Any

_FIELD = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json",
          "signature_delta": "signature"}  # fmt: skip
_DELTAS = {
    "thinking": {"thinking_delta", "signature_delta"},
    "text": {"text_delta"},
    "tool_use": {"input_json_delta"},
}


def events_of(response: Any) -> list[Any]:
    """The events of a stream's response; each names its type twice."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    events = []
    for block in response.text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n", 1)
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


def check_blocks(events: list[Any]) -> list[Any]:
    """The blocks that the events build, `input` of a call as the text it came in.

    One block is open at a time, counted from 0; it begins empty, takes deltas of its own kind only, and a thinking
    block gets its signature last, once.
    """
    blocks: list[Any] = []
    is_open = False
    for event in events:
        kind = event["type"]
        if kind == "ping":
            continue
        if kind == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            block = dict(event["content_block"])
            empty = {"text": "", "thinking": "", "signature": "", "input": {}}
            assert all(block[name] == empty[name] for name in empty if name in block)
            blocks.append({**block, "input": ""} if block["type"] == "tool_use" else block)
            is_open = True
            continue
        block = blocks[-1]
        assert is_open and event["index"] == len(blocks) - 1
        if kind == "content_block_stop":
            assert block["type"] != "thinking" or block["signature"]
            is_open = False
            continue
        assert kind == "content_block_delta"
        delta = event["delta"]
        assert delta["type"] in _DELTAS[block["type"]] and not block.get("signature")
        piece = delta[_FIELD[delta["type"]]]
        assert piece, "a delta without anything in it"
        block["input" if delta["type"] == "input_json_delta" else _FIELD[delta["type"]]] += piece
    assert not is_open
    return blocks


def check_stream(events: list[Any]) -> Any:
    """The whole message that a stream adds up to; checks its beginning and end too."""
    events = [event for event in events if event["type"] != "ping"]
    start, *middle, delta, stop = events
    assert (start["type"], delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message = start["message"]
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    assert message["usage"]["output_tokens"] == 0
    assert all(message["usage"][name] == delta["usage"][name] for name in message["usage"] if name != "output_tokens")
    assert delta["delta"]["stop_reason"] is not None
    beside = {name: value for name, value in delta.items() if name not in ("type", "delta", "usage")}
    return {**message, **delta["delta"], **beside, "usage": delta["usage"], "content": check_blocks(middle)}
