"""Which ids of a conversation are learned: by mode, by tools, by weights, beside quick instructions."""

from typing import Any

import pytest
from mock_model import byte_tokenizer

from rorqual.errors import DataError
from rorqual.posttrain.conversations import Conversation, PlainText, sample_of
from rorqual.posttrain.examples import Example
from rorqual.posttrain.masking import examples_of
from rorqual.tokenizer import train_tokenizer

TOKENIZER = byte_tokenizer()
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def says(text: str, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    thought = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": "assistant", "content": text, **thought, **more}


def marked(example: Example) -> str:
    """The text, what is learned in brackets."""
    out, was = "", False
    for number, is_learned in zip(example.ids, example.loss_mask, strict=True):
        out += "" if is_learned == was else "[" if is_learned else "]"
        out += TOKENIZER.decode([number])
        was = is_learned
    return (out + "]" if was else out).replace(BOS, "")


def shown(messages: list[dict[str, Any]], **more: Any) -> list[str]:
    return [marked(e) for e in examples_of(Conversation(messages, source="here", **more), TOKENIZER)]


TALK = [user("a"), says("b", "r1"), user("c"), says("d", "r2")]


def test_plain_thinking_is_an_example_a_turn() -> None:
    assert shown(TALK) == [
        f"{USER}a{ASSISTANT}<think>[r1</think>b{EOS}]",
        f"{USER}a{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}<think>[r2</think>d{EOS}]",
    ]


def test_with_tools_all_reasoning_is_in_one_sequence() -> None:
    [text] = shown(TALK, tools=TOOLS)
    assert text.endswith(
        f"{USER}a{ASSISTANT}<think>[r1</think>b{EOS}]{USER}c{ASSISTANT}<think>[r2</think>d{EOS}]"
    )  # fmt: skip
    assert text.startswith("\n\n## Tools")


def test_without_thinking_all_turns_are_in_one_sequence() -> None:
    expected = f"{USER}a{ASSISTANT}</think>[b{EOS}]{USER}c{ASSISTANT}</think>[d{EOS}]"
    assert shown(TALK, thinking_mode="chat") == [expected]
    assert shown([user("a"), says("b"), user("c"), says("d")]) == [expected]


def test_a_turn_without_reasoning_among_others_is_one_without_thinking() -> None:
    assert shown([user("a"), says("b"), user("c"), says("d", "r")]) == [
        f"{USER}a{ASSISTANT}</think>[b{EOS}]{USER}c{ASSISTANT}<think>[r</think>d{EOS}]"
    ]


def test_kept_reasoning_is_one_sequence_too() -> None:
    [text] = shown(TALK, drop_thinking=False, thinking_mode="thinking")
    assert text.count("[r") == 2


def test_maximal_effort_begins_with_its_instruction() -> None:
    [text] = shown(TALK[:2], thinking_mode="thinking", reasoning_effort="max")
    assert text.startswith("Reasoning Effort: Absolute maximum") and text.count("[") == 1
    [high] = shown(TALK[:2], thinking_mode="thinking", reasoning_effort="high")
    assert high == shown(TALK[:2])[0]


def test_calls_and_their_results() -> None:
    call = {"id": "1", "function": {"name": "look", "arguments": '{"x": "y"}'}}
    talk = [
        user("a"),
        says("", "r", tool_calls=[call]),
        {"role": "tool", "tool_call_id": "1", "content": "z"},
        says("b", "s"),
    ]
    [text] = shown(talk, tools=TOOLS)
    learned = [part.split("]")[0] for part in text.split("[")[1:]]
    assert learned[0].startswith("r</think>\n\n<｜DSML｜tool_calls>") and learned[0].endswith(f"tool_calls>{EOS}")
    assert learned[1] == f"s</think>b{EOS}" and "<tool_result>z</tool_result>" in text


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url"])
def test_quick_instructions_on_a_question(task: str) -> None:
    assert shown([user("a", task=task), says("x")]) == [f"{USER}a<｜{task}｜>[x{EOS}]"]


def test_the_action_and_the_title() -> None:
    action = [user("a", task="action"), says("Search")]
    assert shown(action) == [f"{USER}a{ASSISTANT}</think><｜action｜>[Search{EOS}]"]
    assert shown(action, thinking_mode="thinking") == [f"{USER}a{ASSISTANT}<think><｜action｜>[Search{EOS}]"]
    titled = [user("a"), says("b", "r", task="title"), says("T")]
    assert shown(titled) == [f"{USER}a{ASSISTANT}<think>r</think>b{EOS}<｜title｜>[T{EOS}]"]
    asked_for = [user("a"), says("b", "r", task="title", weight=1), says("T")]
    assert shown(asked_for) == [f"{USER}a{ASSISTANT}<think>[r</think>b{EOS}]<｜title｜>[T{EOS}]"]


def test_turns_around_a_quick_instruction_are_learned() -> None:
    talk = [user("a"), says("b"), user("q", task="query"), says("x"), user("c"), says("d")]
    [text] = shown(talk)
    assert text.count("[") == 3 and f"<｜query｜>[x{EOS}]" in text


def test_single_messages_may_be_left_out() -> None:
    expected = f"{USER}a{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}</think>[d{EOS}]"
    for out in ({"weight": 0}, {"mask": True}):
        assert shown([user("a"), says("b", **out), user("c"), says("d", weight=1)]) == [expected]
    assert shown([user("a"), says("b", weight=0)]) == []
    assert shown([user("a"), says("b"), user("c"), says("d")], num_given=3) == [expected]
    with pytest.raises(DataError, match="0 or 1"):
        shown([user("a"), says("b", weight=0.5)])


def test_markers_in_a_users_text_are_text() -> None:
    [text] = shown([user(f"x{ASSISTANT}</think>lie{EOS}{USER}"), says("b")])
    assert text.count("[") == 1 and text.endswith(f"{ASSISTANT}</think>[b{EOS}]")
    [example] = examples_of(Conversation([user(ASSISTANT), says("b")]), TOKENIZER)
    assert example.ids.count(TOKENIZER.token_id(ASSISTANT)) == 1


def test_a_token_that_is_partly_others_is_not_learned() -> None:
    """After a system text there is no header, so a token may reach from one to the other."""
    merging = train_tokenizer(["abcabcabc " * 50], 300)
    assert len(merging.encode("abc")) == 1
    [example] = examples_of(Conversation([{"role": "system", "content": "xa"}, says("bcd")]), merging)
    learned = [merging.decode([i]) for i, m in zip(example.ids, example.loss_mask, strict=True) if m]
    assert learned == ["d", EOS]


def test_open_turns_have_no_end() -> None:
    assert shown([user("a"), says("b", wo_eos=True)]) == [f"{USER}a{ASSISTANT}</think>[b]"]


def test_plain_texts() -> None:
    [text] = examples_of(PlainText("ab"), TOKENIZER)
    assert marked(text) == f"[ab{EOS}]" and text.is_splittable
    [completed] = examples_of(PlainText("b", "a"), TOKENIZER)
    assert marked(completed) == f"a[b{EOS}]" and not completed.is_splittable
    [rendered] = examples_of(PlainText(f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}"), TOKENIZER)
    assert marked(rendered) == f"{USER}a{ASSISTANT}</think>[b{EOS}]" and not rendered.is_splittable


def test_what_cannot_be_rendered_names_the_row() -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl:3: messages\[1\]\.role is 'bot'"):
        examples_of(
            sample_of({"messages": [user("a"), {"role": "bot", "content": ""}, says("b")]}, "chat.jsonl:3"), TOKENIZER
        )
    with pytest.raises(DataError, match="chat.jsonl:4 has no assistant message"):
        examples_of(sample_of({"messages": [user("a")]}, "chat.jsonl:4"), TOKENIZER)


def test_pictures_are_refused() -> None:
    shows = user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="here has an image"):
        examples_of(Conversation([shows, says("b")], source="here"), TOKENIZER, "2026-07")
