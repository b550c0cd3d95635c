"""What is learned of random conversations: exactly the text of their replies, each once, in the context it is given."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from small_models import drawn

from rorqual.chat import encode_messages
from rorqual.posttrain.conversations import Conversation
from rorqual.posttrain.examples import Example
from rorqual.posttrain.masking import examples_of
from rorqual.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["the cat sat on the mat.\n\nand the hat; unable, stable, </able> <tables> " * 20], 340)
EOS, DSML = "<｜end▁of▁sentence｜>", "｜DSML｜"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]

words = st.text("aet hn.\n<>é", max_size=12)
hostile = st.lists(
    st.one_of(words, st.sampled_from(["<｜Assistant｜>", "</think>", EOS, "<｜User｜>", "<think>"])), max_size=4
)
texts = {False: words, True: hostile.map("".join)}


@st.composite
def assistants(draw: Any, with_calls: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": draw(words)}
    if draw(st.booleans()):
        message["reasoning_content"] = draw(words)
    if with_calls and draw(st.booleans()):
        arguments = draw(st.dictionaries(st.sampled_from(["a", "b"]), st.one_of(words, st.integers(), st.booleans())))
        message["tool_calls"] = [{"id": "1", "function": {"name": "look", "arguments": json.dumps(arguments)}}]
    if draw(st.integers(0, 9)) == 0:
        message.update(wo_eos=True, content=message["content"] + "x")  # an open turn without text is nothing
    return message


@st.composite
def conversations(draw: Any) -> tuple[Conversation, bool]:
    """A conversation, and whether text of others holds markers."""
    is_hostile, has_tools = draw(st.booleans()), draw(st.booleans())
    text = texts[is_hostile]
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(text)})
        if draw(st.integers(0, 5)) == 0:
            messages.append({"role": "latest_reminder", "content": draw(text) + "é"})  # merges with nothing
        messages.append(draw(assistants(has_tools)))
        while messages[-1].get("tool_calls"):
            messages.append({"role": "tool", "tool_call_id": "1", "content": draw(text)})
            messages.append(draw(assistants(draw(st.booleans()))))
    mode = draw(st.sampled_from([None, "chat", "thinking"]))
    effort = draw(st.sampled_from([None, "max"])) if mode == "thinking" else None
    return Conversation(messages, TOOLS if has_tools else None, mode, effort, source="drawn"), is_hostile


def written(message: dict[str, Any], thinks: bool) -> str:
    """What stands in the text for an assistant message, by the format's description."""
    out = message.get("reasoning_content", "") + "</think>" if thinks else ""
    out += message["content"]
    for call in message.get("tool_calls", ()):
        out += f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="look">\n'
        values = []
        for key, value in json.loads(call["function"]["arguments"]).items():
            is_text = isinstance(value, str)
            shown = value if is_text else json.dumps(value)
            values.append(f'<{DSML}parameter name="{key}" string="{str(is_text).lower()}">{shown}</{DSML}parameter>')
        out += "\n".join(values) + f"\n</{DSML}invoke>\n</{DSML}tool_calls>"
    return out if message.get("wo_eos") else out + EOS


def learned_text(example: Example) -> str:
    return TOKENIZER.decode([i for i, is_learned in zip(example.ids, example.loss_mask, strict=True) if is_learned])


def turns_of(messages: list[dict[str, Any]]) -> list[list[int]]:
    """Places of the assistant messages between one question or tool result and the next."""
    turns: list[list[int]] = [[]]
    for place, message in enumerate(messages):
        if message["role"] in ("user", "tool"):
            turns.append([])
        elif message["role"] == "assistant":
            turns[-1].append(place)
    return [turn for turn in turns if turn]


@given(conversations())
@drawn(60)
def test_learned_ids_are_the_replies(drawn_one: tuple[Conversation, bool]) -> None:
    conversation, is_hostile = drawn_one
    messages, tools = conversation.messages, conversation.tools
    examples = examples_of(conversation, TOKENIZER)
    turns = turns_of(messages)
    at = 0
    for example in examples:
        text = TOKENIZER.decode(example.ids)
        # The example ends with one of the turns, and its text is what the encoder writes up to there.
        last = next(
            (number, mode)
            for number in range(len(turns) - 1, at - 1, -1)
            for mode in ((conversation.thinking_mode,) if conversation.thinking_mode else ("chat", "thinking"))
            if text == encode_messages(messages[: turns[number][-1] + 1], tools, mode, conversation.reasoning_effort)
        )
        number, mode = last
        if not is_hostile:
            assert example.ids == TOKENIZER.encode(text)
        expected = ""
        for turn in range(at, number + 1):
            is_plain = mode == "chat" or (not tools and turn < number)
            expected += "".join(written(messages[place], not is_plain) for place in turns[turn])
        assert learned_text(example) == expected
        at = number + 1
    assert at == len(turns), "every turn is learned, once"
    if conversation.thinking_mode == "chat" or tools:
        assert len(examples) == 1
    if conversation.thinking_mode == "thinking" and not tools:
        assert len(examples) == len(turns)


@given(conversations())
@drawn(20)
def test_nothing_of_others_is_learned(drawn_one: tuple[Conversation, bool]) -> None:
    """Replies that are emptied leave only their marks: whatever others say does not change what is learned."""
    conversation, _ = drawn_one
    for message in conversation.messages:
        if message["role"] == "assistant":
            message.update(content="", reasoning_content="")
            message.pop("tool_calls", None)
    for example in examples_of(conversation, TOKENIZER):
        assert not set(learned_text(example).replace(EOS, "").replace("</think>", ""))
