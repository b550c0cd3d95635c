"""Reasoning kept for clients that drop it: what it is known by, for whom, how much and how long."""

import json
import threading
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from rorqual.chat import StreamParser, encode_messages
from rorqual.referee import Continuity


def call(id: str, arguments: str = '{"zone": "UTC", "n": 1}', name: str = "clock") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(reasoning: str | None, content: str = "", *calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": list(calls)}


def given_back(kept: Continuity, messages: list[Any], owner: str = "me") -> Any:
    return kept.restore(owner, messages).messages[-1]["reasoning_content"]


def test_an_answer_is_known_by_its_call_ids() -> None:
    kept = Continuity()
    kept.remember("me", [user("what time is it?")], answer("Look.", "Wait.", call("call_00_a")))
    respelt = call("call_00_a", '{"n":1,"zone":"\\u0055TC"}')
    assert given_back(kept, [user("another text"), answer(None, "", respelt)]) == "Look.", "trimmed history, no text"
    assert given_back(kept, [user("x"), answer(None, "", call("call_00_a", '{"zone": "CET", "n": 1}'))]) is None
    assert given_back(kept, [user("x"), answer(None, "", call("call_00_a", name="watch"))]) is None
    assert given_back(kept, [user("x"), answer(None, "", call("call_00_b"))]) is None
    assert given_back(kept, [user("what time is it?"), answer(None, "Wait.\n", call("own-1"))]) == "Look.", "own ids"


def test_a_text_is_known_by_what_it_answered() -> None:
    kept = Continuity()
    kept.remember("me", [user("2 + 2?")], answer("Add.", "4"))
    kept.remember("me", [user("8 / 2?")], answer("Divide.", "4"))
    assert given_back(kept, [user("2 + 2?"), answer(None, " 4\n")]) == "Add."
    assert given_back(kept, [user("hello"), answer("", "hi"), user("8 / 2?"), answer(None, "4")]) == "Divide."
    assert given_back(kept, [user("16 / 4?"), answer(None, "4")]) is None
    assert given_back(kept, [user("2 + 2?"), answer(None, "5")]) is None


def test_what_a_client_sent_is_left_alone_and_reported() -> None:
    kept = Continuity()
    kept.remember("me", [user("a")], answer("Known.", "b"))
    messages = [user("a"), answer("", "b"), user("a"), answer("Own.", "b"), user("a"), answer(None, "b"), user("c"),
                answer(None, "d")]  # fmt: skip
    found = kept.restore("me", messages)
    assert (found.restored, found.missing) == ((5,), (7,))
    assert [m.get("reasoning_content") for m in found.messages][1::2] == ["", "Own.", "Known.", None]
    assert messages[5]["reasoning_content"] is None, "the caller's own list has not changed"


def test_owners_share_nothing() -> None:
    kept = Continuity()
    kept.remember("me", [user("a")], answer("Secret.", "b", call("call_00_a")))
    assert given_back(kept, [user("a"), answer(None, "b", call("call_00_a"))], "you") is None
    assert given_back(kept, [user("a"), answer(None, "b", call("call_00_a"))], "") is None


def test_it_forgets_what_was_not_used() -> None:
    now = [0.0]
    kept = Continuity(expires_s=10, clock=lambda: now[0])
    for i in range(2):
        kept.remember("me", [user(str(i))], answer("R.", "b"))
    now[0] = 8
    assert given_back(kept, [user("1"), answer(None, "b")]) == "R."
    now[0] = 12
    assert given_back(kept, [user("0"), answer(None, "b")]) is None
    assert given_back(kept, [user("1"), answer(None, "b")]) == "R."
    now[0] = 30
    kept.remember("me", [user("x")], answer("R.", "b"))
    assert len(kept) == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.text(max_size=40)), max_size=60), st.integers(0, 400))
def test_memory_is_bounded(answers: list[tuple[int, str]], most: int) -> None:
    kept = Continuity(max_bytes=most)
    for which, reasoning in answers:
        kept.remember("me", [user(str(which))], answer(reasoning, "b", call(f"id{which}")))
        assert kept.nbytes <= most
    for which, reasoning in answers[-1:]:
        back = given_back(kept, [user(str(which)), answer(None, "b", call(f"id{which}"))])
        assert back in (reasoning, None) or not reasoning
    while len(kept):
        kept._drop(next(iter(kept._kept)))
    assert kept.nbytes == 0


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_arguments_may_be_spelt_otherwise(value: Any) -> None:
    kept = Continuity()
    arguments = {"value": value, "other": [1]}
    kept.remember("me", [user("a")], answer("R.", "", call("x", json.dumps(arguments))))
    respelt = json.dumps(dict(reversed(arguments.items())), ensure_ascii=False, indent=1)
    assert given_back(kept, [user("z"), answer(None, "", call("x", respelt))]) == "R."


def test_calls_come_back_as_they_were_sampled() -> None:
    """To the letter, whatever the client made of their JSON, in chat mode too."""
    text = (
        'Wait.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="clock">\n'
        '<｜DSML｜parameter name="n" string="false"> 2.0</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="zone" string="false">"U\\u0054C"</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="clock">\n'
        '<｜DSML｜parameter name="zone" string="true">a "b"\\</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
    )
    parser = StreamParser("chat")
    parser.feed(text)
    parser.finish()
    kept, asked = Continuity(), user("what time is it?")
    kept.remember("me", [asked], parser.result.message, parser.result.sampled)

    back = json.loads(json.dumps(parser.result.message))
    spelt = ['{"zone":"UTC","n":2}', '{"zone":"a \\"b\\"\\\\"}']
    for made, arguments in zip(back["tool_calls"], spelt, strict=True):
        made["function"]["arguments"] = arguments
    del back["reasoning_content"]
    found = kept.restore("me", [asked, back], thinking=False)
    assert (found.restored, found.missing, found.as_sampled) == ((), (), (1,))
    assert encode_messages(found.messages, thinking_mode="chat").endswith(text)
    assert not encode_messages([asked, back], thinking_mode="chat").endswith(text)
    assert kept.restore("me", [asked, back]).missing == (1,), "there was no reasoning to remember"
    back["tool_calls"][1]["function"]["arguments"] = '{"zone": "else"}'
    assert kept.restore("me", [asked, back], thinking=False).as_sampled == ()


def test_many_threads() -> None:
    kept = Continuity(max_bytes=4000)

    def work(owner: str) -> None:
        for i in range(300):
            kept.remember(owner, [user(str(i))], answer(f"{owner} {i}", "b"))
            assert given_back(kept, [user(str(i)), answer(None, "b")], owner) in (f"{owner} {i}", None)

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < kept.nbytes <= 4000
