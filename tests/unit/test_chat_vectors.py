"""Every vector of the prompt format: rendered prompts, refusals, and parsed replies, compared exactly.

The vectors come from running the released April encoder; those of 2026-07 from the same code with the
published changes. What they do not show: that the hosted service uses this encoder.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.chat import encode_messages, parse_completion, render_messages
from rorqual.errors import RequestError

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "chat-vectors.json").read_text(encoding="utf-8"))
PARSED = [vector for vector in VECTORS if "parsed" in vector]


def name(vector):
    return vector["name"]


def test_all_vectors_are_here():
    assert len(VECTORS) == 150
    assert len({vector["name"] for vector in VECTORS}) == 150


@pytest.mark.parametrize("vector", VECTORS, ids=name)
def test_rendered(vector):
    if vector["rendered"] is None:
        with pytest.raises(RequestError) as refusal:
            encode_messages(vector["messages"], tools=vector.get("tools"), **vector["options"])
        assert refusal.value.param
        return
    messages = json.loads(json.dumps(vector["messages"]))
    prompt = render_messages(messages, tools=vector.get("tools"), **vector["options"])
    assert prompt.text == vector["rendered"]
    assert "".join(piece for piece, _ in prompt.pieces()) == vector["rendered"]
    assert messages == vector["messages"], "the caller's messages were changed"


@pytest.mark.parametrize("vector", PARSED, ids=name)
def test_parsed(vector):
    case = vector["parsed"]
    if "message" in case:
        assert parse_completion(case["completion"], thinking_mode=case["thinking_mode"]) == case["message"]
        return
    with pytest.raises(RequestError) as refusal:
        parse_completion(case["completion"], thinking_mode=case["thinking_mode"])
    assert refusal.value.code == "malformed_completion"
    # The tolerant form makes something of each of them.
    message = parse_completion(case["completion"], thinking_mode=case["thinking_mode"], strict=False)
    assert message["role"] == "assistant"


@pytest.mark.parametrize("vector", PARSED, ids=name)
def test_tolerant_form_agrees_where_the_strict_one_accepts(vector):
    case = vector["parsed"]
    # The one difference by design: a value that claims to be JSON and is not becomes a JSON string.
    if "message" not in case or vector["name"] == "parse/json-value-invalid-passes":
        return
    message = parse_completion(case["completion"], thinking_mode=case["thinking_mode"], strict=False)
    finish_reason, notes = message.pop("finish_reason"), message.pop("notes")
    assert message == case["message"]
    assert finish_reason == ("tool_calls" if message["tool_calls"] else "stop")
    assert notes == []


def test_a_parsed_reply_renders_back_to_the_same_text():
    """Renders history + parsed message; holds for values in Python's JSON style and calls with parameters."""
    case = next(v for v in PARSED if v["name"] == "parse/text-and-two-calls")["parsed"]
    history = [{"role": "user", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "run"}}]
    prompt = encode_messages(history, tools=tools)
    again = encode_messages([*history, parse_completion(case["completion"])], tools=tools)
    assert again == prompt + case["completion"]


def test_callers_text_is_never_a_marker():
    """A control token typed by a user stays in a text piece; the encoder's own are marker pieces."""
    prompt = render_messages([{"role": "user", "content": "a <｜User｜></think> b"}], thinking_mode="chat")
    assert list(prompt.pieces()) == [
        ("<｜begin▁of▁sentence｜>", True),
        ("<｜User｜>", True),
        ("a <｜User｜></think> b", False),
        ("<｜Assistant｜>", True),
        ("</think>", True),
    ]


def test_imports_no_torch():
    code = "import sys, rorqual.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
